"""Reservations in the extension: claimed, shared, lent again, and what cache they hold meanwhile."""

from __future__ import annotations

import struct

import pytest

from gcma_shm import layout
from gcma_shm.errors import Closed
from tests.conftest import Bare
from tests.core import client, counts, declared, life
from tests.invariants import check_at_rest

RESERVED = 9 << 8 | layout.RESERVATION  # the state word of the entry below


def reserved(bare: Bare, index: int = 3, pages: int = 50) -> tuple[int, int]:
    """An entry of the table as the broker writes it, in the middle of the first area; its pages."""
    g, first = bare.arena.geometry, bare.arena.areas[0].first + 20
    at = g.allocation_at(index)
    for offset, value in (
        (layout.ALLOCATION_FIRST_AT, first),
        (layout.ALLOCATION_PAGES_AT, pages),
        (layout.ALLOCATION_CLAIM_AT, 5 << 17),
        (layout.ALLOCATION_STATE_AT, RESERVED),
    ):
        bare.plane.write(at + offset, value)
    bare.plane.write(g.holders_at + index * g.holder_bytes, 1 << 2)
    bare.plane.entries_used(index + 1)
    bare.plane.give(0, first, pages, index + 1)
    return first, pages


def test_a_claim_is_one_clients_until_it_lends(bare: Bare) -> None:
    first, pages = reserved(bare)
    two, three = client(bare, 2), client(bare, 3)
    for wrong in (RESERVED + 256, RESERVED & ~255 | layout.BUFFER, RESERVED & ~255, 0):
        assert two.claim(3, wrong, first, pages) == (0, None), "another reservation"
    word, span = two.claim(3, RESERVED, first, pages)
    assert word == 6 << 17 | 2
    assert span is not None
    assert span.nbytes == pages * 4096
    assert two.claim_settled(first, pages, 0)
    for plane in (two, three):
        assert plane.claim(3, RESERVED, first, pages) == (word, None)
        assert not three.unclaim(3, word + 1, first, pages)
    assert {life(bare, page)[1:] for page in range(first, first + pages)} == {(4, 1)}
    assert two.unclaim(3, word, first, pages)
    assert {life(bare, page) for page in range(first, first + pages)} == {(0, 4, 2)}
    assert not two.unclaim(3, word, first, pages), "once"
    again, span = three.claim(3, RESERVED, first, pages)
    assert again == 8 << 17 | 3
    assert three.yield_claim(3, again)
    assert not three.yield_claim(3, again)
    assert life(bare, first)[2] == 2, "nothing was written there"
    del span
    check_at_rest(bare.arena.name)


def test_a_shared_claim_is_lent_by_nobody_alone(bare: Bare) -> None:
    first, pages = reserved(bare)
    two = client(bare, 2)
    word, _ = two.claim(3, RESERVED, first, pages)
    assert two.share_claim(3, word)
    assert not two.share_claim(3, word)
    assert not two.unclaim(3, word, first, pages)
    assert not two.yield_claim(3, word)
    shared = word | layout.CLAIM_SHARED
    assert bare.plane.seize(3, word) == 0
    seized = bare.plane.seize(3, shared)
    assert seized == (word >> 17) + 1 << 17 | layout.BROKER
    assert two.claim(3, RESERVED, first, pages) == (seized, None)
    assert two.seize(3, seized) == (word >> 17) + 2 << 17 | 2, "from a broker that has died"


def test_a_claim_waits_for_the_page_that_is_being_filled(bare: Bare) -> None:
    first, pages = reserved(bare)
    two = client(bare, 2)
    for page, settled in ((first - 1, True), (first, False), (first + pages - 1, False), (first + pages, True)):
        bare.plane.write(layout.FILLING_AT, page + 1)
        assert two.claim_settled(first, pages, 0.001) == settled
    bare.plane.write(layout.FILLING_AT, 0)


@pytest.mark.parametrize(
    ("index", "first", "pages"), [(2**40, 0, 1), (64, 0, 1), (3, -1, 1), (3, 0, 0), (3, 250, 51), (3, 0, 2**63)]
)
def test_entries_and_pages_that_are_none(bare: Bare, index: int, first: int, pages: int) -> None:
    """`first`: from the first page behind the nursery."""
    assert bare.arena.geometry.allocations_max == 64
    first += bare.arena.geometry.nursery_pages
    with pytest.raises(IndexError):
        bare.plane.claim(index, RESERVED, first, pages)
    with pytest.raises(IndexError):
        bare.plane.unclaim(index, 0, first, pages)
    if index == 3:
        with pytest.raises(IndexError):
            bare.plane.claim_settled(first, pages, 0)
        return
    for call in (bare.plane.seize, bare.plane.share_claim, bare.plane.yield_claim):
        with pytest.raises(IndexError):
            call(index, 0)


def test_a_closed_plane_claims_nothing(bare: Bare) -> None:
    first, pages = reserved(bare)
    two = client(bare, 2)
    assert two.close(1.0)
    with pytest.raises(Closed):
        two.claim(3, RESERVED, first, pages)


def test_a_reservation_holds_cache_until_it_is_claimed(bare: Bare) -> None:
    """Its cache is gone the moment that it is claimed, heals when it is read, and is counted in its entry."""
    first, pages = reserved(bare)
    g, two, swap = bare.arena.geometry, client(bare, 2), declared(bare, slots=600)
    at_lent = g.allocation_at(3) + layout.ALLOCATION_LENT_AT
    for n in range(600):
        swap.store(n, struct.pack("<Q", n + 1) * 512)
        bare.plane.sweep(0)
    assert bare.plane.read(at_lent) == pages
    assert {life(bare, page)[:2] for page in range(first, first + pages)} == {(2, 4)}
    own = sum(bare.plane.read(g.area_at(index) + layout.AREA_LENT_AT) for index in range(2))
    assert own == 300 - pages
    check_at_rest(bare.arena.name, bare.spill_dir)
    word, span = two.claim(3, RESERVED, first, pages)
    assert span is not None
    assert two.claim_settled(first, pages, 0)
    memoryview(span)[:] = b"\xbb" * pages * 4096
    check_at_rest(bare.arena.name, bare.spill_dir)
    for n in range(600):
        assert swap.load(n) == struct.pack("<Q", n + 1) * 512
        bare.plane.sweep(0)
    assert counts(bare)["heals"] >= pages
    assert bytes(memoryview(span)) == b"\xbb" * pages * 4096, "nobody wrote there"
    assert two.unclaim(3, word, first, pages)
    assert bare.plane.read(at_lent) == 0
    for _ in range(3):
        for n in range(600):
            assert swap.load(n) == struct.pack("<Q", n + 1) * 512
            swap.store(n, struct.pack("<Q", n + 1) * 512)
            bare.plane.sweep(0)
    assert bare.plane.read(at_lent) > 0, "the cache has it again"
    check_at_rest(bare.arena.name, bare.spill_dir)
