"""One arena in one mapping for the threads of one process: the broker's plane, the clients' planes, swap types and a reservation."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from gcma_shm import layout
from gcma_shm._core import Plane, Slots
from gcma_shm.broker.registry import TypeRegistry
from gcma_shm.errors import Closed

PAGE = 4096
CLIENTS_MAX = 7
THROUGH, BEHIND, FLEETING = 0, 1, 2  # types; the third ends and begins again all the time
SLOTS = {THROUGH: 60, BEHIND: 90, FLEETING: 40}
MORTAL = 7  # the client that says goodbye and is buried all the time
RESERVED_INDEX, RESERVED_PAGES = 3, 40
RESERVED = 9 << 8 | layout.RESERVATION  # the entry's state word
TIMEOUT_S = 60.0
SHARE = 25  # of type THROUGH, percent

Memory = mmap.mmap | ctypes.Array[ctypes.c_ubyte]


def mapped(size: int) -> Memory:
    """The arena's memory as it is in the product."""
    return mmap.mmap(-1, size)


def allocated(size: int) -> Memory:
    """Zeros from the allocator, where AddressSanitizer has a guard behind the very last byte."""
    libc = ctypes.CDLL(None)
    libc.aligned_alloc.restype, libc.aligned_alloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t] * 2
    libc.free.argtypes = [ctypes.c_void_p]
    address = libc.aligned_alloc(PAGE, size)
    ctypes.memset(address, 0, size)
    memory = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(memory, libc.free, address).atexit = False
    return memory


def guard(memory: ctypes.Array[ctypes.c_ubyte], begin: int, end: int) -> None:
    """Has AddressSanitizer report whoever touches these bytes."""
    poison = ctypes.CDLL(None).__asan_poison_memory_region
    poison(ctypes.c_void_p(ctypes.addressof(memory) + begin), ctypes.c_size_t(end - begin))


def page_of(type_: int, offset: int, n: int) -> bytes:
    """Words of one kind: which slot, and which store."""
    return (type_ << 56 | offset << 40 | n & 0xFFFFFFFF).to_bytes(8, "little") * (PAGE // 8)


def check_page(type_: int, offset: int, page: bytes) -> None:
    assert page == page[:8] * (PAGE // 8), f"torn: type {type_}, slot {offset}"
    word = int.from_bytes(page[:8], "little")
    assert word == 0 or word >> 40 == type_ << 16 | offset, f"slot {offset} of type {type_} holds {word:#x}"


class Arena:
    """The broker's plane, the clients' planes, and what the threads of both share."""

    def __init__(self, spill_dir: Path, memory_of: Callable[[int], Memory], spill_io: str = layout.SPILL_IO[0]) -> None:
        self.spill_dir = spill_dir
        self.done: Counter[str] = (
            Counter()
        )  # what no counter of the core counts; one may be lost where several threads count
        geometry, self.areas = layout.plan(
            720 << 10,
            areas={"a": 48 * PAGE, "b": 60 * PAGE},
            slots=sum(SLOTS.values()),
            clients_max=CLIENTS_MAX,
            spill_io=spill_io,
        )
        self.geometry = geometry
        self.left_at = geometry.client_at(layout.NOBODY) + layout.CLIENT_WAKE_AT  # a word that nobody uses
        self.memory = memory_of(geometry.size)
        with memoryview(self.memory) as view:
            layout.write_header(view.cast("B"), geometry, self.areas, bytes(16))
        if isinstance(self.memory, ctypes.Array):
            guard(self.memory, geometry.page_at(geometry.pages), geometry.size)  # what is left of a page: nobody's
        self.broker = self.plane(layout.BROKER)
        for index, area in enumerate(self.areas):
            self.broker.set_area(index, area.first, area.pages)
        self.registry = TypeRegistry(self.broker, spill_dir)
        for type_ in SLOTS:
            self.declare(type_)
        self.clients = {number: self.plane(number) for number in range(2, MORTAL)}
        self.reserved_at = geometry.allocation_at(RESERVED_INDEX)
        self.reserved_first = self.areas[0].first + 4
        self._reserve()

    def plane(self, number: int) -> Plane:
        return Plane(self.memory, self.geometry, number, os.fsencode(self.spill_dir))

    def declare(self, type_: int) -> Slots:
        share = SHARE if type_ == THROUGH else layout.SHARE_WHOLE
        return self.registry.declare(type_, SLOTS[type_], "behind" if type_ == BEHIND else "through", share)

    def _reserve(self) -> None:
        for offset, value in (
            (layout.ALLOCATION_FIRST_AT, self.reserved_first),
            (layout.ALLOCATION_PAGES_AT, RESERVED_PAGES),
            (layout.ALLOCATION_CLAIM_AT, 5 << layout.CLAIM_GENERATION_SHIFT),
            (layout.ALLOCATION_STATE_AT, RESERVED),
        ):
            self.broker.write(self.reserved_at + offset, value)
        self.broker.write(self.geometry.holders_at + RESERVED_INDEX * self.geometry.holder_bytes, 1 << 2)
        self.broker.entries_used(RESERVED_INDEX + 1)
        self.broker.give(0, self.reserved_first, RESERVED_PAGES, RESERVED_INDEX + 1)

    def leave(self) -> None:
        """The last that a thread does. With `meet`: what `Thread.join` orders, in an order that the sanitizer sees also when the
        interpreter's lock orders nothing.
        """
        left = self.broker.read(self.left_at)
        while not self.broker.swap_word(self.left_at, left, left + 1):
            left = self.broker.read(self.left_at)

    def meet(self) -> int:
        """How many threads have left."""
        return self.broker.read(self.left_at)

    def open(self, plane: Plane, type_: int) -> Slots:
        """A handle on that type's life of this moment, whichever it is."""
        while True:
            life = plane.read(self.geometry.type_at(type_) + layout.TYPE_LIFE_AT)
            with contextlib.suppress(Closed):
                if life & 1:  # even: between two lives
                    return plane.slots(type_, life, TIMEOUT_S)
            time.sleep(0.0001)
