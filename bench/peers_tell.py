"""What `peers.py` found, as sections: a table for each operation and page size, what was expected, memory and disk, plots."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _common import Bar, Plot, Ratio, Section, Verdict, cpu_seconds
from peers_clients import Pylibmc, Pymemcache, Redis
from peers_local import DiskCache, Lmdb
from peers_ours import Ours
from peers_ways import LOAD, LOAD_MANY, OPERATIONS, STORE, STORE_MANY
from peers_work import Block
from report import cell

from gcma_shm.sizes import format_size

OURS_OF = {
    LOAD: Ours.LOAD,
    STORE: Ours.STORE,
    LOAD_MANY: "ours, load_many",
    STORE_MANY: "ours, store_many behind",
}
# Times slower than ours, at 4 KiB: at which operation, whose way (and store), at least.
EXPECTED: tuple[tuple[str, str, str, float], ...] = (
    (LOAD, "lmdb", Lmdb.GET, 1.5),
    (LOAD, "redis", Redis.GET, 20),
    (LOAD, "pylibmc", Pylibmc.GET, 20),
    (LOAD, "diskcache", DiskCache.GET, 8),
    (STORE, "lmdb", Lmdb.PUT, 3),
    (STORE, "redis", Redis.SET, 20),
    (STORE, "pylibmc", Pylibmc.SET, 20),
    (STORE, "pymemcache", Pymemcache.SET, 20),
)
EXPECTED_LARGE = ((LOAD, "lmdb", Lmdb.GET, 1), (STORE, "lmdb", Lmdb.PUT, 1))  # ahead of it
PAGE, MIB = 4096, 1 << 20
COLUMNS = 6  # for each number of workers


@dataclass
class Found:
    """What one contender came to in one operation."""

    rounds_ns: list[float] = field(default_factory=list)  # a page, the mean of the workers
    per_second: list[float] = field(default_factory=list)  # pages, of all workers
    worker_cpu_ns: list[float] = field(default_factory=list)  # a page
    server_cpu_ns: list[float] = field(default_factory=list)  # a page
    sync_ns: list[float] = field(default_factory=list)  # a round, until the file has it all
    pages: list[int] = field(default_factory=list)  # of all workers
    singles: list[float] = field(default_factory=list)  # of single calls

    def add(self, blocks: Sequence[Block], server_cpu_ns: float, sustained: bool) -> None:
        """One round. What is sustained is counted whole: waiting for room is part of it."""
        pages = sum(block.pages for block in blocks)
        self.pages.append(pages)
        times = [block.wall_ns / block.pages if sustained else block.batch_ns for block in blocks]
        self.rounds_ns.append(float(np.mean(times)))
        self.per_second.append(sum(1e9 / each for each in times))
        self.worker_cpu_ns.append(sum(block.cpu_ns for block in blocks) / pages)
        self.server_cpu_ns.append(server_cpu_ns / pages)

    def call_ns(self, pages: int) -> float:
        """Of a call that takes so many pages."""
        return float(np.median(self.rounds_ns)) * pages

    @property
    def processor_ns(self) -> float:
        """A page, of workers and server together."""
        return float(np.mean(self.worker_cpu_ns) + np.mean(self.server_cpu_ns))

    def with_sync(self, workers: int) -> Found:
        """The same, counted until all is in the file."""
        rounds = [
            each + sync * workers / pages
            for each, sync, pages in zip(self.rounds_ns, self.sync_ns, self.pages, strict=True)
        ]
        rates = [workers / each * 1e9 for each in rounds]
        return Found(rounds, rates, self.worker_cpu_ns, self.server_cpu_ns, [], self.pages, [])


def cpu_ns(pid: int | None) -> float:
    """What a server has taken of the processors; of none, none."""
    return cpu_seconds(pid) * 1e9 if pid else 0.0


def disk_bytes(path: Path) -> int:
    """What a file, or all of a directory, takes on the disk."""
    paths = [path, *path.rglob("*")]
    return sum(one.stat().st_blocks * 512 for one in paths if one.is_file())


def sections(
    results: Sequence[Mapping[str, Any]], missing: Mapping[str, str], options: argparse.Namespace
) -> list[Section]:
    """All of them; what was expected comes first."""
    for one in results:
        for workers, by_operation in one["workers"].items():
            _count_syncs(by_operation, workers)
    tables = [_table(one, operation) for operation in OPERATIONS if operation in options.operation for one in results]
    note = "Medians of the rounds' ratios; beside the verdict their middle 80 %, and the ratio of the processor time of workers and servers together."
    note += "".join(f" Not measured: {name} ({reason})." for name, reason in missing.items())
    expected = Section("How many times as fast as each peer", [], [], note, list(_verdicts(results, missing)))
    return [expected, *tables, _room(results)]


def _count_syncs(by_operation: dict[str, dict[str, Found]], workers: int) -> None:
    """Adds, to each of ours that is written behind, itself until the file has it."""
    for found in by_operation.values():
        for name in [name for name, one in found.items() if one.sync_ns and "through" not in name]:
            found[f"{name}, and sync"] = found[name].with_sync(workers)


def _verdicts(results: Sequence[Mapping[str, Any]], missing: Mapping[str, str]) -> Iterator[Verdict]:
    for one in results:
        for workers, by_operation in one["workers"].items():
            for operation, store, theirs, limit in EXPECTED if one["page_size"] == PAGE else EXPECTED_LARGE:
                found = by_operation.get(operation, {})
                words = f"{theirs} / {OURS_OF[operation]}, {format_size(one['page_size'])}, {_workers(workers)}"
                if theirs in found:
                    ours = found[OURS_OF[operation]]
                    ratio = Ratio.of(found[theirs].rounds_ns, ours.rounds_ns)
                    processor = found[theirs].processor_ns / ours.processor_ns
                    why = f"{cell(ratio.low)} to {cell(ratio.high)}; by processor time {cell(processor)}"
                    yield Verdict(words, limit, ratio.median, at_least=True, why=why)
                elif operation in by_operation:
                    why = missing.get(store, "not asked for")
                    yield Verdict(words, limit, None, at_least=True, why=why)


def _workers(count: int) -> str:
    return {1: "one worker", 2: "two workers"}.get(count, f"{count} workers")


def _table(one: Mapping[str, Any], operation: str) -> Section:
    many = operation in (LOAD_MANY, STORE_MANY)
    by_workers = {workers: found[operation] for workers, found in one["workers"].items()}
    first = next(iter(by_workers.values()))
    columns = [""]
    for workers in by_workers:
        columns += [
            f"{_workers(workers)}: µs a page",
            "× ours",
            "p99 of a call",
            "pages/s",
            "processor, worker",
            "server",
        ]
    rows = []
    for name in sorted(first, key=lambda name: float(np.median(first[name].rounds_ns))):
        row: list[object] = [name]
        for found in by_workers.values():
            row += _cells(found[name], found[OURS_OF[operation]]) if name in found else ["-"] * COLUMNS
        rows.append(row)
    size = format_size(one["page_size"])
    batches = f" of {one['batch']}" if many else ""
    title = f"{operation}{batches}, {size}"
    call = f"a call is a batch of {one['batch']} pages" if many else "a call is a page"
    counted = (
        "a round is all of its block" if operation in (STORE, STORE_MANY) else "a round is its block's median batch"
    )
    note = (
        f"Medians of the rounds, in brackets their middle 80 % ({counted}); × ours: how many times as long as “{OURS_OF[operation]}”; {call}; "
        "processor: µs a page of the workers, and of the server or our broker."
    )
    plots = [_plot(size, operation, by_workers)] if not many or one["page_size"] == PAGE else []
    return Section(title, columns, rows, note, plots=plots)


def _cells(found: Found, ours: Found) -> list[object]:
    ratio = Ratio.of(found.rounds_ns, ours.rounds_ns)
    return [
        float(np.median(found.rounds_ns)) / 1e3,
        f"{cell(ratio.median)} ({cell(ratio.low)}-{cell(ratio.high)})",
        float(np.percentile(found.singles, 99)) / 1e3 if found.singles else "-",
        f"{np.median(found.per_second):,.0f}",
        float(np.mean(found.worker_cpu_ns)) / 1e3,
        float(np.mean(found.server_cpu_ns)) / 1e3 if any(found.server_cpu_ns) else "-",
    ]


def _plot(size: str, operation: str, by_workers: Mapping[int, Mapping[str, Found]]) -> Plot:
    """Of the first number of workers."""
    workers, found = next(iter(by_workers.items()))
    bars = [
        Bar(
            name,
            float(np.median(one.rounds_ns)) / 1e3,
            float(np.percentile(one.rounds_ns, 10)) / 1e3,
            float(np.percentile(one.rounds_ns, 90)) / 1e3,
            name.startswith("ours"),
        )
        for name, one in found.items()
    ]
    file = f"benchmarks/peers-{operation.replace(' ', '-')}-{size.replace(' ', '')}.svg"
    return Plot(
        file,
        f"{operation}, {size}, {_workers(workers)}",
        "µs a page, log scale; the line: middle 80 % of the rounds",
        bars,
    )


def _room(results: Sequence[Mapping[str, Any]]) -> Section:
    """What each keeps of memory and disk for the working set."""
    names = {name: None for one in results for part in ("resident_bytes", "disk_bytes") for name in one[part]}
    columns = ["", *(format_size(one["page_size"]) for one in results)]
    rows: list[list[object]] = []
    for name in names:
        cells: list[float | None] = [one["resident_bytes"].get(name) or one["disk_bytes"].get(name) for one in results]
        kind = "resident memory" if name in results[0]["resident_bytes"] else "on the disk, and in the page cache"
        if any(size and size >= MIB for size in cells):  # not a directory of a few names
            rows.append([f"{name}, {kind}", *("-" if cell is None else f"{cell / (1 << 20):.0f}" for cell in cells)])
    working_set = results[0]["pages"] * results[0]["page_size"]
    note = "MiB. Ours stores two types, so twice the working set; its memory is the arena's, whose size was given (`--arena`)."
    return Section(f"What {format_size(working_set)} of pages take", columns, rows, note)


def plain(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For JSON: every round, but of the single calls only what is told of them."""
    return [
        dict(one)
        | {
            "workers": {
                workers: {
                    operation: {name: _plain(each) for name, each in found.items()}
                    for operation, found in by_operation.items()
                }
                for workers, by_operation in one["workers"].items()
            }
        }
        for one in results
    ]


def _plain(found: Found) -> dict[str, Any]:
    figures = {name: value for name, value in vars(found).items() if name != "singles"}
    return figures | {"single_p99_ns": float(np.percentile(found.singles, 99)) if found.singles else None}
