"""The extension module: what a plane refuses to be, single words, ranges of pages, wakes, and the memory of a buffer."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from gcma_shm import layout
from gcma_shm._core import COUNTERS, Plane, Slots
from gcma_shm.errors import ArenaError, Closed, SpillError
from tests.conftest import Bare
from tests.core import client, declared, life
from tests.processes import Said, descriptors, in_fork

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def refused_planes(bare: Bare, tmp_path: Path) -> None:
    geometry, memory, directory = bare.arena.geometry, bare.arena.memory, os.fsencode(bare.spill_dir)
    for number in (-1, 0, geometry.clients_max + 1):
        with pytest.raises(ValueError, match="client number"):
            Plane(memory, geometry, number, directory)
    with pytest.raises(ArenaError):
        Plane(bytearray(4096), geometry, 1, directory)
    with pytest.raises(BufferError):
        Plane(bytes(geometry.size), geometry, 1, directory)
    (tmp_path / "file").touch()
    for name, number in (("missing", errno.ENOENT), ("file", errno.ENOTDIR)):
        with pytest.raises(SpillError) as raised:
            Plane(memory, geometry, 1, os.fsencode(tmp_path / name))
        assert raised.value.errno == number
    for arguments in ((), (None, 0, 1, 1.0)):  # refused before the constructor begins
        with pytest.raises(TypeError):
            Slots(*arguments)


def test_what_a_plane_refuses_to_be(bare: Bare, tmp_path: Path) -> None:
    """In a child: a refusal that closed somebody else's descriptor would harm every later test."""

    def child(_: Said) -> tuple[list[str], list[str]]:
        before = sorted(path.name for path in Path("/proc/self/fd").iterdir())
        refused_planes(bare, tmp_path)
        return before, sorted(path.name for path in Path("/proc/self/fd").iterdir())

    before, after = in_fork(child)
    assert before == after


def test_a_plane_that_was_never_begun_leaves_no_descriptor(bare: Bare) -> None:
    before = descriptors()
    for _ in range(3):
        plane = Plane(bare.arena.memory, bare.arena.geometry, 2, os.fsencode(bare.spill_dir))
        plane.become(3)
        assert plane.number == 3
        del plane
    assert descriptors() <= before


def test_words(bare: Bare) -> None:
    plane, at = bare.plane, layout.EPOCH_AT
    plane.write(at, 41)
    assert plane.add(at, 1) == 41
    assert plane.read(at) == 42
    assert not plane.swap_word(at, 41, 7)
    assert plane.swap_word(at, 42, 2**64 - 1)
    assert plane.add(at, 2) == 2**64 - 1
    assert plane.read(at) == 1
    assert struct.unpack_from("<Q", bare.arena.memory, at) == (1,)
    for wrong in (-8, 1, 4, bare.arena.geometry.size, bare.arena.geometry.size - 4, 2**62):
        for call in (
            lambda w=wrong: plane.read(w),
            lambda w=wrong: plane.write(w, 1),
            lambda w=wrong: plane.swap_word(w, 0, 1),
            lambda w=wrong: plane.add(w, 1),
        ):
            with pytest.raises(IndexError):
                call()
    plane.write(bare.arena.geometry.size - 8, 5)


def test_ranges(bare: Bare) -> None:
    first, pages = bare.arena.areas[0].first, bare.arena.areas[0].pages
    for call in (bare.plane.take, bare.plane.give):
        for area, start, count in (
            (2, first, 1),
            (-1, first, 1),
            (0, first - 1, 1),
            (0, first, 0),
            (0, first, pages + 1),
            (0, first + pages, 1),
        ):
            with pytest.raises(IndexError):
                call(area, start, count)
    assert bare.plane.take(0, first, pages) == 0, "nothing was lent"
    bare.plane.give(0, first, pages)


def test_each_change_of_hands_takes_the_next_sequence(bare: Bare) -> None:
    first = bare.arena.areas[0].first
    for n, (change, owner, state) in enumerate(
        ((bare.plane.take, 7, 3), (bare.plane.give, 7, 0), (bare.plane.take, 65535, 3), (bare.plane.give, 0, 0)), 1
    ):
        assert change(0, first + 1, 2, owner) == 0
        assert life(bare, first) == life(bare, first + 3) == (0, 0, 0)
        assert life(bare, first + 1) == life(bare, first + 2) == (state, owner, n)


def test_areas_are_where_the_broker_says(bare: Bare) -> None:
    plane, g = bare.plane, bare.arena.geometry
    for index, first, pages in (
        (-1, g.nursery_pages, 1),
        (layout.AREAS_MAX, g.nursery_pages, 1),
        (0, g.nursery_pages - 1, 1),
        (0, g.pages - 1, 2),
        (0, g.pages, 1),
        (0, g.nursery_pages, 2**63),
        (0, 2**63, 2**63),
    ):
        with pytest.raises(IndexError):
            plane.set_area(index, first, pages)
    plane.set_area(63, g.pages - 3, 3)
    plane.take(63, g.pages - 3, 3)
    plane.set_area(63, 0, 0)
    with pytest.raises(IndexError):
        plane.take(63, g.pages - 3, 3)
    other = Plane(bare.arena.memory, g, 2, os.fsencode(bare.spill_dir))
    other.set_area(0, g.nursery_pages, 5)
    with pytest.raises(ValueError, match="broker"):
        other.take(0, g.nursery_pages, 5)
    with pytest.raises(IndexError):
        other.lent_near(g.nursery_pages, 5)


def test_how_much_cache_is_near_is_known_by_blocks(bare: Bare) -> None:
    swap = declared(bare, slots=600)
    plane, (a, b) = bare.plane, bare.arena.areas
    assert plane.lent_near(a.first, 300) == 0
    for n in range(600):
        swap.store(n, struct.pack("<Q", n + 1) * 512)
        plane.sweep(0)
    assert plane.lent_near(a.first, 300) == 300
    block = (b.first + 64) // 64 * 64
    assert plane.lent_near(block, 1) == plane.lent_near(block + 63, 1) == plane.lent_near(block, 64) == 64
    assert plane.lent_near(block + 63, 2) == 128
    plane.take(1, block + 10, 20)
    assert plane.lent_near(block + 10, 20) == 44, "about"
    plane.give(1, block + 10, 20)
    assert plane.lent_near(block, 1) == 44
    for first, count in ((a.first, 0), (496, 1), (495, 2), (0, 2**63)):
        with pytest.raises(IndexError):
            plane.lent_near(first, count)


def test_waking_counts_so_that_no_wake_is_lost(bare: Bare) -> None:
    two = client(bare, 2)
    seen = two.wake_count()
    bare.plane.wake(2)
    two.wait(seen, 100.0)  # woken before it slept: returns at once
    assert two.wake_count() == seen + 1
    two.wait(seen + 1, 0.001)
    bare.plane.wake(3)
    assert two.wake_count() == seen + 1
    for number in (0, 9, 2**40):
        with pytest.raises(IndexError):
            bare.plane.wake(number)


def test_populating_does_not_change_what_is_there(bare: Bare) -> None:
    g = bare.arena.geometry
    span = bare.plane.span(g.pages - 70, 70 * 4096)
    memoryview(span)[:] = b"\7" * 70 * 4096
    bare.plane.populate(g.pages - 70, 70 * 4096)
    bare.plane.populate(0, g.pages * 4096)
    assert bytes(memoryview(span)) == b"\7" * 70 * 4096
    for first, nbytes in ((0, 0), (g.pages, 1), (g.pages - 1, 4097), (0, 2**63)):
        with pytest.raises(IndexError):
            bare.plane.populate(first, nbytes)


def test_types_and_handles_that_are_none(bare: Bare) -> None:
    for type_ in (256, 2**40):
        with pytest.raises(IndexError):
            bare.plane.begin_type(type_, 0, 1, 0)
        with pytest.raises(IndexError):
            bare.plane.end_type(type_, 0, 1)
        with pytest.raises(IndexError):
            bare.plane.slots(type_, 1, None)
    (bare.spill_dir / "000.1").touch()
    for never_begun in (1, 2, 3):  # never declared
        with pytest.raises((Closed, SpillError)):
            bare.plane.slots(0, never_begun, None)


def test_spans(bare: Bare) -> None:
    geometry = bare.arena.geometry
    span = bare.plane.span(geometry.pages - 2, 2 * 4096)
    assert span.nbytes == 8192
    with memoryview(span) as view:
        assert span.exports == 1
        assert not view.readonly
        view[:] = b"\7" * 8192
        assert bare.arena.memory[geometry.page_at(geometry.pages - 1)] == 7
        with memoryview(span):
            assert span.exports == 2
        array = np.frombuffer(memoryview(span), np.uint8)
        assert span.exports == 2
        del array
    assert span.exports == 0
    span.zero()
    assert bytes(memoryview(span)) == bytes(8192)
    for first, nbytes in ((geometry.pages, 1), (geometry.pages - 1, 4097), (2**40, 0), (0, 2**63)):
        with pytest.raises(IndexError):
            bare.plane.span(first, nbytes)


def test_counters_stay_within_their_record() -> None:
    assert layout.CLIENT_COUNTERS_AT + 8 * len(COUNTERS) <= layout.CLIENT_BYTES
    assert len(set(COUNTERS)) == len(COUNTERS)


def test_a_closed_plane(bare: Bare) -> None:
    swap = declared(bare)
    assert bare.plane.close(1.0)
    assert bare.plane.closed
    with pytest.raises(Closed):
        swap.load(1)


def test_many_words_at_once(bare: Bare) -> None:
    at = bare.plane.geometry.allocations_at
    for n in range(4):
        bare.plane.write(at + 128 * n, n + 7)
    assert bare.plane.read_many(at, 4, 128) == [7, 8, 9, 10]
    assert bare.plane.read_many(at, 2) == [7, 0]
    assert bare.plane.read_many(at, 0) == []
    size = bare.plane.geometry.size
    for wrong in (
        (at + 1, 2, 8),
        (at, 2, 12),
        (at, 2, 4),
        (-8, 1, 8),
        (size - 8, 2, 8),
        (at, size, 8),
        (at, 2, size + 8),
    ):
        with pytest.raises(IndexError):
            bare.plane.read_many(*wrong)
    assert bare.plane.read_many(size - 8, 1) == [bare.plane.read(size - 8)]
