"""The sweep by itself, for `alloc.py`: what taking and giving back a range costs the broker a page, beside a C loop over the same words."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from _common import Floor, Ratio, Summary, table

from gcma_shm import layout
from gcma_shm._core import Plane

SWEEP_PAGES = [16, 256, 4096, 16384, 65536]
PUBLISHED = 2 << 62
FREE = 0
SEQUENCE = np.uint64((1 << 46) - 1)
BATCH_PAGES = 8192  # that one figure is of, at the least
Life = npt.NDArray[np.uint64]


def sweep(rounds: int, directory: Path, floor: Floor) -> dict[str, Any]:
    """`Plane.take` and `Plane.give` on an arena of our own that nobody else maps; prints the table, returns the results for JSON."""
    pages_max = max(SWEEP_PAGES)
    geometry, areas = layout.plan(pages_max * 4096 * 5 // 4, slots=1024, clients_max=8)
    memory = mmap.mmap(-1, geometry.size)
    with memoryview(memory) as view:
        layout.write_header(view, geometry, areas, bytes(16))
    plane = Plane(memory, geometry, layout.BROKER, os.fsencode(directory))
    first = areas[0].first
    plane.set_area(0, first, areas[0].pages)
    life: Life = np.frombuffer(memory, np.uint64, areas[0].pages, geometry.life_at + 8 * first)
    own: Life = np.zeros(pages_max, np.uint64)
    own_at = own.ctypes.data
    rows, results = [], {}
    for pages in SWEEP_PAGES:
        repeats = max(8, BATCH_PAGES // pages)
        times: dict[str, list[float]] = {name: [] for name in ("C loop", "take FREE", "take PUBLISHED", "give")}
        for _ in range(rounds):
            times["C loop"].append(_each(pages, repeats, lambda pages=pages: floor.sweep(own_at, pages)))  # type: ignore[misc]
            for name, state in (("take FREE", FREE), ("take PUBLISHED", PUBLISHED)):
                took, gave = _take_and_give(plane, life, first, pages, repeats, state)
                times[name].append(took)
                times["give"].append(gave)
        summaries = {name: Summary.of(np.asarray(values)) for name, values in times.items()}
        ratio = Ratio.of(times["take PUBLISHED"], times["C loop"])
        rows.append([pages, *(f"{s.median:.2f} / {s.p99:.2f}" for s in summaries.values()), str(ratio)])
        results[str(pages)] = {"ns_per_page": summaries, "take PUBLISHED / C loop": ratio}
    print("\n" + table(["pages; ns a page, median / p99", *times, "take PUBLISHED / C loop"], rows), flush=True)
    return results


def _take_and_give(plane: Plane, life: Life, first: int, pages: int, repeats: int, state: int) -> tuple[float, float]:
    """Nanoseconds a page of each, of pages that were in this state."""
    took = gave = 0
    for _ in range(repeats):
        life[:pages] &= SEQUENCE
        life[:pages] |= np.uint64(state)
        start = time.perf_counter_ns()
        discards = plane.take(0, first, pages)
        middle = time.perf_counter_ns()
        plane.give(0, first, pages)
        took += middle - start
        gave += time.perf_counter_ns() - middle
        assert discards == (pages if state == PUBLISHED else 0)
    return took / repeats / pages, gave / repeats / pages


def _each(pages: int, repeats: int, call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - start) / repeats / pages
