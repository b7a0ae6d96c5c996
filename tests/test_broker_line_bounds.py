"""The line of those who wait for memory: how many there may be, for how long, and what one turn of the loop does."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from gcma_shm.broker.areas import Areas
from gcma_shm.broker.line import ASKED_S, LINE_MAX, LINE_MAX_CLIENT, TRIES_MAX
from gcma_shm.broker.room import Place, Wanted
from gcma_shm.errors import ArenaExhausted, NoSuchBuffer
from gcma_shm.layout import BUFFER
from tests.desk import FOREVER_S, PAGE, Desk

# --- bounds and time


def test_a_client_has_so_many_requests_in_line(desk: Desk) -> None:
    desk.get(2, 100)
    tickets = [desk.wait(3, 100) for _ in range(LINE_MAX_CLIENT)]
    with pytest.raises(ArenaExhausted, match=f"{LINE_MAX_CLIENT} of this client"):
        desk.ask(3, 100)
    desk.wait(4, 100)
    with pytest.raises(ArenaExhausted):
        desk.collect(3, tickets[7], give_up=True)
    desk.wait(3, 100)


def test_the_line_has_so_many_requests(desk: Desk) -> None:
    desk.get(2, 100)
    wanted = desk.allocations.wanted(100 * PAGE, "a")
    for n in range(LINE_MAX):
        desk.line.ask(100 + n // LINE_MAX_CLIENT, 1, wanted, BUFFER, None, FOREVER_S)
    desk.check()
    with pytest.raises(ArenaExhausted, match="the line is full") as raised:
        desk.ask(3, 100)
    assert raised.value.holders == {2: 100 * PAGE}
    assert len(desk.line) == LINE_MAX
    desk.die(100)
    desk.wait(3, 100)


def test_who_has_waited_too_long_is_told(desk: Desk) -> None:
    desk.get(2, 95)
    first, second, third = (
        desk.wait(3, 100, timeout_s=5),
        desk.wait(4, 5, timeout_s=50),
        desk.wait(5, 100, timeout_s=50),
    )
    desk.tick(4.9)
    assert desk.woken == []
    desk.come((3, first), (4, second), (5, third))
    desk.tick(0.1)
    assert desk.woken == [3, 4], "the second waited for the first alone"
    with pytest.raises(ArenaExhausted) as raised:
        desk.collect(3, first)
    assert raised.value.requested == 100 * PAGE
    with pytest.raises(NoSuchBuffer):
        desk.collect(3, first)
    got = desk.collect(4, second)
    assert got is not None
    assert got.place.pages == 5
    assert desk.collect(5, third) is None


def test_a_waiter_sees_for_itself_that_its_time_is_over(desk: Desk) -> None:
    """It may look before the broker's clock ticks."""
    held = desk.get(2, 95)
    first, second = desk.wait(3, 100, timeout_s=5), desk.wait(4, 5)
    desk.now += 5
    with pytest.raises(ArenaExhausted):
        desk.collect(3, first)
    assert desk.woken == [4]
    assert desk.collect(4, second) is not None
    desk.tick()
    assert desk.woken == [4]
    desk.free(held)


def test_what_nobody_collects_is_given_back(desk: Desk) -> None:
    held = desk.get(2, 100)
    first, second = desk.wait(3, 100), desk.wait(4, 100)
    desk.tick(ASKED_S - 0.1)
    desk.come((3, first), (4, second))
    desk.tick(ASKED_S - 0.1)
    desk.come((4, second))
    desk.free(held)
    assert len(desk.line.uncollected(3)) == 1
    assert desk.line.uncollected(4) == []
    desk.tick(ASKED_S - 0.1)  # counted from when it was served
    desk.come((4, second))
    assert len(desk.line.uncollected(3)) == 1
    desk.tick(0.2)
    assert desk.woken == [3, 4]
    assert desk.collect(4, second) is not None
    with pytest.raises(NoSuchBuffer):
        desk.collect(3, first)
    assert desk.allocations.holders.of(3) == []


def test_a_refusal_that_nobody_collects_is_forgotten(desk: Desk) -> None:
    desk.get(2, 100)
    ticket = desk.wait(3, 100, timeout_s=2)
    desk.tick(2)
    assert desk.woken == [3]
    assert desk.line.uncollected(3) == []
    desk.tick(ASKED_S - 0.1)
    assert ticket in desk.line._served
    desk.tick(0.1)
    with pytest.raises(NoSuchBuffer):
        desk.collect(3, ticket)
    assert not desk.line._served


def test_who_does_not_come_any_more_loses_its_place(desk: Desk) -> None:
    """Its client was stopped, or never got its ticket: whoever stands behind it is not to wait for that."""
    held = desk.get(2, 95)
    first, second, third = desk.wait(3, 100), desk.wait(3, 100), desk.wait(4, 5)
    for _ in range(5):
        desk.tick(ASKED_S - 0.1)
        desk.come((3, first), (3, second), (4, third))
    desk.tick(1)
    desk.come((3, second), (4, third))
    desk.tick(ASKED_S - 1 - 0.1)
    desk.come((3, second))
    assert len(desk.line) == 3
    desk.tick(0.1)
    assert len(desk.line) == 2
    with pytest.raises(NoSuchBuffer):
        desk.collect(3, first)
    desk.tick(1)
    assert len(desk.line) == 1, "the last has not come either"
    assert desk.woken == []
    desk.free(held)
    assert desk.woken == [3]
    assert desk.collect(3, second) is not None


def test_who_stands_behind_one_that_does_not_come_is_served(desk: Desk) -> None:
    desk.get(2, 95)
    desk.wait(3, 100)
    desk.tick(1)
    second = desk.wait(4, 5)
    desk.tick(ASKED_S - 1)
    assert desk.woken == [4], "and 3 is not woken: there is nothing for it"
    assert desk.collect(4, second) is not None


# --- what a turn of the loop does


@dataclass
class Searches:
    """Counts how often a place is looked for."""

    areas: Areas
    count: int = 0

    def __post_init__(self) -> None:
        self._find, self._find_passing = self.areas.find, self.areas.find_passing

    def find(self, wanted: Wanted) -> Place | None:
        self.count += 1
        return self._find(wanted)

    def find_passing(self, wanted: Wanted, first_in_line: Wanted) -> Place | None:
        self.count += 1
        return self._find_passing(wanted, first_in_line)

    def turn(self, desk: Desk) -> int:
        """One turn of the loop, and how often it looked."""
        before = self.count
        desk.line.advance()
        return self.count - before


@pytest.fixture
def searches(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Searches:
    searches = Searches(desk.allocations.areas)
    monkeypatch.setattr(desk.allocations.areas, "find", searches.find)
    monkeypatch.setattr(desk.allocations.areas, "find_passing", searches.find_passing)
    return searches


def test_many_are_served_in_turns(desk: Desk, searches: Searches) -> None:
    held = desk.get(2, 100)
    many = 2 * TRIES_MAX + 5
    tickets = [(client, desk.wait(client, 2)) for client in range(100, 100 + many)]
    desk.allocations.free(2, held.number)
    for turn in range(1, 3):
        assert searches.turn(desk) == TRIES_MAX
        assert desk.woken == list(range(100, 100 + turn * TRIES_MAX)), "in order"
    assert searches.turn(desk) == 5
    assert searches.turn(desk) == 0, "nobody waits"
    assert len(desk.line) == 0
    places = [desk.collect(client, ticket) for client, ticket in tickets]
    assert len({got.place.first for got in places if got is not None}) == many


def test_between_two_turns_nobody_takes_what_the_first_in_line_is_about_to_have(desk: Desk) -> None:
    held = desk.get(2, 100)
    tickets = [(client, desk.wait(client, 5)) for client in range(100, 119)]
    desk.allocations.free(2, held.number)
    desk.line.advance()
    assert len(desk.line) == 3, "and 20 pages are left"
    with pytest.raises(ArenaExhausted, match="wait in line"):
        desk.line.ask(2, 1, desk.allocations.wanted(20 * PAGE, "a"), BUFFER, None, 0)
    desk.advance()
    assert desk.woken == [client for client, _ in tickets]


def test_of_those_that_want_the_same_one_is_looked_for(desk: Desk, searches: Searches) -> None:
    """And of those that want more than is free anywhere, none."""
    low = desk.get(2, 50)
    high = desk.get(2, 50)
    desk.wait(3, 95)
    desk.wait(3, 96)
    for client in range(100, 150):
        desk.wait(client, 20)
        desk.wait(client, 60)
    desk.allocations.free(2, high.number)
    assert searches.turn(desk) == 1, "50 are free, and nobody may pass"
    assert searches.turn(desk) == 0
    assert desk.woken == []
    desk.check()
    desk.free(low)
    assert desk.woken == [3]


def test_nothing_freed_nothing_looked_for(desk: Desk, searches: Searches) -> None:
    desk.get(2, 90)
    desk.wait(3, 100)
    ticket = desk.wait(4, 6)
    before = searches.count
    for _ in range(10):
        assert desk.line.collect(4, ticket, give_up=False) is None
        assert searches.turn(desk) == 0
    assert searches.count == before


def test_whoever_is_refused_before_it_keeps_nobody_from_another_area(desk: Desk) -> None:
    """More different requests than a turn tries, none of which may pass; and behind them one that nothing is in the way of."""
    desk.get(2, 50, "a")
    held = desk.get(2, 200, "b")
    desk.wait(3, 95, "a")
    for pages in range(6, 6 + TRIES_MAX):
        desk.wait(4, pages, "a")
    ticket = desk.wait(5, 10, "b")
    desk.free(held)
    assert desk.collect(5, ticket) is not None
