"""What the tests of spill faults share: a broker with few pages, values, and what it says about its health."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gcma_shm
from gcma_shm import layout
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.swap import MappedSwap, Swap
from tests.client import filled_with
from tests.faults.disks import needs_direct
from tests.invariants import SPILLED, check_at_rest
from tests.processes import eventually

PAGE = 4096
SLOTS = 2000
TIMEOUT_S = 1.0  # of a store that finds no page
REQUEST_S = 60.0  # of a request


def data_pages(file: Path) -> set[int]:
    """The pages of a file that have blocks on the disk, or are to have; the others are holes."""
    found: set[int] = set()
    with file.open("rb") as opened:
        at, size = 0, os.fstat(opened.fileno()).st_size
        while at < size:
            try:
                at = os.lseek(opened.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO  # noqa: PT017 - nothing but a hole is left
                break
            end = os.lseek(opened.fileno(), at, os.SEEK_HOLE)
            found.update(range(at // PAGE, -(-end // PAGE)))
            at = end
    return found


def spilled(client: EmbeddedClient, type_: int, slots: int = SLOTS) -> list[int]:
    """The slots of the type whose values are in the file alone."""
    plane = client._plane
    assert plane is not None
    g = plane.geometry
    base = plane.read(g.type_at(type_) + layout.TYPE_BASE_AT)
    words = plane.read_many(g.slots_at + layout.SLOT_BYTES * base, slots, layout.SLOT_BYTES)
    return [n for n, word in enumerate(words) if word >> 33 & 7 == SPILLED]


def cached_pages(file: Path) -> int:
    """How many pages of 4 KiB of a file the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long],
    )
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if not size:
            return 0
        at = libc.mmap(None, size, 1, 1, opened.fileno(), 0)  # PROT_READ, MAP_SHARED; mapped, and not touched
    assert at != ctypes.c_void_p(-1).value
    states = (ctypes.c_ubyte * -(-size // 4096))()
    failed = libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), states)
    libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(size))
    assert not failed, os.strerror(ctypes.get_errno())
    return sum(state & 1 for state in states)


class Place:
    """A broker, and a client that reaches it in shared memory or by messages."""

    def __init__(self, owner: EmbeddedClient, client: gcma_shm.Client, spill_root: Path) -> None:
        self.owner = owner
        self.client = client
        arena = owner.stats()["arena"]
        self.arena = str(arena["name"])
        self.nursery_pages = int(arena["nursery"]) // PAGE
        self.pinned_max = self.nursery_pages - self.nursery_pages // 16  # of one type, whose share is the whole
        self.spill_dir = spill_root / self.arena.removeprefix("/")

    def hurried(self, swap: Swap) -> Swap:
        """A handle on the same type whose stores wait for a page no longer than TIMEOUT_S; those by message, as long as the broker lets them."""
        if not isinstance(swap, MappedSwap):
            return swap
        assert self.client._plane is not None
        handle = MappedSwap(self.client._plane, swap.type, swap.life, TIMEOUT_S, self.client)
        swap.close()
        return handle

    def file(self, type_: int) -> Path:
        """The spill file of that type's life."""
        (found,) = self.spill_dir.glob(f"{type_:03}.*")
        return found

    def health(self) -> dict[str, Any]:
        """What the broker says."""
        health: dict[str, Any] = self.owner.stats()["broker"]["health"]
        assert (health["state"] == "ok") == (health["pages_unwritable"] == 0)
        assert sum(health["types"].values()) == health["pages_unwritable"]
        return health

    def degraded(self, pages: int, number: int, type_: int) -> None:
        """Waits until the broker knows of exactly so many pages of that type that their file refuses."""

        def known() -> bool:
            health = self.health()
            return (health["pages_unwritable"], health["types"]) == (pages, {str(type_): pages})

        assert eventually(known), f"expected {pages} pages of type {type_}: {self.health()}"
        health = self.health()
        assert health["errno"] == number
        assert f"types {type_} " in health["why"]
        assert health["since"] > 0

    def is_bounded(self, pages: int, share: int = 100) -> bool:
        """Whether a type of that share could store so many pages that its file refuses, and not many less than it may."""
        bound = self.pinned_max * share // 100
        return bound * 3 // 4 <= pages <= bound + 2  # and stores in flight

    def healthy(self) -> None:
        """Waits until the broker has written everything by itself, which nobody asks it to."""
        assert eventually(lambda: self.health()["state"] == "ok"), self.health()
        assert self.health()["why"] == ""

    def seen_by_all(self, type_: int, values: dict[int, int], write: str = "through") -> None:
        """Each of these slots holds its value: for us, for a stranger that maps the arena, and by messages."""
        for mapped in (True, False):
            with gcma_shm.connect(self.owner.endpoint, mapped=mapped) as other:
                check_values(other.swap(type_, SLOTS, write), values)  # type: ignore[arg-type]

    def check(self) -> None:
        """The invariants, and that files and memory agree."""
        check_at_rest(self.arena, self.spill_dir)


def check_values(swap: Swap, values: dict[int, int]) -> None:
    """Each of these slots holds its value."""
    for offset, value in values.items():
        assert swap.load(offset) == filled_with(value), f"slot {offset} of type {swap.type}"


@contextlib.contextmanager
def place(spill_root: Path, mapped: bool, size: str = "4M", spill_io: str = "buffered") -> Iterator[Place]:
    """A broker of about a hundred nursery pages, with its spill files below `spill_root`."""
    if spill_io == "direct":
        needs_direct(spill_root)
    with (
        gcma_shm.embedded(
            size, slots=3 * SLOTS, clients=8, spill_dir=spill_root, spill_io=spill_io, timeout=REQUEST_S
        ) as owner,
        gcma_shm.connect(owner.endpoint, mapped=mapped, timeout=REQUEST_S) as client,
    ):
        yield Place(owner, client, spill_root)
