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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _common import OUT, Plot, Section, Verdict, describe_machine, machine, scratch, tell, write_json
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
BEHIND_MAX = 1.0  # points that ours may be behind the oracle's S3-FIFO; it is to be ahead of LRU
IN_MEMORY = ("hits_nursery", "hits_area", "hits_zero", "hits_filled")

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


def section(lengths: dict[str, str], results: dict[str, Any], plotted: bool) -> Section:
    """Ours, by policy, above the reference figures: a column a trace and size of the cache."""
    columns = [""] + [f"{trace}, {share} %" for trace in results for share in SHARES]
    named = {policy: policy for policy in layout.POLICIES} | {"live": f"{layout.POLICIES[0]}, through a broker process"}
    rows = [
        [words, *(_cell(_hits(of_trace[name], share)) for of_trace in results.values() for share in SHARES)]
        for name, words in named.items()
        if all(name in of_trace for of_trace in results.values())
    ]
    for name in dict.fromkeys(name for of_trace in results.values() for name in of_trace["reference"]):
        figures = [of_trace["reference"].get(name, [None] * len(SHARES)) for of_trace in results.values()]
        rows.append([f"libcachesim, {name}", *(_cell(figure) for of_trace in figures for figure in of_trace)])
    note = (
        "Loads served from memory, percent, by the size of the cache as a share of the pages that the trace asks for. "
        + "; ".join(f"{trace}: {words}" for trace, words in lengths.items())
        + "."
    )
    plots = [Plot("policy.svg", "Loads served from memory by size of the cache")] if plotted else []
    return Section("Loads served from memory", columns, rows, note, list(_verdicts(results)), plots)


def _hits(found: dict[str, dict[str, float]], share: int) -> float | None:
    return found[str(share)]["hits"] if str(share) in found else None


def _cell(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.1f}"


def _verdicts(results: dict[str, Any]) -> Iterator[Verdict]:
    ours = layout.POLICIES[0]
    for trace, of_trace in results.items():
        for n, share in enumerate(SHARES if ours in of_trace else ()):
            hits = of_trace[ours][str(share)]["hits"]
            oracle, lru = (of_trace["reference"][name][n] for name in ("S3-FIFO", "LRU"))
            why = f"{hits:.2f} against {oracle:.2f}"
            yield Verdict(f"points behind S3-FIFO, {trace}, {share} %", BEHIND_MAX, oracle - hits, why=why)
            why = f"{hits:.2f} against {lru:.2f}"
            yield Verdict(f"points ahead of LRU, {trace}, {share} %", 0, hits - lru, at_least=True, why=why)


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
    parser.add_argument("--plots", action="store_true", help="write docs/policy.svg; needs matplotlib")
    options = parser.parse_args()
    found = machine()
    print(describe_machine(found))
    results: dict[str, Any] = {}
    lengths: dict[str, str] = {}
    with scratch() as directory:
        for name, trace in traces().items():
            if options.trace and name not in options.trace:
                continue
            lengths[name] = f"{len(trace):,} loads of {int(trace.max()) + 1:,} pages"
            of_trace: dict[str, Any] = {}
            results[name] = of_trace
            for policy in options.policy or layout.POLICIES:
                of_trace[policy] = {str(s): replay(trace, pages_of(trace, s), policy, directory) for s in SHARES}
            of_trace["reference"] = oracle(trace) if options.oracle else REFERENCE[name]
            if options.live:
                of_trace["live"] = {
                    str(s): replay_live(trace, pages_of(trace, s), layout.POLICIES[0], directory) for s in LIVE_SHARES
                }
    told = section(lengths, results, options.plots)
    tell(told)
    write_json(options.out, (__doc__ or "").splitlines()[0], found, vars(options), results, [told])
    if options.plots:
        import plots

        plots.hits(options.out, plots.DOCS)


if __name__ == "__main__":
    main()
