"""Swap types in the extension: counters, patterns, sweeps, what files refuse, ends and deaths, and tables of any content."""

from __future__ import annotations

import errno
import os
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcma_shm import arena as arenas
from gcma_shm import layout
from gcma_shm._core import COUNTERS, Plane, Slots
from gcma_shm.errors import ArenaError, Closed, NurseryFull, SlotBusy, SpillCorrupt, SpillError
from gcma_shm.layout import Geometry
from tests.conftest import Bare
from tests.core import counts, declared, life, page_of
from tests.invariants import check_at_rest
from tests.processes import files_refuse_writes


def test_counters_tell_each_way_that_an_operation_went(bare: Bare) -> None:
    swap = declared(bare)
    swap.store(1, bytes(range(256)) * 16)
    swap.store(2, bytes(4096))
    assert counts(bare) == {"stores": 2, "stores_zero": 1, "cleaned": 1}
    swap.load(1)
    swap.load(2)
    swap.load(3)
    swap.invalidate_page(3)
    swap.invalidate_page(2)
    expected = {
        "stores": 2,
        "stores_zero": 1,
        "cleaned": 1,
        "hits_nursery": 1,
        "hits_zero": 1,
        "misses": 1,
        "invalidations": 1,
    }
    assert counts(bare) == expected
    assert set(expected) <= set(COUNTERS)
    swap.close()
    with pytest.raises(Closed):
        swap.load(1)


CACHED, FILLED = 1, 5


def slot(bare: Bare, number: int) -> tuple[int, bool, int]:
    """Of the word: state, whether it is dirty, payload."""
    word = bare.plane.read(bare.arena.geometry.slots_at + 16 * number)
    return word >> 33 & 7, bool(word >> 32 & 1), word & 0xFFFFFFFF


@pytest.mark.parametrize("pattern", [b"a", b"ab", b"abcd", b"\0\0\0\1", b"\0a"], ids=bytes.hex)
def test_a_pattern_of_up_to_four_bytes_takes_no_page(bare: Bare, pattern: bytes) -> None:
    swap = declared(bare)
    filled = pattern * (4096 // len(pattern))
    swap.store(1, filled)
    assert slot(bare, 1) == (FILLED, False, int.from_bytes(filled[:4], "little"))
    assert swap.load(1) == filled
    assert 1 in swap
    assert counts(bare) == {"stores": 1, "stores_filled": 1, "hits_filled": 1}
    assert all(life(bare, page)[0] == 0 for page in range(bare.arena.geometry.nursery_pages)), "no page was granted"


@pytest.mark.parametrize("at", [0, 1, 3, 4, 2048, 4091, 4092, 4095])
@pytest.mark.parametrize("pattern", [b"\0", b"a", b"ab", b"abcd"], ids=bytes.hex)
def test_a_byte_that_differs_takes_a_page(bare: Bare, pattern: bytes, at: int) -> None:
    swap = declared(bare)
    page = bytearray(pattern * (4096 // len(pattern)))
    page[at] ^= 0x80
    swap.store(1, page)
    assert slot(bare, 1)[0] == CACHED
    assert swap.load(1) == bytes(page)
    assert counts(bare) == {"stores": 1, "cleaned": 1, "hits_nursery": 1}


@pytest.mark.parametrize("unit", [b"abcdefgh", b"abc", b"abcdabce"], ids=bytes.hex)
def test_a_pattern_that_no_word_has_room_for_takes_a_page(bare: Bare, unit: bytes) -> None:
    """Also one whose first and last four bytes are the same."""
    swap = declared(bare)
    page = (unit * 4096)[:4092] + (unit + unit)[:4]
    swap.store(1, page)
    assert slot(bare, 1)[0] == CACHED
    assert swap.load(1) == page


def test_a_pattern_replaces_a_dirty_page_which_is_never_written(bare: Bare) -> None:
    swap = declared(bare, flags=layout.WRITE_BEHIND)
    swap.store(1, bytes(range(256)) * 16)
    swap.store(1, b"a" * 4096)
    assert swap.load(1) == b"a" * 4096
    swap.sync()
    assert counts(bare) == {"stores": 2, "stores_filled": 1, "overwrites_saved": 1, "hits_filled": 1}


def test_an_overwrite_of_a_dirty_page_costs_no_write(bare: Bare) -> None:
    swap = declared(bare, flags=layout.WRITE_BEHIND)
    for value in range(1, 6):
        swap.store(1, page_of(bytes([value])))
    assert counts(bare) == {"stores": 5, "overwrites_saved": 4}
    assert (bare.spill_dir / "000.1").read_bytes() == b""
    swap.sync()
    assert counts(bare)["cleaned"] == 1
    assert (bare.spill_dir / "000.1").read_bytes() == bytes(4096) + page_of(b"\5")


def test_the_sweep_promotes_and_evicts_and_loads_find_it_all(bare: Bare) -> None:
    """No thread sweeps here but this one, so every step of the way is known."""
    swap = declared(bare, slots=600)
    nursery = bare.arena.geometry.nursery_pages
    pages = {n: struct.pack("<Q", n + 1) * 512 for n in range(600)}
    for n in range(nursery):
        swap.store(n, pages[n])
    for _ in range(3):
        bare.plane.sweep(0)
    after = counts(bare)
    assert after["promotions"] >= nursery // 4, "there was room in the areas"
    assert "evictions" not in after
    for n in range(nursery, 600):
        swap.store(n, pages[n])
        bare.plane.sweep(0)
    for n, page in reversed(
        pages.items()
    ):  # what comes from the file takes the places of clean pages, as nobody sweeps
        assert swap.load(n) == page
    after = counts(bare)
    for name in ("hits_nursery", "hits_area", "hits_spill", "promotions", "evictions", "refaults"):
        assert after[name], f"no {name}"
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_without_a_sweep_stores_reclaim_for_themselves(bare: Bare) -> None:
    swap = declared(bare, slots=600)
    for n in range(600):
        swap.store(n, struct.pack("<Q", n + 1) * 512)
    after = counts(bare)
    assert after["direct_reclaims"] >= 600 - bare.arena.geometry.nursery_pages
    assert all(swap.load(n) == struct.pack("<Q", n + 1) * 512 for n in range(600))
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_a_buffer_over_cached_pages_leaves_them_in_the_file(bare: Bare) -> None:
    swap = declared(bare, slots=600)
    for n in range(600):
        swap.store(n, struct.pack("<Q", n + 1) * 512)
        bare.plane.sweep(0)
    lent = sum(bare.plane.read(bare.arena.geometry.area_at(i) + layout.AREA_LENT_AT) for i in range(2))
    assert lent > 200
    discards = 0
    for index, area in enumerate(bare.arena.areas):
        discards += bare.plane.take(index, area.first, area.pages)
        memoryview(bare.plane.span(area.first, area.pages * 4096))[:] = b"\xbb" * area.pages * 4096
    assert discards == lent
    assert all(swap.load(n) == struct.pack("<Q", n + 1) * 512 for n in range(600))
    assert counts(bare)["heals"] > 0
    for area in bare.arena.areas:
        assert bytes(memoryview(bare.plane.span(area.first, area.pages * 4096))) == b"\xbb" * area.pages * 4096
    for index, area in enumerate(bare.arena.areas):
        bare.plane.give(index, area.first, area.pages)
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_a_page_damaged_in_the_file_is_found(bare: Bare) -> None:
    swap = declared(bare, slots=600)
    for n in range(600):
        swap.store(n, struct.pack("<Q", n + 1) * 512)
    geometry = bare.arena.geometry
    spilled = [n for n in range(600) if bare.plane.read(geometry.slots_at + 16 * n) >> 33 & 7 == 2]
    with (bare.spill_dir / "000.1").open("r+b") as file:
        file.seek(spilled[0] * 4096 + 100)
        file.write(b"\xff")
    with pytest.raises(SpillCorrupt):
        swap.load(spilled[0])
    with pytest.raises(SpillCorrupt) as raised:
        swap.load_many([spilled[1], spilled[2], spilled[0]], bytearray(3 * 4096))
    assert raised.value.done == 2
    assert counts(bare)["refused_spill_corrupt"] == 2
    os.truncate(bare.spill_dir / "000.1", spilled[-1] * 4096 + 5)
    with pytest.raises(SpillCorrupt):
        swap.load(spilled[-1])
    swap.store(spilled[0], page_of(b"n"))
    assert swap.load(spilled[0]) == page_of(b"n"), "a new value heals the slot"


def test_a_nursery_of_pages_that_no_file_takes(bare: Bare) -> None:
    """Stores fail before they have changed anything, zeros go on, and all is well once the file takes pages again."""
    swap = declared(bare, slots=600, flags=layout.WRITE_BEHIND, timeout=0.0)
    nursery = bare.arena.geometry.nursery_pages * 15 // 16  # the last is for other types
    with files_refuse_writes(os.getpid()):
        for n in range(nursery):
            swap.store(n, struct.pack("<Q", n + 1) * 512)
        for n in (0, nursery):
            with pytest.raises(NurseryFull):
                swap.store(n, page_of(b"x"))
        assert swap.load(0) == struct.pack("<Q", 1) * 512
        assert swap.load(nursery) is None
        with pytest.raises(NurseryFull) as raised:
            swap.store_many([nursery + 1, nursery], bytes(4096) + page_of(b"x"))
        assert raised.value.done == 1
        assert swap.load(nursery + 1) == bytes(4096)
        assert swap.load(nursery) is None
        with pytest.raises(SpillError) as failed:
            swap.sync(0)
        assert failed.value.errno == errno.EFBIG
        assert counts(bare)["refused_nursery_full"] == 3
    swap.sync()
    swap.store(nursery, page_of(b"x"))
    assert all(swap.load(n) == struct.pack("<Q", n + 1) * 512 for n in range(nursery))
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_the_end_of_a_type_and_its_next_life(bare: Bare) -> None:
    old = declared(bare)
    old.store(1, page_of(b"a"))
    other = declared(bare, type_=1, base=100)
    other.store(1, page_of(b"b"))
    bare.plane.end_type(0, 0, 100)
    with pytest.raises(Closed):
        old.load(1)
    check_at_rest(bare.arena.name, bare.spill_dir)
    anew = declared(bare)
    assert (old.life, anew.life) == (1, 3)
    assert anew.load(1) is None
    with pytest.raises(Closed):
        old.store(1, page_of(b"c"))
    assert anew.load(1) is None
    assert other.load(1) == page_of(b"b")
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_bury_takes_back_grants_and_claims_of_the_dead_alone(bare: Bare) -> None:
    """The words that a client leaves when it is killed between two steps, written by hand."""
    g, plane = bare.arena.geometry, bare.plane
    swap = declared(bare, flags=layout.WRITE_BEHIND)
    swap.store(5, page_of(b"a"))
    word = plane.read(g.slots_at + 16 * 5)
    page = word & 0xFFFFFFFF
    granted = 1 << 62 | 3 << 46
    plane.write(
        g.life_at + 8 * page, granted | plane.read(g.life_at + 8 * page) & (1 << 46) - 1
    )  # killed before it published
    empty = (page + 1) % g.nursery_pages
    plane.write(g.life_at + 8 * empty, granted | 9)  # killed before the word named it
    theirs = (page + 2) % g.nursery_pages
    plane.write(g.life_at + 8 * theirs, 1 << 62 | 4 << 46 | 9)  # another client's
    plane.write(g.slots_at + 16 * 7 + 8, 3 << 52 | 11 << 32 | 0xABCD)
    plane.write(g.slots_at + 16 * 8 + 8, 4 << 52 | 11 << 32 | 0xABCD)
    plane.bury([3])
    assert plane.read(g.life_at + 8 * page) >> 62 == 2
    assert plane.read(g.life_at + 8 * empty) == 10
    assert plane.read(g.life_at + 8 * theirs) == 1 << 62 | 4 << 46 | 9
    assert plane.read(g.slots_at + 16 * 7 + 8) == 0xABCD
    assert plane.read(g.slots_at + 16 * 8 + 8) == 4 << 52 | 11 << 32 | 0xABCD
    assert swap.load(5) == page_of(b"a")
    plane.bury([4])
    swap.sync()
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_a_claim_that_nobody_gives_back_bounds_the_store(bare: Bare) -> None:
    g, plane = bare.arena.geometry, bare.plane
    swap = declared(bare, timeout=0.0)
    side = g.slots_at + 16 * 3 + 8
    plane.write(side, 3 << 52 | 1 << 32)
    with pytest.raises(SlotBusy):
        swap.store(3, page_of(b"a"))
    assert swap.load(3) == page_of(b"a"), "stored and visible"
    with pytest.raises(SlotBusy) as raised:
        swap.store_many([1, 2, 3, 4], page_of(b"b") * 4)
    assert raised.value.done == 2
    with pytest.raises(SlotBusy):
        swap.sync(0)
    assert counts(bare)["refused_slot_busy"] == 3
    plane.bury([3])
    swap.sync(0)
    assert [swap.load(n) for n in range(1, 5)] == [page_of(b"b")] * 4
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_a_sync_tells_of_a_file_that_refuses_rather_than_of_a_busy_slot(bare: Bare) -> None:
    swap = declared(bare, flags=layout.WRITE_BEHIND, timeout=0.0)
    for n in (3, 90):  # not in one batch
        swap.store(n, page_of(b"a"))
    side = bare.arena.geometry.slots_at + 16 * 3 + 8
    bare.plane.write(side, 3 << 52 | 1 << 32)
    with files_refuse_writes(os.getpid()):
        with pytest.raises(SpillError) as raised:
            swap.sync(0)
        assert raised.value.errno == errno.EFBIG
    with pytest.raises(SlotBusy):
        swap.sync(0)
    bare.plane.bury([3])
    swap.sync(0)


def test_what_a_file_refused_is_tried_again_when_it_is_asked_for(bare: Bare) -> None:
    """The sweep tries a page once; `retry_refused` counts what is left, and forgets what was overwritten, dropped, or has ended."""
    swap, ended = (
        declared(bare, flags=layout.WRITE_BEHIND),
        declared(bare, flags=layout.WRITE_BEHIND, type_=1, base=100),
    )
    for n in range(6):
        swap.store(n, page_of(b"a"))
    ended.store(0, page_of(b"e"))
    with files_refuse_writes(os.getpid()):
        for _ in range(3):
            bare.plane.clean_until(7)
            assert bare.plane.refused == 7
            assert counts(bare)["spill_failures"] == 7, "each once"
        assert bare.plane.retry_refused() == ({0: 6, 1: 1}, errno.EFBIG)
        assert counts(bare)["spill_failures"] == 14
        swap.store(0, page_of(b"b"))
        swap.invalidate_page(1)
        swap.store(2, bytes(4096))
        bare.plane.end_type(1, 100, 100)
        assert bare.plane.retry_refused() == ({0: 3}, errno.EFBIG)
        assert bare.plane.refused == 3
        bare.plane.clean_until(8)  # what replaced slot 0 is refused as well
        assert bare.plane.retry_refused() == ({0: 4}, errno.EFBIG)
    assert bare.plane.retry_refused()[0] == {}
    assert bare.plane.refused == 0
    check_at_rest(bare.arena.name, bare.spill_dir)


def test_only_the_file_that_a_life_began_with_is_opened(bare: Bare) -> None:
    swap = declared(bare)
    swap.store(1, page_of(b"a"))
    path = bare.spill_dir / "000.1"
    path.rename(bare.spill_dir / "aside")
    path.touch()
    with pytest.raises(SpillError) as raised:
        bare.plane.slots(0, 1, None)
    assert raised.value.errno == errno.ESTALE
    (bare.spill_dir / "aside").rename(path)
    assert bare.plane.slots(0, 1, None).load(1) == page_of(b"a")
    with pytest.raises(SpillError):
        bare.plane.begin_type(1, 100, 100, 0)  # there is no file
    assert bare.plane.read(bare.arena.geometry.type_at(1)) == 0, "nothing has begun"


_words = st.integers(0, 2**64 - 1)


@settings(max_examples=200, deadline=None)
@given(word=_words, side=_words, life=_words, key=_words)
def test_no_content_of_the_tables_breaks_the_process(word: int, side: int, life: int, key: int) -> None:
    """A peer may write anything anywhere: a value, a miss or a typed error, never a crash."""
    with tempfile.TemporaryDirectory() as spill_dir:
        Path(spill_dir, "000.1").touch()
        _survives(word, side, life, key, Path(spill_dir))


def _survives(word: int, side: int, life: int, key: int, spill_dir: Path) -> None:
    g, plane, swap = _damaged(spill_dir)
    for state in range(8):
        plane.write(g.slots_at, word & ~(7 << 33) | state << 33)
        plane.write(g.slots_at + 8, side)
        page = word & 0xFFFFFFFF
        if page >= g.pages:
            page = 0
            plane.write(g.slots_at, word >> 33 << 33 & ~(7 << 33) | state << 33)
        plane.write(g.life_at + 8 * page, life)
        plane.write(g.key_at + 8 * page, key)
        try:
            found = swap.load(0)
        except (ArenaError, Closed, SpillError):
            pass
        else:
            assert found is None or len(found) == 4096
        plane.sweep(0)
        plane.bury([7])
    plane.write(g.slots_at + 8, 0)
    plane.write(g.slots_at, 0)
    swap.store(0, page_of(b"a"))
    assert swap.load(0) == page_of(b"a")


def _damaged(spill_dir: Path) -> tuple[Geometry, Plane, Slots]:
    geometry, areas = layout.plan(1 << 20, slots=64, clients_max=8)
    memory = bytearray(geometry.size)
    layout.write_header(memoryview(memory), geometry, areas, bytes(16))
    plane = Plane(memory, geometry, 1, os.fsencode(spill_dir))
    plane.begin_type(0, 0, 64, layout.WRITE_BEHIND)
    return geometry, plane, plane.slots(0, 1, 0.1)


def test_one_process_with_two_planes_is_two_clients(bare: Bare) -> None:
    declared(bare)
    second = Plane(arenas.open_arena(bare.arena.name).memory, bare.arena.geometry, 2, os.fsencode(bare.spill_dir))
    second.slots(0, 1, None).store(1, page_of(b"a"))
    assert counts(bare, 2) == {"stores": 1, "cleaned": 1}
    assert counts(bare, 1) == {}
