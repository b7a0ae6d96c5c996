"""The line of those who wait for memory: first come, first served, and who may pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from gcma_shm.areas import AreaSpec
from gcma_shm.broker import line as line_module
from gcma_shm.broker.allocations import Allocations
from gcma_shm.broker.areas import Areas
from gcma_shm.broker.line import ASKED_S, LINE_MAX, LINE_MAX_CLIENT, TRIES_MAX, Line
from gcma_shm.broker.room import Place, Wanted
from gcma_shm.broker.table import Allocation
from gcma_shm.errors import ArenaExhausted, BufferExists, NoSuchBuffer, QuotaExceeded
from gcma_shm.layout import BUFFER, RESERVATION
from tests.conftest import Bare, private_bare
from tests.invariants import check_tables

PAGE = 4096
FOREVER_S = 1e6
TURNS = 100  # of the control loop, after which all must have been served that can be


@dataclass
class Desk:
    """Allocations and their line, as the broker's service asks them: each request is followed by `advance`, and by as many more
    turns as it takes.
    """

    bare: Bare
    quota: int | None = None
    now: float = 1000.0
    woken: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        areas = Areas(self.bare.plane, self.bare.arena.areas, memoryview(self.bare.arena.memory))
        self.allocations = Allocations(self.bare.plane, areas, self.quota)
        self.line = Line(self.allocations, self.woken.append)

    def monotonic(self) -> float:
        return self.now

    def ask(
        self,
        client: int,
        pages: int,
        area: str | None = "a",
        timeout_s: float = FOREVER_S,
        *,
        offset: int | None = None,
        kind: int = BUFFER,
        name: str | None = None,
    ) -> Allocation | int:
        wanted = self.allocations.wanted(pages * PAGE, area, offset)
        try:
            return self.line.ask(client, 1, wanted, kind, name, timeout_s)
        finally:
            self.advance()

    def get(self, client: int, pages: int, area: str | None = "a", timeout_s: float = 0, **more: int) -> Allocation:
        """What does not have to wait."""
        got = self.ask(client, pages, area, timeout_s, **more)  # type: ignore[arg-type] # an offset or a kind
        assert isinstance(got, Allocation)
        return got

    def wait(self, client: int, pages: int, area: str | None = "a", timeout_s: float = FOREVER_S) -> int:
        """The ticket of what has to."""
        ticket = self.ask(client, pages, area, timeout_s)
        assert isinstance(ticket, int)
        return ticket

    def free(self, allocation: Allocation) -> None:
        for client in list(allocation.holders):
            self.allocations.free(client, allocation.number)
        self.advance()

    def collect(self, client: int, ticket: int, give_up: bool = False) -> Allocation | None:
        try:
            return self.line.collect(client, ticket, give_up)
        finally:
            self.advance()

    def die(self, client: int) -> None:
        self.line.drop(client)
        self.allocations.drop(client)
        self.advance()

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.allocations.expire()
        self.line.expire()
        self.advance()

    def resize(self, area: str, pages: int) -> None:
        self.allocations.resize(area, pages)
        self.line.reconsider()
        self.advance()

    def come(self, *tickets: tuple[int, int]) -> None:
        """Clients that come for tickets, in vain."""
        for client, ticket in tickets:
            assert self.collect(client, ticket) is None

    def advance(self) -> None:
        for _ in range(TURNS):
            self.line.advance()
            if not self.line.pending:
                break
        self.check()

    def check(self) -> None:
        self.line._check()
        self.allocations._check()


@pytest.fixture
def desk(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """Areas `a` (100 pages) and `b` (200 pages)."""
    desk = Desk(bare)
    monkeypatch.setattr(line_module, "time", desk)
    return desk


# --- first come, first served


def test_who_finds_room_does_not_wait(desk: Desk) -> None:
    for timeout_s in (0, FOREVER_S):
        desk.free(desk.get(2, 100, timeout_s=timeout_s))
    assert len(desk.line) == 0
    assert desk.woken == []


def test_who_may_not_wait_is_told_by_whom(desk: Desk) -> None:
    desk.get(2, 60)
    with pytest.raises(ArenaExhausted) as raised:
        desk.get(3, 50)
    assert (raised.value.requested, raised.value.largest_free) == (50 * PAGE, 40 * PAGE)
    assert raised.value.holders == {2: 60 * PAGE}
    assert "line" not in str(raised.value)
    assert len(desk.line) == 0


def test_served_in_order(desk: Desk) -> None:
    held = desk.get(2, 100)
    tickets = [desk.wait(client, 100) for client in (3, 4, 3)]
    assert len(set(tickets)) == 3
    for client, ticket in zip((3, 4, 3), tickets, strict=True):
        assert desk.collect(client, ticket) is None
        desk.free(held)
        assert desk.woken.pop() == client
        got = desk.collect(client, ticket)
        assert isinstance(got, Allocation)
        assert got.holders == {client}
        assert not desk.woken
        held = got
    assert len(desk.line) == 0


def test_one_free_may_serve_several(desk: Desk) -> None:
    held = desk.get(2, 100)
    tickets = [desk.wait(client, pages) for client, pages in ((3, 30), (4, 40), (5, 80), (6, 30))]
    desk.free(held)
    assert desk.woken == [3, 4], "80 is the first in line now, and would need what 30 could have"
    assert desk.collect(6, tickets[3]) is None
    assert len(desk.line) == 2


def test_reservations_wait_in_the_same_line(desk: Desk) -> None:
    held = desk.get(2, 100, kind=RESERVATION)
    first = desk.ask(3, 100, kind=RESERVATION)
    second = desk.wait(4, 100)
    assert isinstance(first, int)
    desk.free(held)
    got = desk.collect(3, first)
    assert got is not None
    assert got.is_reservation
    assert desk.collect(4, second) is None


def test_what_no_waiting_would_help_is_refused_at_once(desk: Desk) -> None:
    desk.get(2, 100)
    for pages, area in ((101, "a"), (201, "b"), (201, None), (1 << 40, None)):
        with pytest.raises(ArenaExhausted):
            desk.ask(3, pages, area)
    with pytest.raises(ValueError, match="pages"):
        desk.ask(3, 10, offset=91)
    desk.get(2, 10, "b", name="x")  # type: ignore[arg-type] # a name
    with pytest.raises(BufferExists):
        desk.ask(3, 100, name="x")
    desk.allocations.holders.set_quota(3, 50 * PAGE)
    with pytest.raises(QuotaExceeded):
        desk.ask(3, 51)
    assert len(desk.line) == 0


# --- who may pass


def test_a_small_one_passes_where_it_cannot_delay_the_first(desk: Desk) -> None:
    low, high = desk.get(2, 60), desk.get(3, 30)  # 90 to 99 are free
    first = desk.wait(4, 80)  # both have to go, whoever is at 90
    small = desk.get(5, 5)
    assert small.place.offset == 90
    desk.free(high)
    assert len(desk.line) == 1
    desk.free(low)
    got = desk.collect(4, first)
    assert got is not None
    assert got.place.offset + 80 <= 90


def test_a_small_one_passes_at_the_very_end(desk: Desk) -> None:
    low = desk.get(2, 90)
    first = desk.wait(4, 95)
    with pytest.raises(ArenaExhausted, match="wait in line"):
        desk.get(5, 6)
    assert desk.get(5, 5).place.offset == 95
    desk.free(low)
    assert desk.woken == [4]
    got = desk.collect(4, first)
    assert got is not None
    assert got.place.offset == 0


def test_a_small_one_does_not_pass_where_it_could_delay(desk: Desk) -> None:
    low = desk.get(2, 90)
    first = desk.ask(4, 95, offset=5)
    assert isinstance(first, int)
    with pytest.raises(ArenaExhausted, match="wait in line"):
        desk.get(5, 5)
    small = desk.wait(5, 5)
    assert desk.collect(5, small) is None
    desk.free(low)
    assert desk.woken == [4, 5]
    got = desk.collect(4, first)
    assert got is not None
    assert (got.place.offset, got.place.pages) == (5, 95)


def test_who_waits_for_another_area_is_nobodys_concern(desk: Desk) -> None:
    desk.get(2, 90)
    first = desk.wait(3, 95, "a")
    held = desk.get(4, 200, "b")
    second, third = desk.wait(5, 150, "b"), desk.wait(6, 50, "b")
    with pytest.raises(ArenaExhausted):
        desk.get(2, 10, "a")
    desk.free(held)
    assert desk.woken == [5, 6]
    for client, ticket in ((5, second), (6, third)):
        got = desk.collect(client, ticket)
        assert got is not None
        assert got.place.area.name == "b"
    assert desk.collect(3, first) is None


def test_a_small_one_is_put_where_it_does_not_delay(desk: Desk) -> None:
    """The best fit is in the way of the first in line, the next best is not."""
    desk.get(2, 90, "a")
    desk.get(2, 150, "b")
    desk.wait(3, 100, "a")
    got = desk.get(4, 10, None)
    assert got.place.area.name == "b", "although 10 pages are free in `a`"


def test_who_stands_behind_passes_as_well(desk: Desk) -> None:
    low, middle, high = desk.get(2, 50), desk.get(2, 40), desk.get(2, 10)
    first, second, third = desk.wait(3, 90), desk.wait(4, 20), desk.wait(5, 10)
    desk.free(high)
    assert desk.woken == [5], (
        "10 pages above those that the first waits for: of no use to it, and too few for the second"
    )
    desk.free(middle)
    assert desk.woken == [5], "the second would be in its way"
    desk.free(low)
    assert desk.woken == [5, 3]
    assert desk.collect(4, second) is None
    assert desk.collect(3, first) is not None
    assert desk.collect(5, third) is not None


def test_in_an_area_with_a_share_nobody_passes_who_could_use_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(private_bare({"a": AreaSpec(100 * PAGE, share=50)}))
    monkeypatch.setattr(line_module, "time", desk)
    held = desk.get(2, 40)
    first = desk.wait(3, 20)
    with pytest.raises(ArenaExhausted, match="wait in line"):
        desk.get(4, 10)
    desk.free(held)
    assert desk.collect(3, first) is not None


def test_in_an_area_with_a_share_who_leaves_enough_of_it_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(private_bare({"a": AreaSpec(100 * PAGE, share=80)}))
    monkeypatch.setattr(line_module, "time", desk)
    low, high = desk.get(2, 10, offset=0), desk.get(2, 10, offset=50)
    first = desk.wait(3, 50)  # 40 and 40 are free, and 60 of the share
    with pytest.raises(ArenaExhausted, match="wait in line"):
        desk.get(4, 11, offset=89)
    assert desk.get(4, 10).place.offset >= 60, "whichever of the two goes, 50 are free below it"
    desk.free(high)
    assert desk.collect(3, first) is not None
    desk.free(low)


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


# --- leaving the line


def test_a_ticket_is_its_clients_and_good_for_once(desk: Desk) -> None:
    held = desk.get(2, 100)
    ticket = desk.wait(3, 100)
    for client, number in ((4, ticket), (3, ticket + 1), (3, 1 << 40)):
        with pytest.raises(NoSuchBuffer):
            desk.collect(client, number)
        with pytest.raises(NoSuchBuffer):
            desk.collect(client, number, give_up=True)
    desk.free(held)
    with pytest.raises(NoSuchBuffer):
        desk.collect(4, ticket)
    assert desk.collect(3, ticket) is not None
    with pytest.raises(NoSuchBuffer):
        desk.collect(3, ticket)


def test_who_gives_up_makes_way(desk: Desk) -> None:
    desk.get(2, 95)
    first, second = desk.wait(3, 100), desk.wait(4, 5)
    with pytest.raises(ArenaExhausted):
        desk.collect(3, first, give_up=True)
    assert desk.woken == [4]
    assert desk.collect(4, second) is not None
    with pytest.raises(NoSuchBuffer):
        desk.collect(3, first)


def test_who_gives_up_too_late_has_it(desk: Desk) -> None:
    held = desk.get(2, 100)
    ticket = desk.wait(3, 100)
    desk.free(held)
    got = desk.collect(3, ticket, give_up=True)
    assert got is not None
    assert got.holders == {3}


def test_the_dead_leave_the_line(desk: Desk) -> None:
    held = desk.get(2, 95)
    desk.wait(3, 100)
    second = desk.wait(4, 5)
    desk.wait(3, 50)
    desk.die(3)
    assert desk.woken == [4]
    assert desk.collect(4, second) is not None
    assert len(desk.line) == 0
    ticket = desk.wait(5, 50)
    desk.free(held)
    assert desk.line.uncollected(5) != []
    desk.die(5)
    assert desk.line.uncollected(5) == []
    with pytest.raises(NoSuchBuffer):
        desk.collect(5, ticket)
    desk.get(6, 95)


def test_a_death_serves_who_waits(desk: Desk) -> None:
    desk.get(2, 60)
    desk.get(2, 40)
    ticket = desk.wait(3, 100)
    desk.die(2)
    assert desk.woken == [3]
    assert desk.collect(3, ticket) is not None


# --- what happens meanwhile


def test_a_quota_that_was_used_up_meanwhile(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(bare, quota=110 * PAGE)
    monkeypatch.setattr(line_module, "time", desk)
    held = desk.get(2, 100)
    first, second = desk.wait(3, 100), desk.wait(4, 100)
    desk.get(3, 20, "b")
    desk.free(held)
    assert desk.woken == [3, 4], "the one behind does not wait for the refused one's memory"
    with pytest.raises(QuotaExceeded):
        desk.collect(3, first)
    assert desk.collect(4, second) is not None
    assert desk.allocations.holders.held_bytes(3) == 20 * PAGE


def test_a_name_that_was_taken_meanwhile(desk: Desk) -> None:
    held = desk.get(2, 100)
    first, second = (desk.ask(client, 50, name="x") for client in (3, 4))
    assert isinstance(first, int)
    assert isinstance(second, int)
    desk.free(held)
    got = desk.collect(3, first)
    assert got is not None
    assert got.name == "x"
    with pytest.raises(BufferExists):
        desk.collect(4, second)
    desk.get(5, 50)


def test_a_drained_area_serves_nobody_until_it_is_resumed(desk: Desk) -> None:
    held = desk.get(2, 100)
    first = desk.wait(3, 100)
    desk.allocations.drain("a")
    desk.advance()
    desk.free(held)
    assert desk.collect(3, first) is None
    with pytest.raises(ArenaExhausted, match="drained"):
        desk.get(4, 1)
    second = desk.wait(4, 1)
    desk.allocations.resume("a")
    desk.advance()
    assert desk.woken == [3]
    assert desk.collect(3, first) is not None
    assert desk.collect(4, second) is None


def test_an_area_that_shrinks_below_what_is_waited_for_ends_the_wait(desk: Desk) -> None:
    held = desk.get(2, 50)
    first, second = desk.wait(3, 100), desk.wait(4, 10)
    third = desk.ask(5, 100, None)
    assert isinstance(third, Allocation), "`b` has room"
    fourth = desk.ask(6, 150, None)
    assert isinstance(fourth, int)
    with pytest.raises(ArenaExhausted):
        desk.get(4, 10)
    desk.resize("a", 80)
    assert desk.woken == [3, 4], "the first can never be served, and the second does not wait for it any more"
    with pytest.raises(ArenaExhausted, match="could ever be had") as raised:
        desk.collect(3, first)
    assert raised.value.requested == 100 * PAGE
    assert desk.collect(4, second) is not None
    desk.come((6, fourth))
    desk.free(third)
    assert desk.collect(6, fourth) is not None, "`b` is as it was"
    with pytest.raises(ArenaExhausted, match="could ever be had"):
        desk.ask(3, 100)
    desk.free(held)
    desk.resize("a", 100)
    assert len(desk.line) == 0


def test_what_an_offset_or_a_part_makes_impossible_ends_too(desk: Desk) -> None:
    desk.allocations.resize("b", 190)
    desk.allocations.resize("a", 110)  # in a part of its own
    held = [desk.get(2, 100, "a"), desk.get(2, 10, "a")]
    there = desk.ask(3, 10, "a", offset=100)
    anywhere = desk.wait(4, 5, "a")
    assert isinstance(there, int)
    desk.free(held.pop())
    assert desk.collect(3, there) is not None
    assert desk.collect(4, anywhere) is None
    again = desk.ask(3, 10, "a", offset=100)
    assert isinstance(again, int)
    desk.allocations.free(3, next(iter(desk.allocations.holders.of(3))))
    desk.resize("a", 100)
    with pytest.raises(ArenaExhausted, match="could ever be had"):
        desk.collect(3, again)
    desk.come((4, anywhere))


def test_a_drained_area_is_waited_for(desk: Desk) -> None:
    """It may be resumed, unlike pages that have gone."""
    held = desk.get(2, 100)
    ticket = desk.wait(3, 100)
    desk.allocations.drain("a")
    desk.line.reconsider()
    desk.come((3, ticket))
    desk.free(held)
    desk.come((3, ticket))


def test_an_area_that_grows_serves_who_waits(desk: Desk) -> None:
    desk.resize("b", 100)
    desk.get(2, 60)
    ticket = desk.wait(3, 60)
    desk.resize("a", 110)
    assert desk.collect(3, ticket) is None
    desk.resize("a", 200)
    assert desk.collect(3, ticket) is not None


def test_a_hand_over_that_expires_serves_who_waits(desk: Desk) -> None:
    held = desk.get(2, 100)
    ticket = desk.wait(3, 100)
    desk.allocations.hand_over(2, held.number, 0)
    desk.free(held)
    assert desk.collect(3, ticket) is None
    desk.tick()
    assert desk.collect(3, ticket) is not None


# --- any order of it all


@dataclass
class Asked:
    """A request that waits, or was served and not collected."""

    client: int
    ticket: int
    wanted: Wanted
    deadline: float
    asked: float  # when its client last came for it; it may have been served since


class Machine(RuleBasedStateMachine):
    """Whatever happens, in any order: nobody in front could be served, every ticket has one end, and all comes back."""

    clients = st.integers(2, 6)
    which = st.integers(0, 1 << 10)

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(private_bare({"a": 40 * PAGE, "b": AreaSpec(80 * PAGE, align=4 * PAGE)}, 1 << 20), 120 * PAGE)
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(line_module, "time", self.desk)
        self.asked: list[Asked] = []
        self.held: list[tuple[int, Allocation]] = []
        self.woken: dict[int, int] = {}

    def _pages(self, client: int) -> int:
        return sum(allocation.place.pages for who, allocation in self.held if who == client)

    @rule(
        client=clients,
        pages=st.integers(1, 20) | st.integers(1, 70),
        area=st.sampled_from([None, "a", "b"]),
        timeout_s=st.sampled_from([0.0, 3.0, 5.0, 50.0, FOREVER_S]),
        kind=st.sampled_from([BUFFER, RESERVATION]),
        name=st.none() | st.none() | st.sampled_from("xy"),
    )
    def ask(self, client: int, pages: int, area: str | None, timeout_s: float, kind: int, name: str | None) -> None:
        try:
            got = self.desk.ask(client, pages, area, timeout_s, kind=kind, name=name)
        except (ArenaExhausted, BufferExists, QuotaExceeded):
            return
        if isinstance(got, Allocation):
            self.held.append((client, got))
        else:
            assert timeout_s > 0
            wanted = self.desk.line._waiting[got].wanted
            self.asked.append(Asked(client, got, wanted, self.desk.now + timeout_s, self.desk.now))

    @precondition(lambda self: self.held)
    @rule(which=which)
    def free(self, which: int) -> None:
        client, allocation = self.held.pop(which % len(self.held))
        self.desk.allocations.free(client, allocation.number)
        self.desk.advance()

    @precondition(lambda self: self.asked)
    @rule(which=which, give_up=st.booleans())
    def collect(self, which: int, give_up: bool) -> None:
        asked = self.asked[which % len(self.asked)]
        try:
            got = self.desk.collect(asked.client, asked.ticket, give_up)
        except (ArenaExhausted, QuotaExceeded, BufferExists):
            self.asked.remove(asked)
            return
        except NoSuchBuffer:
            assert self.desk.now >= asked.asked + ASKED_S
            self.asked.remove(asked)
            return
        if got is not None:
            assert got.holders == {asked.client}
            assert got.place.area in asked.wanted.areas
            assert got.place.pages == asked.wanted.pages
            self.held.append((asked.client, got))
            self.asked.remove(asked)
        else:
            assert not give_up
            assert self.desk.now < asked.deadline
            asked.asked = self.desk.now

    @rule(but_for=clients)
    def come(self, but_for: int) -> None:
        """As clients do once a second: all that wait, but for one."""
        for asked in list(self.asked):
            if asked.client != but_for and asked.ticket in self.desk.line._waiting:
                self.collect(self.asked.index(asked), False)

    @rule(client=clients)
    def die(self, client: int) -> None:
        self.held = [(who, allocation) for who, allocation in self.held if who != client]
        self.asked = [asked for asked in self.asked if asked.client != client]
        self.desk.die(client)
        assert self.desk.allocations.holders.of(client) == []

    @rule(seconds=st.sampled_from([0.0, 1.0, 2.0, 4.0, 5.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        self.desk.tick(seconds)
        for asked in self.asked:
            if asked.ticket in self.desk.line._waiting:
                assert self.desk.now < min(asked.deadline, asked.asked + ASKED_S)
        assert all(self.desk.now < served.asked + ASKED_S for served in self.desk.line._served.values())

    @rule(name=st.sampled_from("ab"), change=st.sampled_from(["drain", "resume", "resume"]))
    def drain_or_resume(self, name: str, change: str) -> None:
        getattr(self.desk.allocations, change)(name)
        self.desk.advance()

    @rule(name=st.sampled_from("ab"), pages=st.integers(1, 90))
    def resize(self, name: str, pages: int) -> None:
        with contextlib.suppress(ArenaExhausted):
            self.desk.resize(name, pages)

    def _waiting(self) -> Iterator[Wanted]:
        return (waiting.wanted for waiting in self.desk.line._waiting.values())

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        self.desk.check()
        front = next(self._waiting(), None)
        for wanted in self._waiting():
            assert front is not None
            if not set(front.areas) & set(wanted.areas) or wanted is front:
                assert self.desk.allocations.areas.find(wanted) is None

    @invariant()
    def nobody_waits_for_what_will_never_be(self) -> None:
        for wanted in self._waiting():
            assert any(wanted.pages <= part.pages for area in wanted.areas for part in area.parts)

    @invariant()
    def every_ticket_is_in_line_or_served(self) -> None:
        tickets = {asked.ticket for asked in self.asked if self.desk.now < asked.asked + ASKED_S}
        assert tickets <= self.desk.line._waiting.keys() | self.desk.line._served.keys()
        assert self.desk.line._waiting.keys() | self.desk.line._served.keys() <= {asked.ticket for asked in self.asked}
        assert len(self.desk.line) == len(self.desk.line._waiting)

    @invariant()
    def what_is_held_is_what_was_given(self) -> None:
        known: dict[int, set[int]] = {client: set(self.desk.line.uncollected(client)) for client in range(2, 7)}
        for client, allocation in self.held:
            known[client].add(allocation.number)
        for client in range(2, 7):
            assert set(self.desk.allocations.holders.of(client)) == known[client]

    def teardown(self) -> None:
        for client in range(2, 7):
            self.desk.die(client)
        assert len(self.desk.line) == 0
        arena = self.desk.bare.arena
        assert len(self.desk.allocations._table._free) == arena.geometry.allocations_max
        check_tables(memoryview(arena.memory), arena.geometry)
        self.patch.undo()


@pytest.mark.timeout(600)
def test_any_order_serves_them_all() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None))
