"""How many loads of real traces are served from memory, by policy and by size of the cache, beside the reference figures of libcachesim?

Each request is a load; after a miss the page is stored. A load that the spill file serves is a miss of the cache. The size of the cache is that of
nursery and areas together, as a share of the pages that the trace asks for. The trace runs through the data plane itself: a
broker's plane in this process, which sweeps whenever the nursery is low, as the reclaim thread does when it is woken; so the figures
are the same each time. `--live` replays through a broker process as well. `--oracle` runs libcachesim itself, if it is installed.
"""

from __future__ import annotations

import argparse
import importlib
import mmap
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import OUT, describe_machine, machine, scratch, table, write_json
from traces import Trace, traces

import gcma_shm
from gcma_shm import layout
from gcma_shm._core import Plane, Slots
from gcma_shm.layout import Geometry
from gcma_shm.records import Records

SHARES = (1, 5, 10, 20, 40)  # percent of the trace's pages
CLIENTS = 2
LOW = 8  # the reclaim thread is woken when less than an eighth of the nursery is left
LIVE_SHARES = (5, 20)
IN_MEMORY = ("hits_nursery", "hits_area", "hits_zero")

# libcachesim 0.3.5 over the same traces, each request of one size, caches of the same numbers of pages; `--oracle` takes them anew, but for
# Belady's, which knows the future.
REFERENCE = {
    "vm": {
        "LRU": (10.3, 11.3, 12.6, 18.7, 40.0),
        "SIEVE": (9.7, 13.5, 16.7, 25.4, 46.5),
        "S3-FIFO": (10.6, 13.4, 18.1, 27.0, 44.6),
        "Belady": (13.5, 23.0, 32.4, 45.3, 61.5),
    },
    "twitter": {
        "LRU": (66.2, 75.4, 79.3, 82.4, 84.5),
        "SIEVE": (67.8, 76.9, 80.3, 82.7, 84.4),
        "S3-FIFO": (69.7, 78.6, 81.2, 83.1, 84.5),
    },
}


def plan(cache_pages: int, slots: int, policy: str) -> tuple[Geometry, list[Any]]:
    """An arena whose nursery and one area are `cache_pages` in all, with the nursery's share that an arena has by default."""
    nursery = max(cache_pages // layout.NURSERY_SHARE, layout.NURSERY_PAGES_MIN)
    area = (cache_pages - nursery) * layout.PAGE_SIZE_MIN
    size = cache_pages * layout.PAGE_SIZE_MIN + slots * layout.SLOT_BYTES + (1 << 20)
    while True:
        geometry, areas = layout.plan(size, areas={"main": area}, slots=slots, clients_max=CLIENTS, policy=policy)
        if geometry.nursery_pages == nursery:
            return geometry, areas
        size += (nursery - geometry.nursery_pages) * layout.PAGE_SIZE_MIN


def page_of(key: int) -> bytes:
    """What is stored for a key."""
    return struct.pack("<Q", key + 1) * (layout.PAGE_SIZE_MIN // 8)


def replay(trace: Trace, cache_pages: int, policy: str, spill_dir: Path) -> dict[str, float]:
    """Percent of the loads that memory served, of those that the file did, and what it took."""
    slots = int(trace.max()) + 1
    geometry, areas = plan(cache_pages, slots, policy)
    memory = mmap.mmap(-1, geometry.size)
    with memoryview(memory) as view:
        layout.write_header(view, geometry, areas, bytes(16))
    plane = Plane(memory, geometry, layout.BROKER, os.fsencode(spill_dir))
    plane.set_area(0, areas[0].first, areas[0].pages)
    file = spill_dir / "000.1"
    file.touch(0o600)
    swap = plane.slots(0, plane.begin_type(0, 0, slots, layout.WRITE_BEHIND), 5.0)
    low, read, sweep = geometry.nursery_pages * (LOW - 1) // LOW, plane.read, plane.sweep

    def look() -> None:
        if read(layout.HEAD_AT) - read(layout.HAND_AT) > low:
            sweep(0)

    begun = time.perf_counter()
    _run(trace, swap, look)
    took = time.perf_counter() - begun
    found = _rates(Records(plane).counters(layout.BROKER), len(trace))
    file.unlink()
    return found | {"pages": cache_pages, "nursery": geometry.nursery_pages, "microseconds": took / len(trace) * 1e6}


def replay_live(trace: Trace, cache_pages: int, policy: str, spill_dir: Path) -> dict[str, float]:
    """The same through a broker process: its reclaim thread sweeps when it is woken."""
    slots = int(trace.max()) + 1
    geometry, areas = plan(cache_pages, slots, policy)
    size, areas_bytes = geometry.size, {"main": areas[0].pages * layout.PAGE_SIZE_MIN}
    with gcma_shm.embedded(
        size, areas=areas_bytes, slots=slots, clients=CLIENTS, spill_dir=spill_dir, policy=policy
    ) as client:
        swap = client.swap(0, slots=slots, write="behind")
        begun = time.perf_counter()
        _run(trace, swap, lambda: None)
        took = time.perf_counter() - begun
        found = _rates(client.stats()["counters"], len(trace))
    return found | {"pages": cache_pages, "microseconds": took / len(trace) * 1e6}


def _run(trace: Trace, swap: Slots | gcma_shm.clients.swap.Swap, look: Callable[[], None]) -> None:
    load, store = swap.load, swap.store
    for key in trace.tolist():
        page = load(key)
        if page is None:
            store(key, page_of(key))
        elif page[:8] != struct.pack("<Q", key + 1):
            raise RuntimeError(f"page {key} is not what was stored")
        look()


def _rates(counts: dict[str, int], loads: int) -> dict[str, float]:
    memory = sum(counts.get(name, 0) for name in IN_MEMORY)
    assert memory + counts.get("hits_spill", 0) + counts.get("misses", 0) == loads
    return {
        "hits": 100 * memory / loads,
        "from the file": 100 * counts.get("hits_spill", 0) / loads,
        "promotions per load": counts.get("promotions", 0) / loads,
    }


def oracle(trace: Trace) -> dict[str, list[float]]:
    """libcachesim's hit ratios, taken here."""
    lib = importlib.import_module("libcachesim")  # GPL, and so nowhere in this project's dependencies
    kinds = {"LRU": lib.LRU, "SIEVE": lib.Sieve, "S3-FIFO": lib.S3FIFO}
    found: dict[str, list[float]] = {}
    for name, kind in kinds.items():
        for share in SHARES:
            cache, request, hits = kind(pages_of(trace, share)), lib.Request(), 0
            request.obj_size = 1
            for key in trace.tolist():
                request.obj_id = key
                hits += cache.get(request)
            found.setdefault(name, []).append(100 * hits / len(trace))
    return found


def pages_of(trace: Trace, share: int) -> int:
    """How many pages that percentage of the trace's is."""
    return (int(trace.max()) + 1) * share // 100


def tell(name: str, trace: Trace, results: dict[str, Any], reference: dict[str, Any]) -> str:
    """The table of one trace."""
    rows = [
        [policy, *(results[policy][str(share)]["hits"] for share in SHARES)]
        for policy in layout.POLICIES
        if policy in results
    ]
    rows += [[f"libcachesim {known}", *map(float, figures)] for known, figures in reference.items()]
    title = f"\n{name}: {len(trace)} loads of {int(trace.max()) + 1} pages; loads served from memory, percent"
    cells = [[row[0], *(f"{value:.1f}" for value in row[1:])] for row in rows]
    return table(["cache, percent of the pages", *map(str, SHARES)], cells, title)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", choices=layout.POLICIES, action="append", help="only these")
    parser.add_argument("--trace", choices=tuple(REFERENCE), action="append", help="only these")
    parser.add_argument("--live", action="store_true", help="through a broker process as well, at 5 and 20 percent")
    parser.add_argument(
        "--oracle", action="store_true", help="runs libcachesim, which must be installed, for the reference"
    )
    parser.add_argument("--out", type=Path, default=OUT / "policy.json", help="where the figures go")
    options = parser.parse_args()
    found = machine()
    print(describe_machine(found))
    results: dict[str, Any] = {}
    with scratch() as directory:
        for name, trace in traces().items():
            if options.trace and name not in options.trace:
                continue
            of_trace: dict[str, Any] = {}
            results[name] = of_trace
            for policy in options.policy or layout.POLICIES:
                of_trace[policy] = {str(s): replay(trace, pages_of(trace, s), policy, directory) for s in SHARES}
            of_trace["reference"] = oracle(trace) if options.oracle else REFERENCE[name]
            print(tell(name, trace, of_trace, of_trace["reference"]), flush=True)
            if options.live:
                of_trace["live"] = live = {}
                for share in LIVE_SHARES:
                    live[str(share)] = replay_live(trace, pages_of(trace, share), layout.POLICIES[0], directory)
                    still = of_trace[layout.POLICIES[0]][str(share)]["hits"]
                    print(
                        f"through a broker process, {share} percent: {live[str(share)]['hits']:.1f}, in this process {still:.1f}"
                    )
    write_json(options.out, __doc__.splitlines()[0], found, vars(options), results)


if __name__ == "__main__":
    main()
