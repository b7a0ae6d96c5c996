"""Pages of every size that is copied in a way of its own come back whole, wherever the caller's memory lies, and nothing beside it changes."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from gcma_shm import layout
from gcma_shm._core import COUNTERS, Plane, Slots
from gcma_shm.broker.registry import TypeRegistry
from gcma_shm.errors import NurseryFull

SIZES = [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 1 << 20]
SHIFTS = (0, 1, 31, 63)  # bytes from the beginning of a cache line
CLIENT = 2
SLOTS = 4
GUARD = 0xA5
PAGE = bytes(range(256)) * 16  # of no pattern: those are kept in the slot's word


def opened(page_size: int, directory: Path, timeout_s: float = 60.0) -> tuple[Plane, Slots]:
    """The broker's plane, and a client's handle on a type that is written behind."""
    geometry, areas = layout.plan(
        64 * page_size + (2 << 20), page_size, areas={"a": 8 * page_size}, slots=SLOTS, clients_max=4
    )
    memory = mmap.mmap(-1, geometry.size)
    with memoryview(memory) as view:
        layout.write_header(view, geometry, areas, bytes(16))
    broker = Plane(memory, geometry, layout.BROKER, os.fsencode(directory))
    life = TypeRegistry(broker, directory).declare(0, SLOTS, "behind").life
    return broker, Plane(memory, geometry, CLIENT, os.fsencode(directory)).slots(0, life, timeout_s)


@pytest.mark.parametrize("page_size", SIZES)
def test_a_page_comes_back_whole_wherever_the_callers_memory_lies(page_size: int, tmp_path: Path) -> None:
    _, swap = opened(page_size, tmp_path)
    room = bytearray(page_size + 4096)
    aligned = -np.frombuffer(room, np.uint8).ctypes.data % 64
    for n, shift in enumerate(SHIFTS):
        page = np.random.default_rng(n).bytes(page_size)
        with memoryview(room)[aligned + 64 + shift :][:page_size] as place:
            place[:] = page
            swap.store(n % SLOTS, place)
            assert swap.load(n % SLOTS) == page
            room[:] = bytes([GUARD]) * len(room)
            assert swap.load_into(n % SLOTS, place)
            assert place == page
            place[:] = bytes([GUARD]) * page_size
        assert room.count(GUARD) == len(room), "bytes beside the page were written"


@pytest.mark.parametrize("page_size", SIZES)
def test_bytes_and_bytearrays_need_no_export_and_keep_their_neighbours(page_size: int, tmp_path: Path) -> None:
    _, swap = opened(page_size, tmp_path)
    page = np.random.default_rng(1).bytes(page_size)
    swap.store(1, page)
    into = bytearray(page_size)
    assert swap.load_into(1, into)
    assert into == page
    assert not swap.load_into(2, into)
    swap.store(3, bytes(page_size))  # zeros have no page
    assert swap.load_into(3, into)
    assert into == bytes(page_size)
    into.append(0)  # a BufferError, were it still exported
    for wrong in (into, into[:-2], bytearray()):
        with pytest.raises(ValueError, match="expected one page"):
            swap.load_into(1, wrong)
        with pytest.raises(ValueError, match="expected one page"):
            swap.store(1, bytes(wrong))
    assert swap.load(1) == page


def test_a_bytearray_gets_what_is_in_the_file_too(tmp_path: Path) -> None:
    broker, swap = opened(4096, tmp_path)
    page = PAGE
    swap.store(0, page)
    swap.sync()
    nursery = broker.geometry.nursery_pages
    for n in range(2 * nursery):  # until the nursery has been gone around
        swap.store(1, (n + 1).to_bytes(8, "little") * 512)
        broker.sweep(0)
    counters = broker.geometry.client_at(CLIENT) + layout.CLIENT_COUNTERS_AT
    hits_spill = counters + 8 * COUNTERS.index("hits_spill")
    before = broker.read(hits_spill)
    into = bytearray(4096)
    assert swap.load_into(0, into)
    assert into == page
    assert broker.read(hits_spill) == before + 1


def test_a_store_that_may_not_wait_says_so_at_once(tmp_path: Path) -> None:
    """And one whose time begins when it first has to wait ends all the same."""
    for timeout_s in (0.0, 0.05):
        directory = tmp_path / str(timeout_s)
        directory.mkdir()
        broker, swap = opened(4096, directory, timeout_s)
        g = broker.geometry
        for page in range(g.nursery_pages):  # somebody else was granted all of it
            broker.write(g.life_at + 8 * page, 1 << 62 | 3 << 46 | 1)
        with pytest.raises(NurseryFull):
            swap.store(0, PAGE)
        assert swap.load(0) is None
        broker.write(g.life_at + 8 * (broker.read(layout.HEAD_AT) % g.nursery_pages), 2)  # FREE
        swap.store(0, PAGE)
        assert swap.load(0) == PAGE
