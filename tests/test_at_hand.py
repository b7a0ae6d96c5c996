"""What the core does for a broker that must not wait: loads and stores of what is in memory, and batches as they travel."""

from __future__ import annotations

import os

import pytest

from gcma_shm import layout
from gcma_shm._core import Slots
from gcma_shm.errors import Closed
from gcma_shm.records import Records
from tests.conftest import Bare

PAGE = 4096


def counters(bare: Bare) -> dict[str, int]:
    return Records(bare.plane).counters(layout.BROKER)


def declare(bare: Bare, slots: int = 300, flags: int = layout.WRITE_BEHIND) -> Slots:
    life = bare.plane.read(bare.plane.geometry.type_at(3) + layout.TYPE_LIFE_AT) + 1
    (bare.spill_dir / f"003.{life}").touch(0o600)
    bare.plane.begin_type(3, 0, slots, flags)
    return bare.plane.slots(3, life, 5.0)


@pytest.fixture
def slots(bare: Bare) -> Slots:
    return declare(bare)


def evict_all(slots: Slots) -> None:
    """Pages leave the nursery for the file, as others take their place."""
    slots.sync()
    for n in range(100, 300):
        slots.store(n, os.urandom(PAGE))
    slots.sync()


def test_loads_of_what_is_in_memory(slots: Slots, bare: Bare) -> None:
    page = os.urandom(PAGE)
    slots.store(1, page)
    slots.store(2, bytes(PAGE))
    assert slots.load_at_hand(1) == page
    assert slots.load_at_hand(2) == bytes(PAGE)
    assert slots.load_at_hand(3) is None
    counted = counters(bare)
    assert (counted["hits_nursery"], counted["hits_zero"], counted["misses"]) == (1, 1, 1)


def test_what_is_in_the_file_alone_is_not_at_hand(slots: Slots, bare: Bare) -> None:
    pages = [os.urandom(PAGE) for _ in range(20)]
    for n, page in enumerate(pages):
        slots.store(n, page)
    evict_all(slots)
    before = counters(bare)["hits_spill"]
    at_hand = [slots.load_at_hand(n) for n in range(20)]
    assert counters(bare)["hits_spill"] == before, "no file was read"
    assert False in at_hand
    assert all(found is False or found == page for found, page in zip(at_hand, pages, strict=True))
    assert [slots.load(n) for n in range(20)] == pages


def test_stores_into_pages_at_hand_until_there_are_none(slots: Slots, bare: Bare) -> None:
    """Nobody sweeps here, so the nursery fills up; what was not stored leaves the old value."""
    nursery = bare.plane.geometry.nursery_pages
    pages = [os.urandom(PAGE) for _ in range(nursery + 20)]
    stored = [slots.store_at_hand(n, page) for n, page in enumerate(pages)]
    assert all(stored[: nursery // 2])
    assert not any(stored[nursery:])
    assert counters(bare)["cleaned"] == counters(bare)["direct_reclaims"] == 0, "no file was written"
    for n, (page, done) in enumerate(zip(pages, stored, strict=True)):
        assert slots.load(n) == (page if done else None)
    assert slots.store_at_hand(299, bytes(PAGE)), "zeros need no page"
    slots.store(299, pages[0])
    assert slots.load(299) == pages[0]


def test_a_store_that_is_written_through_is_never_at_hand(bare: Bare) -> None:
    through = declare(bare, flags=0)
    assert not through.store_at_hand(1, os.urandom(PAGE))
    assert not through.store_at_hand(1, bytes(PAGE))
    assert through.load(1) is None


def test_misuse_and_an_end_are_told_as_by_load_and_store(slots: Slots, bare: Bare) -> None:
    for offset in (-1, 300, 2**70):
        with pytest.raises(IndexError):
            slots.load_at_hand(offset)
        with pytest.raises(IndexError):
            slots.store_at_hand(offset, bytes(PAGE))
        with pytest.raises(IndexError):
            slots.load_batch([offset])
    with pytest.raises(ValueError):
        slots.store_at_hand(1, b"x")
    bare.plane.end_type(3, 0, 300)
    assert slots.load_at_hand(1) is False, "load tells why"
    assert slots.store_at_hand(1, os.urandom(PAGE)) is False
    with pytest.raises(Closed):
        slots.load_batch([1])
    slots.close()
    with pytest.raises(Closed):
        slots.load_at_hand(1)


def test_a_batch_for_a_message_has_the_pages_of_its_hits_alone(slots: Slots) -> None:
    pages = {n: os.urandom(PAGE) for n in (1, 4, 5, 9)}
    for n, page in pages.items():
        slots.store(n, page)
    for offsets in ([1, 4], [0, 1, 2, 4, 5, 5, 8, 9], [0, 2, 3], [9], []):
        hits, found = slots.load_batch(offsets)
        assert hits == bytes(n in pages for n in offsets)
        assert found == b"".join(pages[n] for n in offsets if n in pages)
