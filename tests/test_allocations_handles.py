"""Handles as the broker keeps them: what they hold, at whose charge, and until when."""

from __future__ import annotations

import pytest

from gcma_shm import layout
from gcma_shm.broker.allocations import HAND_OVER_MAX_S, HAND_OVERS_MAX, Allocations
from gcma_shm.errors import BufferExists, NoSuchBuffer, QuotaExceeded, StaleHandle
from tests.books import PAGE, Clock, Worker, allocate, allocations_of, reserve
from tests.conftest import Bare
from tests.invariants import check_at_rest


def test_attach_by_number(allocations: Allocations) -> None:
    buffer = allocate(allocations, 2, 10 * PAGE)
    assert allocations.attach(3, buffer.number) is buffer
    allocations._check()
    assert allocations.holders.held_bytes(3) == 10 * PAGE
    allocations.drop(2)
    assert allocations.attach(3, buffer.number) is buffer
    allocations.free(3, buffer.number)
    for number in (buffer.number, buffer.number + (1 << 16), 12345):
        with pytest.raises(StaleHandle):
            allocations.attach(4, number)
    again = allocate(allocations, 2, PAGE)
    assert again.index == buffer.index
    with pytest.raises(StaleHandle):
        allocations.attach(4, buffer.number)
    allocations._check()


def test_a_handle_holds_it_until_somebody_attaches(allocations: Allocations, bare: Bare, clock: Clock) -> None:
    buffer = allocate(allocations, 2, 10 * PAGE, name="x")
    at = bare.arena.geometry.allocation_at(buffer.index) + layout.ALLOCATION_DEADLINE_AT
    first, second = allocations.hand_over(2, buffer.number, 5), allocations.hand_over(2, buffer.number, 30)
    assert first != second
    assert bare.plane.read(at) == (clock.now + 30) * 10**9
    allocations.free(2, buffer.number)
    allocations._check()
    check_at_rest(bare.arena.name)
    with pytest.raises(BufferExists):
        allocate(allocations, 2, PAGE, name="x")
    allocations.attach(3, buffer.number, token=second)
    assert bare.plane.read(at) == (clock.now + 5) * 10**9
    allocations.attach(3, buffer.number, token=second)  # a token that is over is none
    allocations.attach(3, buffer.number, token=first)
    assert bare.plane.read(at) == 0
    assert buffer.holders == {3}
    allocations._check()
    allocations.free(3, buffer.number)
    with pytest.raises(StaleHandle):
        allocations.attach(4, buffer.number, token=first)


def test_a_handle_that_nobody_takes_expires(allocations: Allocations, clock: Clock) -> None:
    buffer, other = allocate(allocations, 2, 10 * PAGE), allocate(allocations, 2, PAGE)
    freed: list[float] = []
    allocations.when_freed = lambda: freed.append(clock.now)
    allocations.hand_over(2, buffer.number, 5)
    late = allocations.hand_over(2, buffer.number, 10)
    allocations.hand_over(2, other.number, 5)
    allocations.free(2, buffer.number)
    for seconds in (4.5, 1, 4):
        allocations.expire()
        allocations._check()
        assert buffer.handed_over
        clock.now += seconds
    assert not freed
    assert list(buffer.handed_over) == [late]
    clock.now += 1
    allocations.expire()
    assert freed == [clock.now]
    with pytest.raises(StaleHandle):
        allocations.attach(3, buffer.number, token=late)
    allocations.expire()
    assert other.holders == {2}, "a handle that expires takes nothing from who holds it"
    allocations._check()


def test_who_may_hand_over_and_how_often(allocations: Allocations) -> None:
    buffer = allocate(allocations, 2, PAGE)
    for client, number in ((3, buffer.number), (2, buffer.number + 1), (2, 0)):
        with pytest.raises(NoSuchBuffer):
            allocations.hand_over(client, number, 5)
    tokens = [allocations.hand_over(2, buffer.number, 5) for _ in range(HAND_OVERS_MAX)]
    assert len(set(tokens)) == HAND_OVERS_MAX
    with pytest.raises(QuotaExceeded, match=str(HAND_OVERS_MAX)):
        allocations.hand_over(2, buffer.number, 5)
    allocations._check()
    allocations.attach(3, buffer.number, token=tokens[0])
    allocations.hand_over(3, buffer.number, 5)
    other = allocate(allocations, 2, PAGE)
    allocations.attach(3, other.number, token=tokens[1])
    assert tokens[1] in buffer.handed_over, "a token of another allocation ends nothing"


def test_tokens_are_not_to_be_guessed(allocations: Allocations) -> None:
    buffer = allocate(allocations, 2, PAGE)
    tokens = [allocations.hand_over(2, buffer.number, 5) for _ in range(64)]
    assert all(0 < token < 1 << 63 for token in tokens)
    assert len(set(tokens)) == 64
    assert len({token >> 40 for token in tokens}) > 32, "in a row"
    assert sorted(tokens) != tokens


def test_nothing_is_under_way_for_ever(allocations: Allocations, bare: Bare, clock: Clock) -> None:
    buffer = allocate(allocations, 2, PAGE)
    at = bare.arena.geometry.allocation_at(buffer.index) + layout.ALLOCATION_DEADLINE_AT
    for timeout_s in (1e30, float("inf"), HAND_OVER_MAX_S + 1):
        allocations.hand_over(2, buffer.number, timeout_s)
        assert bare.plane.read(at) == (clock.now + HAND_OVER_MAX_S) * 10**9
    allocations.free(2, buffer.number)
    clock.now += HAND_OVER_MAX_S - 1
    allocations.expire()
    assert len(buffer.handed_over) == 3
    clock.now += 1
    allocations.expire()
    with pytest.raises(StaleHandle):
        allocations.attach(2, buffer.number)
    allocations._check()


@pytest.mark.parametrize("ends", ["attached", "attached by the giver", "expires", "giver dies"])
def test_who_hands_over_is_charged_until_it_has_arrived(bare: Bare, clock: Clock, ends: str) -> None:
    allocations = allocations_of(bare, quota=10 * PAGE)
    buffer = allocate(allocations, 2, 8 * PAGE, "a")
    token, other = allocations.hand_over(2, buffer.number, 5), allocations.hand_over(2, buffer.number, 9)
    allocations.free(2, buffer.number)
    assert (buffer.holders, buffer.known_to()) == (set(), {2})
    assert {one.giver for one in buffer.handed_over.values()} == {2}
    for _ in range(2):
        assert allocations.holders.held_bytes(2) == 8 * PAGE
        assert allocations.holders.in_areas(["a"])[2] == 8 * PAGE
        check_at_rest(bare.arena.name)
        with pytest.raises(QuotaExceeded):
            allocate(allocations, 2, 3 * PAGE)
        with pytest.raises(NoSuchBuffer):
            allocations.free(2, buffer.number)
        if ends == "attached":
            allocations.attach(3, buffer.number, token=token)
        elif ends == "attached by the giver":
            allocations.attach(2, buffer.number, token=token)
            allocations.free(2, buffer.number)
        elif ends == "expires":
            clock.now += 5
            allocations.expire()
        else:
            assert allocations.drop(2) == 0
            assert {one.giver for one in buffer.handed_over.values()} == {0}
            break
        allocations._check()
        token = other
    allocations._check()
    assert allocations.holders.held_bytes(2) == 0
    assert buffer.known_to() == ({3} if ends == "attached" else set())
    allocate(allocations, 2, 10 * PAGE)
    if ends == "giver dies":
        check_at_rest(bare.arena.name)
        allocations.attach(3, buffer.number, token=token)
        assert buffer.holders == {3}
        allocations.attach(3, buffer.number, token=other)
    if ends in ("expires", "attached by the giver"):
        with pytest.raises(StaleHandle):
            allocations.attach(3, buffer.number)
    allocations._check()
    check_at_rest(bare.arena.name)


def test_a_handle_whose_giver_has_died_expires_all_the_same(allocations: Allocations, clock: Clock) -> None:
    buffer = allocate(allocations, 2, PAGE)
    for timeout_s in (5, 9):
        allocations.hand_over(2, buffer.number, timeout_s)
    allocations.drop(2)
    clock.now += 5
    allocations.expire()
    allocations._check()
    assert len(buffer.handed_over) == 1
    clock.now += 5
    allocations.expire()
    allocations._check()
    with pytest.raises(StaleHandle):
        allocations.attach(2, buffer.number)


def test_a_handle_may_end_with_its_giver(allocations: Allocations, bare: Bare, clock: Clock) -> None:
    """As a task's result does: while the worker lives it waits for its pool for long, afterwards not."""
    buffer = allocate(allocations, 2, PAGE)
    at = bare.arena.geometry.allocation_at(buffer.index) + layout.ALLOCATION_DEADLINE_AT
    allocations.hand_over(2, buffer.number, 7200, after_end_s=60)
    assert bare.plane.read(at) == (clock.now + 60) * 10**9, "a broker that takes over will not know the giver"
    allocations.free(2, buffer.number)
    clock.now += 3600
    allocations.expire()
    token = allocations.hand_over(2, buffer.number, 7200, after_end_s=60)  # its giver may do so once more
    assert len(buffer.handed_over) == 2
    allocations.drop(2)
    assert bare.plane.read(at) == (clock.now + 60) * 10**9
    allocations._check()
    clock.now += 59
    allocations.expire()
    allocations.attach(3, buffer.number, token=token)
    assert len(buffer.handed_over) == 1
    clock.now += 1
    allocations.expire()
    assert (buffer.holders, buffer.handed_over, bare.plane.read(at)) == ({3}, {}, 0)
    allocations._check()
    check_at_rest(bare.arena.name)


def test_a_handle_does_not_outlast_its_time_with_its_giver(allocations: Allocations, clock: Clock) -> None:
    buffer = allocate(allocations, 2, PAGE)
    allocations.hand_over(2, buffer.number, 5, after_end_s=60)
    allocations.hand_over(2, buffer.number, 9, after_end_s=0)
    allocations.drop(2)
    allocations.expire()
    assert len(buffer.handed_over) == 1, "the second ends with him"
    clock.now += 5
    allocations.expire()
    with pytest.raises(StaleHandle):
        allocations.attach(3, buffer.number)
    allocations._check()


def test_a_handle_is_of_a_claim_or_of_a_reservation(allocations: Allocations, bare: Bare, clock: Clock) -> None:
    """Taken for the other, it would end what still holds the claim, or leave nobody who holds the reservation."""
    reservation = reserve(allocations, 2, PAGE)
    generation = Worker(bare, 2).claim(reservation) >> 17
    of_claim = allocations.hand_over(2, reservation.number, 5, generation)
    of_itself = allocations.hand_over(2, reservation.number, 5)
    for claim, token in ((0, of_claim), (generation + 1, of_claim), (generation, of_itself)):
        with pytest.raises(StaleHandle, match="another claim"):
            allocations.attach(3, reservation.number, claim, token)
        allocations._check()
    assert list(reservation.handed_over) == [of_claim, of_itself]
    assert (reservation.holders, reservation.claimers) == ({2}, {2})
    allocations.attach(3, reservation.number, generation, of_claim)
    allocations.attach(4, reservation.number, 0, of_itself)
    assert (reservation.holders, reservation.claimers) == ({2, 4}, {2, 3})
    allocations._check()


def test_a_claim_is_handed_over_and_outlives_who_made_it(allocations: Allocations, bare: Bare, clock: Clock) -> None:
    reservation = reserve(allocations, 2, 10 * PAGE)
    allocations.attach(5, reservation.number)
    worker = Worker(bare, 2)
    word = worker.claim(reservation)
    generation = word >> 17
    token = allocations.hand_over(2, reservation.number, 5, generation)
    assert not worker.lend(reservation, word), "it is shared with the handle"
    with pytest.raises(StaleHandle):
        allocations.hand_over(2, reservation.number, 5, generation + 1)
    allocations.drop(2)
    assert allocations.claims.is_claimed(reservation.index)
    check_at_rest(bare.arena.name)
    allocations.attach(3, reservation.number, generation, token)
    assert (reservation.claimers, reservation.holders) == ({3}, {5})
    assert allocations.holders.held_bytes(3) == 10 * PAGE
    clock.now += 10
    allocations.expire()
    assert allocations.claims.is_claimed(reservation.index)
    allocations.free_claim(3, reservation.number, generation)
    assert not allocations.claims.is_claimed(reservation.index)
    assert allocations.holders.held_bytes(3) == 0
    with pytest.raises(StaleHandle):
        allocations.attach(3, reservation.number, generation)
    allocations._check()
    check_at_rest(bare.arena.name)


def test_a_handed_over_claim_that_nobody_takes_is_lent(allocations: Allocations, bare: Bare, clock: Clock) -> None:
    reservation = reserve(allocations, 2, 10 * PAGE)
    worker = Worker(bare, 2)
    generation = worker.claim(reservation) >> 17
    allocations.hand_over(2, reservation.number, 5, generation)
    allocations.hand_over(2, reservation.number, 50)
    allocations.free_claim(2, reservation.number, generation)
    assert allocations.claims.is_claimed(reservation.index)
    allocations.free(2, reservation.number)
    clock.now += 6
    allocations.expire()
    assert not allocations.claims.is_claimed(reservation.index)
    allocations._check()
    assert reservation.handed_over, "the reservation itself is still under way"
    clock.now += 50
    allocations.expire()
    with pytest.raises(StaleHandle):
        worker.claim(reservation)
    allocations._check()
    check_at_rest(bare.arena.name)
