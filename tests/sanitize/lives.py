"""The lives of the extension's objects, in every order and refused at every step, for AddressSanitizer: `python -m tests.sanitize.lives`.

The arena lies in allocated memory, with a guard on both of its ends. Prints "all well"; raises AssertionError when an object is not
what it should be. What the sanitizer finds is its to report.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import mmap
import os
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gcma_shm import layout
from gcma_shm._core import Plane, Slots, Span, Trying
from gcma_shm.errors import ArenaError, GcmaError
from tests.sanitize.arena import BEHIND, MORTAL, PAGE, SLOTS, THROUGH, Arena, allocated, page_of

PUBLISHED = 2
WRONG = (GcmaError, ValueError, TypeError, AttributeError, OverflowError, IndexError, BufferError, OSError)
FOREIGN = (-1, 2**31, 2**63, 2**64, None, "x")


def refused(call: Callable[..., object], *arguments: Any, by: type[BaseException] | None = None) -> None:
    """`by`: the error; None: any that a wrong argument may raise."""
    with pytest.raises(by or WRONG):
        call(*arguments)


def refused_objects(arena: Arena) -> None:
    """Constructors that fail before they begin, in the middle, and at their last step."""
    make: Any = Plane
    directory, g, memory = os.fsencode(arena.spill_dir), arena.geometry, arena.memory
    (arena.spill_dir / "file").touch()
    for arguments in (
        (), (None, g, 2, directory), (memory, None, 2, directory), (bytes(g.size), g, 2, directory), (bytearray(PAGE), g, 2, directory),
        (memory, g, 2, None), (memory, g, 2, b"/does not exist"), (memory, g, 2, directory + b"/file"),
        *((memory, g, number, directory) for number in (0, MORTAL + 1, *FOREIGN)),
    ):  # fmt: skip
        refused(make, *arguments)
    life = arena.open(arena.broker, THROUGH).life
    refused(Slots)
    refused(Slots, None, 0, life, 1.0)
    refused(Slots, arena.broker, THROUGH, life, "x")
    refused(Slots, arena.broker, THROUGH, life + 1, 1.0)
    for wrong in FOREIGN:
        refused(arena.broker.slots, wrong, life, 1.0)
    for cls in (Slots, Span, Plane):
        refused(cls.__new__, cls)
    for first, nbytes in ((g.pages, 0), (0, g.pages * PAGE + 1), (2**40, PAGE), (g.pages - 1, PAGE + 1)):
        refused(arena.broker.span, first, nbytes, by=IndexError)
    os.fstat(0), os.fstat(1), os.fstat(2)  # a refusal that closed what it had not opened


def refused_lives(arena: Arena) -> None:
    """Handles on a type whose entry says what cannot be, whose file is gone, and whose life is over."""
    plane = arena.plane(MORTAL)
    at = arena.geometry.type_at(BEHIND)
    life = plane.read(at + layout.TYPE_LIFE_AT)
    for word, value in ((layout.TYPE_BASE_AT, 2**64 - 1), (layout.TYPE_SLOTS_AT, 2**63), (layout.TYPE_BASE_AT, 2**40)):
        before = plane.read(at + word)
        plane.write(at + word, value)
        refused(plane.slots, BEHIND, life, 1.0, by=ArenaError)
        plane.write(at + word, before)
    file = arena.spill_dir / f"{BEHIND:03}.{life}"
    file.rename(file.with_suffix(".away"))
    refused(plane.slots, BEHIND, life, 1.0, by=OSError)
    file.with_suffix(".away").rename(file)
    plane.slots(BEHIND, life, 1.0)


def orders_of_ends(arena: Arena, random_: random.Random) -> None:
    """Plane, span, views and handle end in a random order, and those that are left still work."""
    plane = arena.plane(MORTAL)
    first = arena.areas[1].first
    span = plane.span(first, 3 * PAGE)
    view, part = memoryview(span), memoryview(span)[PAGE:]
    swap = arena.open(plane, THROUGH)
    watch = weakref.ref(plane)
    held: dict[str, Any] = {"plane": plane, "span": span, "view": view, "part": part, "swap": swap}
    del plane, span, view, part, swap
    for name in random_.sample(sorted(held), len(held)):
        del held[name]
        if random_.random() < 0.3:
            gc.collect()
        if "view" in held:
            held["view"][-1] = 7
        if "span" in held:
            held["span"].zero()
            assert held["span"].exports == ("view" in held) + ("part" in held)
        if "swap" in held:
            held["swap"].store(1, page_of(THROUGH, 1, 5))
            assert held["swap"].load(1) == page_of(THROUGH, 1, 5)
    gc.collect()
    assert watch() is None, "nothing refers to the plane any more"


def memory_outlives(arena: Arena) -> None:
    """The arena's memory cannot go while a plane, or a view of a span of it, is there."""
    g = arena.geometry
    memory = mmap.mmap(-1, g.size)
    with memoryview(memory) as header:
        layout.write_header(header, g, arena.areas, bytes(16))
    view = memoryview(Plane(memory, g, 2, os.fsencode(arena.spill_dir)).span(arena.areas[0].first, PAGE))
    refused(memory.close, by=BufferError)
    view[:] = bytes([9]) * PAGE
    view.release()
    gc.collect()
    memory.close()


def ends_of_memory(arena: Arena) -> None:
    """Every byte of the first and the last page, as a buffer and as a page of the cache; and every way to be one off."""
    g, plane = arena.geometry, arena.clients[2]
    for page in (0, g.pages - 1):
        plane.span(page, PAGE).zero()
        with memoryview(plane.span(page, PAGE)) as view:
            view[0] = view[-1] = 0
    plane.span(0, g.pages * PAGE)
    assert plane.read(g.page_at(g.pages) - 8) == 0
    for at in (-8, 4, g.size - 4, g.size, 2**62):
        refused(plane.read, at)
    through = arena.open(plane, THROUGH)
    last = SLOTS[THROUGH] - 1
    for n in range(g.nursery_pages):  # the areas are filled from above: the arena's last page first
        through.store(n % last, page_of(THROUGH, n % last, n))
        assert through.load(n % last) == page_of(THROUGH, n % last, n)
        arena.broker.sweep(0)
    assert plane.read(g.life_at + 8 * (g.pages - 1)) >> 62 == PUBLISHED
    for n in range(3 * g.nursery_pages):  # every page of the nursery
        through.store(last, page_of(THROUGH, last, n))
        assert through.load(last) == page_of(THROUGH, last, n)
    for offset in (-1, last + 1, *FOREIGN):
        refused(through.load, offset)
        refused(through.store, offset, bytes(PAGE))
    for size in (0, 1, PAGE - 1, PAGE + 1):
        refused(through.store, 0, bytes(size), by=ValueError)
        refused(through.load_into, 0, bytearray(size), by=ValueError)
    refused(through.load_into, 0, bytes(PAGE), by=BufferError)
    exact = allocated(70 * PAGE)
    offsets = [n % (last + 1) for n in range(70)]  # more than one batch
    through.store_many(offsets, bytes(page_of(THROUGH, 0, 1)) * 70)
    assert all(through.load_many(offsets, exact))
    refused(through.load_many, [*offsets, 0], exact, by=ValueError)
    refused(through.load_many, [0, 2**70], exact)
    refused(through.store_many, [0, last + 1], bytes(2 * PAGE), by=IndexError)


def locks() -> None:
    class Lock:
        def acquire(self, _blocking: bool) -> bool:
            return True

        def release(self) -> None:
            raise RuntimeError

    tried: Any = Trying(Lock())  # type: ignore[arg-type]
    with contextlib.suppress(RuntimeError), tried:
        del tried


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    arena = Arena(options.directory, allocated)
    random_ = random.Random(options.seed)
    for _ in range(20):
        refused_objects(arena)
        refused_lives(arena)
        for _ in range(10):
            orders_of_ends(arena, random_)
    memory_outlives(arena)
    ends_of_memory(arena)
    locks()
    print("all well")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
