"""Buffers, names and quotas as the broker keeps them, on a real arena without a broker around it."""

from __future__ import annotations

import struct

import pytest

from gcma_shm import layout
from gcma_shm.areas import AreaSpec
from gcma_shm.broker import allocations as allocations_module
from gcma_shm.broker.allocations import Allocations
from gcma_shm.errors import ArenaExhausted, BufferExists, NoSuchArea, NoSuchBuffer, QuotaExceeded
from gcma_shm.layout import BUFFER, RESERVATION
from tests.books import PAGE, Worker, allocate, allocations_of, claim_word, client_plane, fork, reserve
from tests.conftest import Bare, private_bare
from tests.invariants import check_at_rest

# --- buffers


def test_rounded_up_to_pages_and_placed(allocations: Allocations, bare: Bare) -> None:
    for nbytes, pages in ((1, 1), (PAGE, 1), (PAGE + 1, 2), (10 * PAGE, 10)):
        allocation = allocate(allocations, 2, nbytes, "a")
        place = allocations.place(allocation)
        assert place["nbytes"] == pages * PAGE
        assert place["area"] == "a"
        assert place["first"] == bare.arena.areas[0].first + int(place["offset"])
        assert not {"name", "reservation"} & set(place)


def test_numbers_are_never_used_again(allocations: Allocations) -> None:
    seen = set()
    for n in range(200):
        allocation = allocate(allocations, 2, PAGE, kind=BUFFER if n % 3 else RESERVATION)
        assert allocation.number not in seen
        assert allocation.number > 0
        seen.add(allocation.number)
        allocations.free(2, allocation.number)
        with pytest.raises(NoSuchBuffer):
            allocations.free(2, allocation.number)
    allocations._check()


def test_without_an_area_the_best_fit(allocations: Allocations) -> None:
    assert allocations.place(allocate(allocations, 2, 50 * PAGE))["area"] == "a", "the smaller area is spent first"
    assert allocations.place(allocate(allocations, 2, 60 * PAGE))["area"] == "b"
    assert allocations.place(allocate(allocations, 2, 50 * PAGE))["area"] == "a"
    assert allocations.place(allocate(allocations, 2, PAGE))["area"] == "b"


def test_exactly_there(allocations: Allocations) -> None:
    allocation = allocate(allocations, 2, 10 * PAGE, "a", 33)
    assert allocations.place(allocation)["offset"] == 33
    for offset in (24, 33, 42):
        with pytest.raises(ArenaExhausted):
            allocate(allocations, 2, 10 * PAGE, "a", offset)
    allocate(allocations, 2, 10 * PAGE, "a", 23)
    allocate(allocations, 2, 10 * PAGE, "a", 43)
    for offset, area, match in ((91, "a", "has 100 pages"), (2**62, "a", "pages"), (0, None, "without area")):
        with pytest.raises(ValueError, match=match):
            allocate(allocations, 2, 10 * PAGE, area, offset)


def test_aligned(allocations: Allocations) -> None:
    allocate(allocations, 2, PAGE, "b", 0)
    for align in (1, 2, PAGE, 2 * PAGE, 16 * PAGE, 64 * PAGE):
        allocation = allocate(allocations, 2, PAGE, "b", None, align)
        assert int(allocations.place(allocation)["offset"]) * PAGE % align == 0
    for align in (3, PAGE + 1, 3 * PAGE):
        with pytest.raises(ValueError, match="power of two"):
            allocate(allocations, 2, PAGE, "b", None, align)
    with pytest.raises(ValueError, match="multiple of align"):
        allocate(allocations, 2, PAGE, "b", 9, 2 * PAGE)
    assert allocations.place(allocate(allocations, 2, PAGE, "a", None, 64 * PAGE))["offset"] == 0
    assert allocations.place(allocate(allocations, 2, PAGE, "a", None, 64 * PAGE))["offset"] == 64
    with pytest.raises(ArenaExhausted):
        allocate(allocations, 2, PAGE, "a", None, 64 * PAGE)
    for area, align in (("a", 128 * PAGE), (None, 256 * PAGE), ("b", 2**62)):
        with pytest.raises(ValueError, match="at most the area's size"):
            allocate(allocations, 2, PAGE, area, None, align)


def test_an_offset_is_a_multiple_of_what_the_area_is_aligned_to() -> None:
    allocations = allocations_of(private_bare({"a": AreaSpec(64 * PAGE, align=4 * PAGE)}))
    allocate(allocations, 2, PAGE, "a", 8)
    for offset in (1, 2, 9):
        with pytest.raises(ValueError, match="multiple of align, 4 pages"):
            allocate(allocations, 2, PAGE, "a", offset)
    allocate(allocations, 2, PAGE, None, 12)
    with pytest.raises(ValueError, match="multiple of align, 8 pages"):
        allocate(allocations, 2, PAGE, "a", 20, 8 * PAGE)


def test_exhausted_says_by_whom(allocations: Allocations) -> None:
    allocate(allocations, 2, 60 * PAGE, "a", 0)
    allocate(allocations, 3, 20 * PAGE, "a", 70)
    with pytest.raises(ArenaExhausted) as raised:
        allocate(allocations, 4, 11 * PAGE - 5, "a")
    error = raised.value
    assert (error.requested, error.largest_free) == (11 * PAGE, 10 * PAGE)
    assert error.holders == {2: 60 * PAGE, 3: 20 * PAGE}
    with pytest.raises(ArenaExhausted) as raised:
        allocate(allocations, 4, 2**62)
    assert raised.value.largest_free == 200 * PAGE
    allocations._check()
    allocate(allocations, 4, 10 * PAGE, "a")


def test_what_could_never_be_is_refused_before_it_waits(allocations: Allocations) -> None:
    allocations.resize("b", 180)
    allocations.resize("a", 120)  # 20 of them in a part of their own
    for pages, area, offset in ((101, "a", None), (2, "a", 99), (181, None, None)):
        wanted = allocations.wanted(pages * PAGE, area, offset)
        with pytest.raises(ArenaExhausted, match="more than could ever be had"):
            allocations.check(2, wanted, None)
    allocate(allocations, 2, 100 * PAGE, "a")
    allocations.check(2, allocations.wanted(100 * PAGE, "a"), None)  # guests may go
    allocations.drain("a")
    allocations.check(2, allocations.wanted(100 * PAGE, "a"), None)  # and it may be resumed


def test_more_than_a_share_is_never_had() -> None:
    allocations = allocations_of(private_bare({"a": AreaSpec(64 * PAGE, share=50)}))
    allocate(allocations, 2, 32 * PAGE)
    allocations.check(2, allocations.wanted(32 * PAGE), None)
    with pytest.raises(ArenaExhausted, match="more than could ever be had there: guests may have at most a 128 KiB"):
        allocations.check(2, allocations.wanted(33 * PAGE), None)


def test_no_such_area(allocations: Allocations) -> None:
    with pytest.raises(NoSuchArea, match="a, b"):
        allocate(allocations, 2, PAGE, "c")
    for change in (allocations.drain, allocations.resume, lambda name: allocations.resize(name, 5)):
        with pytest.raises(NoSuchArea, match="a, b"):
            change("c")


def test_only_a_holder_frees(allocations: Allocations) -> None:
    allocation = allocate(allocations, 2, PAGE)
    for client, number in ((3, allocation.number), (2, allocation.number + 1), (2, 0), (2, 2**63 - 1)):
        with pytest.raises(NoSuchBuffer):
            allocations.free(client, number)
    allocations.free(2, allocation.number)


def test_the_last_holder_frees(allocations: Allocations) -> None:
    allocation = allocate(allocations, 2, 100 * PAGE, "a")
    allocations.inherit(2, 3)
    allocations.inherit(3, 4)
    allocations.free(2, allocation.number)
    allocations._check()
    with pytest.raises(ArenaExhausted):
        allocate(allocations, 2, PAGE, "a")
    assert allocations.drop(3) == 0, "nothing is left of it"
    with pytest.raises(ArenaExhausted) as raised:
        allocate(allocations, 2, PAGE, "a")
    assert raised.value.holders == {4: 100 * PAGE}
    assert allocations.drop(4) == 0
    assert allocations.drop(4) == 0
    allocate(allocations, 2, 100 * PAGE, "a")


def test_the_dead_leave_bit_by_bit(allocations: Allocations, bare: Bare) -> None:
    """So many at a time, so that nobody waits until all of it is freed; and whatever it is."""
    kept = allocate(allocations, 3, PAGE)
    allocations.attach(2, kept.number)
    for n in range(9):
        allocate(allocations, 2, PAGE, kind=BUFFER if n % 3 else RESERVATION)
    given = allocate(allocations, 2, PAGE)
    allocations.hand_over(2, given.number, 50)
    allocations.free(2, given.number)
    for count, left in ((1, 10), (4, 6), (0, 6), (5, 1)):
        assert allocations.drop(2, count) == left
        assert len(allocations.holders.of(2)) == left
        assert allocations.holders.held_bytes(2) == left * PAGE
        allocations._check()
        check_at_rest(bare.arena.name)
    assert allocations.drop(2, 64) == 0
    assert allocations.drop(2, 64) == 0
    allocations._check()
    assert kept.holders == {3}
    assert given.known_to() == set(), "a handle of the dead holds on, at nobody's charge"
    assert given.handed_over


def test_what_a_client_does_not_know_of_is_freed(allocations: Allocations) -> None:
    """After a reply that never came, say."""
    kept = allocate(allocations, 2, PAGE)
    for _ in range(3):
        allocate(allocations, 2, PAGE)
    allocations.reconcile(2, [kept.number, 12345], [])
    allocations._check()
    assert allocations.holders.held_bytes(2) == PAGE
    allocations.free(2, kept.number)
    allocations.reconcile(2, [], [])
    assert allocations.drop(2) == 0


def test_what_its_client_never_learnt_of(allocations: Allocations) -> None:
    one, other = allocate(allocations, 2, PAGE), allocate(allocations, 2, PAGE)
    allocations.give_back(3, one)
    assert one.holders == {2}
    allocations.give_back(2, one)
    allocations.give_back(2, one)
    allocations._check()
    allocations.free(2, other.number)


def test_a_full_table_is_a_quota(allocations: Allocations, bare: Bare) -> None:
    held = [allocate(allocations, 2, PAGE) for _ in range(bare.arena.geometry.allocations_max)]
    with pytest.raises(QuotaExceeded, match=str(bare.arena.geometry.allocations_max)):
        allocate(allocations, 2, PAGE)
    allocations._check()
    allocations.free(2, held[5].number)
    allocate(allocations, 2, PAGE)


def test_the_table_in_the_arena_tells_it_all(allocations: Allocations, bare: Bare) -> None:
    """What a restarted broker will read."""
    wanted = allocations.wanted(5 * PAGE, "b", 3)
    place = allocations.areas.find(wanted)
    assert place is not None
    allocation = allocations.settle(7, 99, place, BUFFER, "é")
    allocations.inherit(7, 8)
    g = bare.arena.geometry
    at = g.allocation_at(allocation.index)
    state, first, pages, area, client, request, claim, deadline = struct.unpack_from("<8Q", bare.arena.memory, at)
    assert (state & 0xFF, state >> 8) == (BUFFER, allocation.generation)
    assert (first, pages, area) == (bare.arena.areas[1].first + 3, 5, 1)
    assert (client, request, claim & 0x1FFFF, deadline) == (7, 99, 0, 0)
    assert bare.arena.memory[at + 0x40 : at + 0x70] == "é".encode().ljust(48, b"\0")
    (bits,) = struct.unpack_from("<Q", bare.arena.memory, g.holders_at + allocation.index * g.holder_bytes)
    assert bits == 1 << 7 | 1 << 8
    check_at_rest(bare.arena.name)
    allocations.drop(7)
    allocations.drop(8)
    (state,) = struct.unpack_from("<Q", bare.arena.memory, at)
    assert (state & 0xFF, state >> 8) == (0, allocation.generation)
    again = allocate(allocations, 2, PAGE)
    assert (again.index, again.generation) == (allocation.index, allocation.generation + 1)
    assert bare.arena.memory[at + 0x40 : at + 0x70] == bytes(48), "a name that is another's"
    check_at_rest(bare.arena.name)


def test_areas_add_up(allocations: Allocations, bare: Bare) -> None:
    allocate(allocations, 2, 30 * PAGE, "a", 10)
    reserved = reserve(allocations, 2, 20 * PAGE, "b")
    a, b = allocations.describe()
    assert a == {
        "name": "a", "cache": True, "drained": False, "share": 100, "size": 100 * PAGE, "held": 30 * PAGE, "reserved": 0,
        "lent": 0, "free": 70 * PAGE, "largest_free": 60 * PAGE, "align": PAGE,
    }  # fmt: skip
    assert (b["size"], b["held"], b["reserved"], b["free"], b["largest_free"]) == (
        200 * PAGE, 0, 20 * PAGE, 200 * PAGE, 180 * PAGE,
    )  # fmt: skip
    worker = client_plane(bare, 2)
    word, span = worker.claim(reserved.index, reserved.generation << 8 | RESERVATION, reserved.place.first, 20)
    assert span is not None
    b = allocations.describe()[1]
    assert (b["held"], b["reserved"], b["free"], b["largest_free"]) == (
        20 * PAGE, 20 * PAGE, 180 * PAGE, 180 * PAGE,
    )  # fmt: skip
    assert worker.unclaim(reserved.index, word, reserved.place.first, 20)
    allocations.drain("b")
    b = allocations.describe()[1]
    assert (b["drained"], b["largest_free"], b["reserved"]) == (True, 0, 20 * PAGE)


# --- names


def test_a_name_is_one_allocations(allocations: Allocations) -> None:
    buffer = allocate(allocations, 2, PAGE, name="weights")
    reservation = reserve(allocations, 2, PAGE, name="scratch")
    for name in ("weights", "scratch"):
        for client in (2, 3):
            with pytest.raises(BufferExists, match=name):
                allocate(allocations, client, PAGE, name=name)
    assert allocations.attach_name(3, "weights") is buffer
    assert allocations.attach_name(3, "weights") is buffer, "as often as it likes"
    assert allocations.attach_name(3, "scratch") is reservation
    assert (buffer.holders, reservation.holders) == ({2, 3}, {2, 3})
    assert (allocations.place(buffer)["name"], allocations.place(reservation)["reservation"]) == ("weights", True)
    allocations._check()
    allocations.drop(2)
    assert allocations.attach_name(4, "weights") is buffer
    allocations.drop(3)
    with pytest.raises(NoSuchBuffer, match="scratch"):
        allocations.attach_name(4, "scratch")
    allocations.free(4, buffer.number)
    with pytest.raises(NoSuchBuffer):
        allocations.attach_name(4, "weights")
    allocate(allocations, 4, PAGE, name="weights")


@pytest.mark.parametrize("name", ["", "x" * 49, "é" * 25, "a\n", "\0"])
def test_names_refused(allocations: Allocations, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        allocate(allocations, 2, PAGE, name=name)
    with pytest.raises(NoSuchBuffer):
        allocations.attach_name(2, name)
    allocations._check()


def test_names_page_by_page(allocations: Allocations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocations_module, "NAMES_PAGE", 3)
    assert allocations.names() == ([], False)
    wanted = ["b", "a", "d", "c", "é", "a a", "z"]
    for name in wanted:
        allocate(allocations, 2, PAGE, name=name)
    allocate(allocations, 2, PAGE)
    allocations.attach_name(3, "c")
    found, after, more = [], "", True
    while more:
        page, more = allocations.names(after)
        assert 1 <= len(page) <= 3
        found += page
        after = page[-1]["name"]
    assert [told["name"] for told in found] == sorted(wanted)
    assert [told["holders"] for told in found if told["name"] in ("a", "c")] == [1, 2]
    assert allocations.names("é") == ([], False)


# --- quotas


def test_what_clients_may_hold(bare: Bare) -> None:
    allocations = allocations_of(bare, quota=10 * PAGE)
    held = allocate(allocations, 2, 9 * PAGE)
    for nbytes in (PAGE + 1, 2**60):
        with pytest.raises(QuotaExceeded, match="40 KiB"):
            allocate(allocations, 2, nbytes)
    allocations._check()
    reservation = reserve(allocations, 2, PAGE)
    with pytest.raises(QuotaExceeded):
        reserve(allocations, 2, 1)
    other = allocate(allocations, 3, 2 * PAGE, name="other")
    with pytest.raises(QuotaExceeded):
        allocations.attach(2, other.number)
    with pytest.raises(QuotaExceeded):
        allocations.attach_name(2, "other")
    assert other.holders == {3}
    allocations.free(2, reservation.number)
    allocations.attach(2, held.number)  # what it holds already does not count twice
    assert allocations.holders.held_bytes(2) == 9 * PAGE
    allocations.holders.set_quota(2, 11 * PAGE)
    allocations.attach(2, other.number)
    assert (allocations.holders.quota_of(2), allocations.holders.quota_of(3)) == (11 * PAGE, 10 * PAGE)
    allocations.holders.set_quota(2, None)
    allocate(allocations, 2, 50 * PAGE)
    allocations.holders.set_quota(3, 0)
    with pytest.raises(QuotaExceeded):
        allocate(allocations, 3, 1)
    allocations.drop(2)
    allocations.holders.forget(2)
    with pytest.raises(QuotaExceeded):
        allocate(allocations, 2, 11 * PAGE)
    allocations._check()


def test_a_fork_never_fails_for_a_quota(bare: Bare) -> None:
    allocations = allocations_of(bare, quota=10 * PAGE)
    allocations.holders.set_quota(2, 60 * PAGE)
    buffer = allocate(allocations, 2, 50 * PAGE)
    allocations.holders.set_quota(2, 20 * PAGE)
    fork(bare, allocations, 2, 3)
    assert buffer.holders == {2, 3}
    assert allocations.holders.held_bytes(3) == 50 * PAGE
    with pytest.raises(QuotaExceeded, match="80 KiB"):
        allocate(allocations, 3, 1)
    allocations.free(3, buffer.number)
    allocate(allocations, 3, 20 * PAGE)
    allocations._check()


def test_a_childs_quota_is_its_parents(bare: Bare) -> None:
    allocations = allocations_of(bare, quota=10 * PAGE)
    quota_of = allocations.holders.quota_of
    for quota in (None, 0, 30 * PAGE):
        allocations.holders.set_quota(2, quota)
        fork(bare, allocations, 2, 3)
        fork(bare, allocations, 3, 4)
        assert (quota_of(2), quota_of(3), quota_of(4)) == (quota, quota, quota)
    allocations.holders.set_quota(2, 5 * PAGE)
    assert quota_of(3) == 30 * PAGE, "as it was at the fork"
    allocations.holders.forget(3)
    allocations.holders.forget(2)
    fork(bare, allocations, 2, 3)
    assert quota_of(3) == 10 * PAGE
    assert quota_of(4) == 30 * PAGE


def test_a_quota_counts_a_claim_that_is_shared(bare: Bare) -> None:
    allocations = allocations_of(bare, quota=10 * PAGE)
    reservation = reserve(allocations, 2, 8 * PAGE)
    generation = Worker(bare, 2).claim(reservation) >> 17
    allocate(allocations, 3, 3 * PAGE)
    with pytest.raises(QuotaExceeded):
        allocations.attach(3, reservation.number, generation)
    assert not claim_word(bare, reservation) & layout.CLAIM_SHARED
    allocations.drop(3)
    allocations.attach(3, reservation.number, generation)
    allocations.attach(3, reservation.number)  # both, and counted once
    assert allocations.holders.held_bytes(3) == 8 * PAGE
    allocations.free_claim(3, reservation.number, generation)
    assert allocations.holders.held_bytes(3) == 8 * PAGE
    allocations.free(3, reservation.number)
    assert allocations.holders.held_bytes(3) == 0
    assert allocations.claims.is_claimed(reservation.index)
    allocations._check()


def test_the_arena_has_as_many_clients_as_bits(bare: Bare) -> None:
    assert bare.arena.geometry.holder_bytes * 8 > bare.arena.geometry.clients_max
    assert layout.ALLOCATION_NAME_AT + layout.NAME_BYTES <= layout.ALLOCATION_LENT_AT < layout.ALLOCATION_BYTES
