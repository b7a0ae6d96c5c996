"""Reservations and their claims as the broker keeps them: lent, claimed, shared by a fork, ended with whoever had them."""

from __future__ import annotations

import pytest

from gcma_shm import layout
from gcma_shm.broker.allocations import Allocations
from gcma_shm.errors import ArenaExhausted, NoSuchBuffer, StaleHandle
from tests import invariants
from tests.books import PAGE, Clock, Worker, allocate, allocations_of, claim_word, fork, reserve, states
from tests.conftest import Bare, private_bare
from tests.invariants import check_at_rest, check_tables


def test_a_reservation_is_lent_and_its_pages_say_whose_they_are(allocations: Allocations, bare: Bare) -> None:
    reservation = reserve(allocations, 2, 10 * PAGE, "a")
    assert allocations.place(reservation)["reservation"] is True
    assert states(bare, reservation) == {(invariants.FREE, reservation.index + 1)}
    assert not allocations.claims.is_claimed(reservation.index)
    check_at_rest(bare.arena.name)
    worker = Worker(bare, 2)
    word = worker.claim(reservation)
    assert allocations.claims.is_claimed(reservation.index)
    check_at_rest(bare.arena.name)
    assert worker.lend(reservation, word)
    assert not allocations.claims.is_claimed(reservation.index)
    allocations.free(2, reservation.number)
    assert states(bare, reservation) == {(invariants.FREE, 0)}
    assert claim_word(bare, reservation) & 0xFFFF == layout.BROKER, "kept until the entry is used again"
    with pytest.raises(StaleHandle):
        worker.claim(reservation)
    check_at_rest(bare.arena.name)


def test_in_a_pure_reserve_a_reservation_is_lent_to_nobody() -> None:
    bare = private_bare({"a": "160K,cache=off"})
    allocations = allocations_of(bare)
    reservation = reserve(allocations, 2, 10 * PAGE)
    assert states(bare, reservation) == {(invariants.BUFFER, reservation.owner)}
    worker = Worker(bare, 2)
    assert worker.lend(reservation, worker.claim(reservation))
    assert states(bare, reservation) == {(invariants.BUFFER, reservation.owner)}
    check_tables(memoryview(bare.arena.memory), bare.arena.geometry)
    allocations.drop(2)
    assert states(bare, reservation) == {(invariants.BUFFER, 0)}
    check_tables(memoryview(bare.arena.memory), bare.arena.geometry)


def test_a_dead_claimers_range_is_lent_again_while_others_hold_it(allocations: Allocations, bare: Bare) -> None:
    reservation = reserve(allocations, 2, 10 * PAGE)
    allocations.attach(3, reservation.number)
    two, three = Worker(bare, 2), Worker(bare, 3)
    old = two.claim(reservation)
    assert not three.claim(reservation)
    allocations.drop(2)
    allocations._check()
    assert claim_word(bare, reservation) & 0x1FFFF == 0
    assert claim_word(bare, reservation) >> 17 == (old >> 17) + 2, "through the broker's hands"
    assert not two.lend(reservation, old), "whoever was taken for dead"
    assert three.claim(reservation)
    check_at_rest(bare.arena.name)
    allocations.drop(3)
    check_at_rest(bare.arena.name)


def test_the_last_holder_dies_with_a_claim(allocations: Allocations, bare: Bare) -> None:
    reservation = reserve(allocations, 2, 100 * PAGE, "a")
    worker = Worker(bare, 2)
    word = worker.claim(reservation)
    allocations.drop(2)
    assert not worker.lend(reservation, word)
    buffer = allocate(allocations, 3, 100 * PAGE, "a")
    assert states(bare, buffer) == {(invariants.BUFFER, buffer.owner)}
    check_at_rest(bare.arena.name)


def test_who_frees_a_reservation_gives_up_its_claim(allocations: Allocations, bare: Bare) -> None:
    reservation = reserve(allocations, 2, 10 * PAGE)
    allocations.inherit(2, 3)
    assert Worker(bare, 2).claim(reservation)
    allocations.free(2, reservation.number)
    assert not allocations.claims.is_claimed(reservation.index)
    assert Worker(bare, 3).claim(reservation)
    allocations._check()


def test_a_claim_that_a_fork_shares_ends_with_the_last_of_them(allocations: Allocations, bare: Bare) -> None:
    reservation = reserve(allocations, 2, 10 * PAGE)
    parent = Worker(bare, 2)
    word = parent.claim(reservation)
    assert parent.plane.share_claim(reservation.index, word)
    fork(bare, allocations, 2, 3)
    assert (reservation.claimers, reservation.holders) == ({2, 3}, {2, 3})
    assert not parent.lend(reservation, word), "it is not the parent's alone"
    generation = word >> 17
    allocations.free_claim(2, reservation.number, generation)
    assert allocations.claims.is_claimed(reservation.index)
    for client, claim in ((2, generation), (3, generation + 1), (4, generation)):
        with pytest.raises(NoSuchBuffer):
            allocations.free_claim(client, reservation.number, claim)
    check_at_rest(bare.arena.name)
    allocations.free_claim(3, reservation.number, generation)
    assert not allocations.claims.is_claimed(reservation.index)
    assert parent.claim(reservation)
    with pytest.raises(NoSuchBuffer):
        allocations.free_claim(2, reservation.number, (claim_word(bare, reservation) >> 17))
    allocations._check()
    check_at_rest(bare.arena.name)


@pytest.mark.parametrize("ends", ["dies", "frees", "frees the claim first"])
def test_sharers_that_end_one_by_one(allocations: Allocations, bare: Bare, ends: str) -> None:
    """The one that made the claim first: its number stays in the word, and means nobody."""
    reservation = reserve(allocations, 2, 10 * PAGE)
    allocations.attach(5, reservation.number)
    parent = Worker(bare, 2)
    word = parent.claim(reservation)
    parent.plane.share_claim(reservation.index, word)
    fork(bare, allocations, 2, 3)
    fork(bare, allocations, 3, 4)
    for client in (2, 4, 3):
        assert allocations.claims.is_claimed(reservation.index)
        if ends == "dies":
            allocations.drop(client)
        elif ends == "frees":
            allocations.free(client, reservation.number)
            assert client in reservation.claimers, "its part in the claim is another matter"
            assert allocations.claims.is_claimed(reservation.index)
            assert allocations.holders.held_bytes(client) == 10 * PAGE
            allocations._check()
            allocations.free_claim(client, reservation.number, word >> 17)
        else:
            allocations.free_claim(client, reservation.number, word >> 17)
            allocations.free(client, reservation.number)
        assert allocations.holders.held_bytes(client) == 0
        allocations._check()
    assert not allocations.claims.is_claimed(reservation.index)
    assert reservation.holders == {5}
    check_at_rest(bare.arena.name)


def test_a_reservation_that_all_have_freed_lives_as_long_as_its_claim(allocations: Allocations, bare: Bare) -> None:
    reservation = reserve(allocations, 2, 10 * PAGE)
    parent = Worker(bare, 2)
    word = parent.claim(reservation)
    parent.plane.share_claim(reservation.index, word)
    fork(bare, allocations, 2, 3)
    allocations.free(2, reservation.number)
    allocations.free(3, reservation.number)
    with pytest.raises(NoSuchBuffer):
        allocations.free(3, reservation.number)
    assert (reservation.holders, reservation.claimers) == (set(), {2, 3})
    assert claim_word(bare, reservation) == word | layout.CLAIM_SHARED
    check_at_rest(bare.arena.name)
    allocations.free_claim(3, reservation.number, word >> 17)
    assert allocations.drop(2) == 0
    with pytest.raises(StaleHandle):
        allocations.attach(4, reservation.number)
    allocations._check()
    check_at_rest(bare.arena.name)


def test_a_claim_that_was_marked_for_a_fork_that_failed_outlives_a_free(allocations: Allocations, bare: Bare) -> None:
    """No record was free for the child, so the broker was told of nothing: the mark alone says that it is shared."""
    reservation = reserve(allocations, 2, 10 * PAGE)
    allocations.attach(5, reservation.number)
    parent = Worker(bare, 2)
    parent.plane.share_claim(reservation.index, parent.claim(reservation))
    allocations.free(2, reservation.number)
    assert allocations.claims.is_claimed(reservation.index)
    allocations.drop(2)
    assert not allocations.claims.is_claimed(reservation.index), "else 5 could never claim it"


def test_another_ones_claim_outlives_a_free(allocations: Allocations, bare: Bare) -> None:
    reservation = reserve(allocations, 2, 10 * PAGE)
    allocations.attach(3, reservation.number)
    word = Worker(bare, 3).claim(reservation)
    allocations.free(2, reservation.number)
    assert claim_word(bare, reservation) == word
    allocations._check()


def test_a_child_shares_what_its_parent_had_claimed_and_not_what_it_claimed_since(
    allocations: Allocations, bare: Bare
) -> None:
    """The broker may look after several forks, between which the parent has claimed more."""
    early, late, never = (reserve(allocations, 2, PAGE) for _ in range(3))
    foreign = reserve(allocations, 5, PAGE)
    parent = Worker(bare, 2)
    assert parent.lend(never, parent.claim(never))
    words = [(early, parent.claim(early))]
    other = Worker(bare, 5).claim(foreign)
    allocations.attach(2, foreign.number, other >> 17)
    for child in (3, 4):
        for reservation, word in words:
            parent.plane.share_claim(reservation.index, word)
        fork(bare, allocations, 2, child, inherited=False)
        if child == 3:
            words.append((late, parent.claim(late)))
    alone = parent.claim(never)
    for child in (3, 4):
        allocations.inherit(2, child)
        allocations._check()
    assert early.claimers == {2, 3, 4}
    assert late.claimers == {2, 4}, "3 began before it was claimed"
    assert never.claimers == set()
    assert claim_word(bare, never) == alone, "it is the parent's alone"
    assert foreign.claimers == {5, 2, 3, 4}, "another's claim, in which the parent has a part"
    assert early.holders == late.holders == never.holders == {2, 3, 4}
    assert foreign.holders == {5}
    assert allocations.holders.held_bytes(3) == 4 * PAGE, "what it holds and claims is counted once"
    allocations.drop(2)
    allocations.free_claim(4, late.number, words[1][1] >> 17)
    assert not allocations.claims.is_claimed(late.index)
    assert not allocations.claims.is_claimed(never.index)
    assert allocations.claims.is_claimed(early.index)
    allocations._check()
    check_at_rest(bare.arena.name)


def test_a_child_does_not_hold_what_its_parent_has_not_fetched(allocations: Allocations, bare: Bare) -> None:
    held, not_fetched = allocate(allocations, 2, PAGE), allocate(allocations, 2, PAGE)
    fork(bare, allocations, 2, 3, but_for=[not_fetched.number])
    assert (held.holders, not_fetched.holders) == ({2, 3}, {2})
    fork(bare, allocations, 3, 4)
    allocations.drop(2)
    with pytest.raises(StaleHandle):
        allocations.attach(3, not_fetched.number)
    assert held.holders == {3, 4}
    allocations._check()


def test_a_new_client_of_a_dead_claimers_number_has_no_part_in_its_claim(allocations: Allocations, bare: Bare) -> None:
    reservation = reserve(allocations, 2, 10 * PAGE)
    parent = Worker(bare, 2)
    word = parent.claim(reservation)
    parent.plane.share_claim(reservation.index, word)
    fork(bare, allocations, 2, 3)
    allocations.drop(2)
    allocations.attach(2, reservation.number)  # the number is another process's now
    allocations.free(2, reservation.number)
    assert reservation.claimers == {3}
    allocations.attach(2, reservation.number)
    allocations.drop(2)
    assert reservation.claimers == {3}
    assert allocations.claims.is_claimed(reservation.index)
    allocations.attach(2, reservation.number, word >> 17)
    fork(bare, allocations, 2, 4)
    assert reservation.claimers == {2, 3, 4}, "that it has a part in what another made under its number counts as well"
    for client in (2, 3, 4):
        allocations.drop(client)
    allocations._check()


def test_hello_again_keeps_what_it_knows_of(allocations: Allocations, bare: Bare) -> None:
    """Claims that it made itself are no message's matter; parts in others' claims are."""
    own = reserve(allocations, 2, PAGE)
    assert Worker(bare, 2).claim(own)
    theirs = [reserve(allocations, 3, PAGE) for _ in range(2)]
    words = [Worker(bare, 3).claim(one) for one in theirs]
    for one, word in zip(theirs, words, strict=True):
        allocations.attach(2, one.number, word >> 17)
    allocations.reconcile(2, [own.number], [theirs[0].number])
    allocations._check()
    assert allocations.claims.is_claimed(own.index)
    assert [one.claimers for one in theirs] == [{2, 3}, {3}]
    allocations.reconcile(3, [], [one.number for one in theirs])
    assert [one.claimers for one in theirs] == [{2, 3}, {3}], "it made them"
    allocations._check()
    allocations.reconcile(2, [], [])
    assert own.holders == {2}, "it has claimed it a moment ago: it is about to know of it"
    assert allocations.claims.is_claimed(own.index)
    assert theirs[0].claimers == {3}
    assert Worker(bare, 2).lend(own, claim_word(bare, own))
    allocations.reconcile(2, [], [])
    with pytest.raises(StaleHandle):
        Worker(bare, 2).claim(own)
    allocations.drop(3)
    allocations._check()
    check_at_rest(bare.arena.name)


def test_hello_again_ends_a_claim_of_what_was_released(allocations: Allocations, bare: Bare) -> None:
    """A signal interrupted the claim, then the reservation was released, and the broker took the release with it."""
    lost, kept = (reserve(allocations, 2, PAGE) for _ in range(2))
    for one in (lost, kept):
        assert Worker(bare, 2).claim(one)
    made = allocations.claims.ordinal(kept)
    allocations.reconcile(2, [kept.number], [], made)
    assert (lost.holders, kept.holders) == (set(), {2})
    assert allocations.claims.is_claimed(kept.index), "it may find it yet"
    allocations._check()


def test_hello_again_and_a_claim_that_was_made_under_the_same_number(allocations: Allocations, bare: Bare) -> None:
    """By a client that has died, and whose claim others share."""
    reservation = reserve(allocations, 2, PAGE)
    parent = Worker(bare, 2)
    parent.plane.share_claim(reservation.index, parent.claim(reservation))
    fork(bare, allocations, 2, 3)
    allocations.drop(2)
    allocations.attach(2, reservation.number)  # its reply was lost
    allocations.reconcile(2, [], [])
    assert reservation.holders == {3}


def test_hello_again_leaves_what_is_under_way(allocations: Allocations, clock: Clock) -> None:
    buffer = allocate(allocations, 2, PAGE)
    token = allocations.hand_over(2, buffer.number, 5)
    allocations.reconcile(2, [], [])
    assert (buffer.holders, buffer.known_to()) == (set(), {2})
    allocations._check()
    assert allocations.attach(3, buffer.number, token=token) is buffer
    allocations._check()


def test_a_drained_area_keeps_its_promises(allocations: Allocations, bare: Bare) -> None:
    idle, claimed = reserve(allocations, 2, 10 * PAGE, "a"), reserve(allocations, 2, 10 * PAGE, "a")
    worker = Worker(bare, 2)
    word = worker.claim(claimed)
    allocations.drain("a")
    allocations._check()
    assert states(bare, idle) == {(invariants.BUFFER, idle.owner)}
    assert allocations.claims.is_claimed(claimed.index), "who has it is not disturbed"
    check_at_rest(bare.arena.name)
    assert worker.lend(idle, worker.claim(idle))
    assert states(bare, idle) == {(invariants.BUFFER, idle.owner)}
    assert worker.lend(claimed, word)
    assert states(bare, claimed) == {(invariants.BUFFER, claimed.owner)}, "lent as its area is now"
    check_at_rest(bare.arena.name)
    allocations.resume("a")
    for reservation in (idle, claimed):
        assert states(bare, reservation) == {(invariants.FREE, reservation.owner)}
    check_at_rest(bare.arena.name)
    with pytest.raises(ArenaExhausted):
        allocations.resize("a", 19)
    allocations.resize("a", 20)
    allocations.resize("a", 100)
    allocations.drop(2)
    check_at_rest(bare.arena.name)


@pytest.mark.parametrize("ends", ["lends", "dies", "shares"])
def test_what_was_claimed_when_its_area_changed_is_lent_as_the_area_is(
    allocations: Allocations, bare: Bare, ends: str
) -> None:
    reservation = reserve(allocations, 2, 10 * PAGE, "a")
    allocations.attach(3, reservation.number)
    worker = Worker(bare, 2)

    def end(word: int) -> None:
        if ends == "lends":
            assert worker.lend(reservation, word)
        elif ends == "dies":
            allocations.drop(2)
            allocations.attach(2, reservation.number)
        else:
            assert worker.plane.share_claim(reservation.index, word)
            assert not worker.lend(reservation, word)
            allocations.free_claim(2, reservation.number, word >> 17)
        allocations._check()

    for change, state in (
        (allocations.drain, invariants.BUFFER),
        (allocations.resume, invariants.FREE),
        (allocations.drain, invariants.BUFFER),
    ):
        word = worker.claim(reservation)
        change("a")
        end(word)
        assert states(bare, reservation) == {(state, reservation.owner)}
        check_at_rest(bare.arena.name)
    allocations.resume("a")
    word = worker.claim(reservation)
    allocations.drain("a")
    allocations.resume("a")
    end(word)
    assert states(bare, reservation) == {(invariants.FREE, reservation.owner)}
    check_at_rest(bare.arena.name)
