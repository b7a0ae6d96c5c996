"""What runs under callgrind: each operation so many times, between two marks.

A mark is a call of `Plane.wake_count`, before which callgrind writes down what was counted since the last one. Nothing but hits, and
stores that find a page at hand: no broker runs, and the nursery holds all that is stored.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.broker.registry import TypeRegistry

TIMES = 128  # of each operation
BATCH = 64
PAGE_BYTES = 4096
SLOTS = 2 * TIMES
CLIENT = 2
TIMEOUT_S = 60.0
# In the order in which they run; all figures are of one page.
OPERATIONS = (
    "load",
    "load_into",
    "store_behind",
    "store_through",
    "load_many",
    "store_many_behind",
    "store_many_through",
)


def operations(plane: Plane, registry: TypeRegistry, page: bytes) -> dict[str, Callable[[range], None]]:
    """Each takes the offsets of TIMES pages."""
    through, behind = (
        plane.slots(type_, registry.declare(type_, SLOTS, write).life, TIMEOUT_S)
        for type_, write in enumerate(("through", "behind"))
    )
    out, many = bytearray(PAGE_BYTES), bytearray(PAGE_BYTES * BATCH)
    batch = page * BATCH

    def each(call: Callable[[int], object]) -> Callable[[range], None]:
        def run(offsets: range) -> None:
            for offset in offsets:
                call(offset)

        return run

    def batches(call: Callable[[range], object]) -> Callable[[range], None]:
        def run(offsets: range) -> None:
            for first in range(0, len(offsets), BATCH):
                call(offsets[first : first + BATCH])

        return run

    for offset in range(TIMES):
        through.store(offset, page)
    found = {
        "load": each(through.load),
        "load_into": each(lambda offset: through.load_into(offset, out)),
        "store_behind": each(lambda offset: behind.store(offset, page)),
        "store_through": each(lambda offset: through.store(offset, page)),
        "load_many": batches(lambda offsets: through.load_many(offsets, many)),
        "store_many_behind": batches(lambda offsets: behind.store_many(offsets, batch)),
        "store_many_through": batches(lambda offsets: through.store_many(offsets, batch)),
    }
    assert tuple(found) == OPERATIONS
    return found


def main() -> int:
    """Runs all operations once; returns the exit status."""
    nursery = 16 * SLOTS  # far more than is stored here
    geometry, areas = layout.plan(2 * nursery * PAGE_BYTES, areas={"a": 8 * PAGE_BYTES}, slots=2 * SLOTS, clients_max=4)
    memory = bytearray(geometry.size)
    layout.write_header(memoryview(memory), geometry, areas, bytes(16))
    with tempfile.TemporaryDirectory() as directory:
        broker = Plane(memory, geometry, layout.BROKER, os.fsencode(directory))
        plane = Plane(memory, geometry, CLIENT, os.fsencode(directory))
        registry = TypeRegistry(broker, Path(directory))
        for run in operations(plane, registry, bytes(range(1, 129)) * (PAGE_BYTES // 128)).values():
            run(range(TIMES))  # the first time of each slot costs more: that a file is opened, say
            plane.wake_count()
            run(range(TIMES))
            plane.wake_count()
    return 0


if __name__ == "__main__":
    sys.exit(main())
