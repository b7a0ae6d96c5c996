"""Does every page come back whole under load, and how fast?

Worker processes store, load and invalidate pages of one swap type as fast as they can; the parent may allocate contiguous buffers meanwhile.
Each page carries its slot, its writer and a sequence, spread over all of its bytes; every load checks that the page is whole, of this slot, and
not older than what this process has seen of the same writer there before. Exit status 1 on any wrong page, lost page, failed allocation or
changed byte of a buffer. With `--record`, every operation is noted with its start and end, and at the end each slot must have behaved as an atomic
register; the times are then with the noting. (`gcma stress` does that while processes die and the disk is full.)
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from _common import (
    OUT,
    Histogram,
    Section,
    Verdict,
    crew,
    describe_machine,
    machine,
    scratch,
    table,
    write_json,
)
from stress_work import OPERATIONS, TOLD_MAX, TYPE, WRITER_BITS, Load, Report, log_of, make_worker

import gcma_shm
from gcma_shm.clients import linearizable
from gcma_shm.clients.history import Log, gather
from gcma_shm.sizes import format_size, parse_size

PLACES = ("hits_nursery", "hits_area", "hits_zero", "hits_filled", "hits_spill", "misses")
GUEST_MIN_BYTES = 64 << 10


class Guests:
    """Allocates buffers one at a time, writes into every page, looks at them again, frees them."""

    def __init__(self, endpoint: str, seed: int, stack: ExitStack) -> None:
        self._client = stack.enter_context(gcma_shm.connect(endpoint, mapped=True))
        self._rng = np.random.default_rng([seed, 1 << 20])
        self._max_bytes = max(area.size for area in self._client.areas())
        self.report = Report(times={"alloc": Histogram(), "free": Histogram()})
        self.failures = 0

    def run(self, per_second: float, seconds: float) -> None:
        """Until the time is over. One at a time, so nothing but cache is ever in the way: every failure counts."""
        start = time.monotonic()
        due = start
        while time.monotonic() - start < seconds:
            self._one()
            due += 1 / per_second
            time.sleep(max(min(due, start + seconds) - time.monotonic(), 0))
        self.report.seconds = time.monotonic() - start

    def _one(self) -> None:
        least = min(GUEST_MIN_BYTES, self._max_bytes)
        nbytes = int(np.exp(self._rng.uniform(np.log(least), np.log(self._max_bytes))))
        clock = time.perf_counter_ns
        start = clock()
        try:
            buffer = self._client.alloc_contig(nbytes)
        except gcma_shm.GcmaError as error:
            self.failures += 1
            self.report.wrong(f"a buffer of {format_size(nbytes)}: {error}")
            return
        self.report.times["alloc"].add([clock() - start])
        mark = self._rng.integers(1, 1 << 62)
        words = buffer.numpy(buffer.nbytes // 8, "int64")
        at_pages = words[:: self._client.page_size // 8]
        at_pages[:] = np.arange(at_pages.size) ^ mark
        time.sleep(0.002)
        changed = int(np.count_nonzero(at_pages != np.arange(at_pages.size) ^ mark))
        if changed:
            self.report.wrong(
                f"a buffer of {format_size(nbytes)}: {changed} of its pages were changed by somebody else"
            )
        del at_pages, words
        start = clock()
        buffer.free()
        self.report.times["free"].add([clock() - start])
        self.report.pages["alloc"] += 1
        self.report.pages["alloc_bytes"] += nbytes


def parse_mix(words: str) -> tuple[float, float, float]:
    """`"50:45:5"`: shares of stores, loads and invalidations."""
    store, load, invalidate = (float(word) for word in words.split(":"))
    if min(store, load, invalidate) < 0 or store + load + invalidate <= 0:
        raise ValueError(words)
    return store, load, invalidate


def stress(options: argparse.Namespace, endpoint: str) -> tuple[Report, Report, int, dict[str, Any]]:
    """Runs the workers, and the guests meanwhile: the workers' report, the guests', failed allocations, what the broker counted."""
    with ExitStack() as stack:
        watcher = stack.enter_context(gcma_shm.connect(endpoint))
        slots = options.slots or 2 * watcher.stats()["arena"]["size"] // watcher.page_size
        load = Load(
            endpoint,
            options.workers,
            slots,
            options.write,
            options.mix,
            options.zipf,
            options.batch,
            options.seed,
            not options.messages,
            stack.enter_context(scratch()) if options.record else None,
        )
        guests = Guests(endpoint, options.seed, stack)
        team = stack.enter_context(crew(options.workers, make_worker, load))
        if not options.no_fill:
            print(f"filling {slots} slots of {format_size(watcher.page_size)} ...", flush=True)
            team.ask("fill")
        print(f"{options.workers} workers for {options.duration:g} s ...", flush=True)
        before = watcher.stats()["counters"]
        for connection in team.connections:
            connection.send(("run", options.duration))
        if options.guests:
            guests.run(options.guests, options.duration)
        report = Report()
        for connection in team.connections:
            report.merge(team.answer(connection))
        after = watcher.stats()["counters"]
        start = time.perf_counter_ns()
        watcher.swap(TYPE, slots, write="behind" if options.write == "behind" else "through").sync(timeout=60)
        sync_ms = (time.perf_counter_ns() - start) / 1e6
        print("looking at every slot once more ...", flush=True)
        for last in team.ask("check"):
            report.errors += last.errors
            report.told = (report.told + last.told)[:TOLD_MAX]
        counters = {name: after[name] - before[name] for name in after}
        if load.record is not None:
            judge(load, report)
        return report, guests.report, guests.failures, {"counters": counters, "slots": slots, "sync_ms": sync_ms}


def judge(load: Load, report: Report) -> None:
    """Checks the history that the workers have recorded."""
    assert load.record is not None
    history = gather([Log(log_of(load.record, index), index + 1) for index in range(load.workers)])
    print(f"checking the history of {len(history)} operations ...", flush=True)
    for words in linearizable.check(history):
        report.wrong(f"no atomic register: {words}")


def tell(report: Report, guests: Report, failures: int, counted: dict[str, Any]) -> dict[str, Any]:
    """Prints the tables; returns the results for JSON."""
    rows, results = [], {}
    for part, names in ((report, OPERATIONS), (guests, ("alloc", "free"))):
        for name in names:
            times = part.times.get(name)
            if times is None or not times.counts.sum():
                continue
            found = times.describe()
            pages = part.pages[name if name != "free" else "alloc"]
            rows.append(
                [
                    name,
                    pages,
                    pages / part.seconds,
                    found["median_us"],
                    found["p99_us"],
                    found["p99.9_us"],
                    found["worst_us"],
                ]
            )
            results[name] = found | {"pages": pages, "per_second": pages / part.seconds}
    print("\n" + table(["operation", "count", "a second", "median us", "p99", "p99.9", "worst"], rows))
    counters = counted["counters"]
    loads = sum(counters[name] for name in PLACES) or 1
    print(
        "\n"
        + table(
            ["loads by place", "count", "share"],
            [[name, counters[name], f"{counters[name] / loads:.1%}"] for name in PLACES],
        )
    )
    others = {name: value for name, value in counters.items() if value and name not in PLACES}
    print("\n" + ", ".join(f"{name} {value}" for name, value in others.items()))
    print(f"sync at the end {counted['sync_ms']:.1f} ms")
    errors = report.errors + guests.errors - failures
    print(f"wrong pages and bytes: {errors}; failed allocations: {failures}")
    for words in (*report.told, *guests.told):
        print(f"  {words}", file=sys.stderr)
    return {
        "operations": results,
        "errors": errors,
        "failures": failures,
        "told": report.told + guests.told,
        "guest_bytes": guests.pages["alloc_bytes"],
        **counted,
    }


def section(results: dict[str, Any]) -> Section:
    """What is published."""
    names = ("count", "per_second", "median_us", "p99_us", "p99.9_us", "worst_us")
    rows = [[name, *(found[figure] for figure in names)] for name, found in results["operations"].items()]
    verdicts = [
        Verdict("wrong pages and bytes", 0, results["errors"]),
        Verdict("allocations that failed", 0, results["failures"]),
    ]
    columns = ["operation", "calls", "pages a second", "median µs", "p99", "p99.9", "worst"]
    return Section("Operations of all workers", columns, rows, verdicts=verdicts)


def main(argv: list[str] | None = None) -> int:
    """Runs the stress; returns the exit status: 1 when anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--endpoint", help="of a broker that runs already (type 0 must be undeclared or alike); default: one of its own"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    parser.add_argument("--mix", type=parse_mix, default=(50.0, 45.0, 5.0), metavar="STORE:LOAD:INVALIDATE")
    parser.add_argument("--zipf", type=float, default=0.0, metavar="S", help="skew; 0: uniform (default)")
    parser.add_argument("--page-size", type=parse_size, default=4096, metavar="SIZE")
    parser.add_argument("--arena", type=parse_size, default=64 << 20, metavar="SIZE")
    parser.add_argument("--slots", type=int, metavar="N", help="default: twice as many as the arena would hold")
    parser.add_argument("--write", choices=("through", "behind"), default="through")
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="pages per store_many and load_many (default: 1, page by page)",
    )
    parser.add_argument(
        "--messages", action="store_true", help="workers do not map the arena; every page travels in a message"
    )
    parser.add_argument("--duration", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument(
        "--guests", type=float, default=0.0, metavar="PER_SECOND", help="contiguous allocations by the parent"
    )
    parser.add_argument("--record", action="store_true", help="note every operation, and check the history at the end")
    parser.add_argument("--no-fill", action="store_true", help="do not store every slot once before")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--out", type=Path, default=OUT / "stress.json", metavar="FILE")
    options = parser.parse_args(argv)
    if not 1 <= options.workers < 1 << WRITER_BITS or options.batch < 1 or options.duration <= 0 or options.guests < 0:
        parser.error("workers and batch must be at least 1, the duration more than 0, guests not less than 0")
    found = machine()
    print(describe_machine(found))
    print(f"seed {options.seed}")
    with ExitStack() as stack:
        endpoint = options.endpoint
        if endpoint is None:
            owner = gcma_shm.embedded(
                options.arena, page_size=options.page_size, slots=options.slots or 2 * options.arena // options.page_size + 1,
                spill_dir=stack.enter_context(scratch()), clients=max(options.workers + 8, 16),
            )  # fmt: skip
            endpoint = stack.enter_context(owner).endpoint
        parts = stress(options, endpoint)
    results = tell(*parts)
    question = "Does every page come back whole under load, and how fast?"
    write_json(options.out, question, found, vars(options), results, [section(results)])
    return 1 if results["errors"] or results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
