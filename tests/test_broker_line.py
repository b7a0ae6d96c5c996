"""The line of those who wait for memory: first come, first served, and who may pass."""

from __future__ import annotations

import pytest

from gcma_shm.areas import AreaSpec
from gcma_shm.broker import line as line_module
from gcma_shm.broker.table import Allocation
from gcma_shm.errors import ArenaExhausted, BufferExists, NoSuchBuffer, QuotaExceeded
from gcma_shm.layout import RESERVATION
from tests.conftest import Bare, private_bare
from tests.desk import FOREVER_S, PAGE, Desk

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
