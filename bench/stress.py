"""Does every page come back whole under load, and how fast?

Worker processes store, load and invalidate pages of one swap type as fast as they can; the parent may allocate contiguous buffers meanwhile.
Each page carries its slot, its writer and a sequence, spread over all of its bytes; every load checks that the page is whole, of this slot, and
not older than what this process has seen of the same writer there before. Exit status 1 on any wrong page, lost page, failed allocation or
changed byte of a buffer.
"""

from __future__ import annotations

import argparse
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from _common import OUT, Histogram, crew, describe_machine, machine, scratch, table, write_json

import gcma_shm
from gcma_shm.sizes import format_size, parse_size

OPERATIONS = ("store", "load", "invalidate")
PLACES = ("hits_nursery", "hits_area", "hits_zero", "hits_spill", "misses")
TOLD_MAX = 20  # errors that are told in full
DRAW = 8192  # operations that are drawn at once, before they are timed
TYPE = 0
WRITER_BITS = 12
MASK = (1 << 64) - 1
MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)  # odd, so that every bit of a stamp reaches the words
GUEST_MIN_BYTES = 64 << 10

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Load:
    """What each worker does."""

    endpoint: str
    workers: int
    slots: int
    write: str
    mix: tuple[float, float, float]
    zipf: float
    batch: int
    seed: int
    mapped: bool = True


@dataclass
class Report:
    """What one worker, or all, came to."""

    pages: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    times: dict[str, Histogram] = field(default_factory=dict)
    errors: int = 0
    told: list[str] = field(default_factory=list)

    def wrong(self, words: str) -> None:
        """Counts an error of content."""
        self.errors += 1
        if len(self.told) < TOLD_MAX:
            self.told.append(words)

    def merge(self, other: Report) -> None:
        """Adds another one's."""
        self.pages.update(other.pages)
        self.seconds = max(self.seconds, other.seconds)
        for name, times in other.times.items():
            self.times.setdefault(name, Histogram()).merge(times)
        self.errors += other.errors
        self.told = (self.told + other.told)[:TOLD_MAX]


class Stamp:
    """Makes pages that tell what they are in every word, and reads them.

    The first word is the slot and the writer, the second the sequence; every other one is noise of its place and of the two.
    """

    def __init__(self, page_size: int, seed: int) -> None:
        self._base: Words = np.random.default_rng(seed).integers(1, 1 << 64, page_size // 8, np.uint64)
        self._base[:2] = 0

    def write(self, page: Words, slot: int, writer: int, sequence: int) -> None:
        """Fills `page`."""
        who = slot << WRITER_BITS | writer
        np.bitwise_xor(self._base, self._noise(who, sequence), out=page)
        page[0], page[1] = who, sequence

    def read(self, page: Words) -> tuple[int, int, int] | None:
        """Slot, writer and sequence; None: the page is not whole."""
        who, sequence = int(page[0]), int(page[1])
        if not np.array_equal(page[2:] ^ self._noise(who, sequence), self._base[2:]):
            return None
        return who >> WRITER_BITS, who & (1 << WRITER_BITS) - 1, sequence

    @staticmethod
    def _noise(who: int, sequence: int) -> np.uint64:
        return np.uint64(who * MULTIPLIERS[0] + sequence * MULTIPLIERS[1] & MASK)


class Draws:
    """Operations and slots in random order from a seed, drawn many at once."""

    def __init__(self, load: Load, index: int) -> None:
        self._rng = np.random.default_rng([load.seed, index])
        self._mix = np.cumsum(load.mix) / sum(load.mix)
        self._slots = load.slots
        self._zipf: npt.NDArray[np.float64] | None = None
        if load.zipf > 0:
            self._zipf = np.cumsum(1.0 / np.arange(1, load.slots + 1, dtype=np.float64) ** load.zipf)
            # The same slots are popular with all workers, and not neighbours.
            self._order = np.random.default_rng(load.seed).permutation(load.slots)

    def operations(self, count: int) -> list[int]:
        """Indices into OPERATIONS."""
        operations: list[int] = np.searchsorted(self._mix, self._rng.random(count), side="right").tolist()
        return operations

    def slots(self, count: int) -> list[int]:
        """By the skew."""
        if self._zipf is None:
            drawn: list[int] = self._rng.integers(0, self._slots, count).tolist()
        else:
            ranks = np.searchsorted(self._zipf, self._rng.random(count) * self._zipf[-1], side="right")
            drawn = self._order[ranks].tolist()
        return drawn


class Worker:
    """One process's part."""

    def __init__(self, index: int, stack: ExitStack, load: Load) -> None:
        self._index = index
        self._load = load
        self._client = stack.enter_context(gcma_shm.connect(load.endpoint, mapped=load.mapped))
        self._swap = self._client.swap(TYPE, load.slots, write="behind" if load.write == "behind" else "through")
        self._draws = Draws(load, index)
        self._stamp = Stamp(self._client.page_size, load.seed)
        self._pages: list[Words] = [np.zeros(self._client.page_size // 8, np.uint64)]
        self._many: Words = np.zeros((load.batch, self._client.page_size // 8), np.uint64)
        self._sequence = 0
        # The newest sequence seen, of each writer and slot, and whether the slot was seen to hold a page at all.
        self._seen = [array("Q", bytes(8 * load.slots)) for _ in range(load.workers)]
        self._held = bytearray(load.slots)
        self._report = Report()
        self._lost_counts = load.mix[2] == 0  # without invalidations, a page that was there stays there

    def act(self, verb: str, *arguments: Any) -> Any:
        """Does what the parent asks: `fill`, `run` or `check`."""
        action: Callable[..., Any] = getattr(self, verb)
        return action(*arguments)

    def fill(self) -> None:
        """Stores this worker's share of all slots."""
        for slot in range(self._index, self._load.slots, self._load.workers):
            self._store(slot)

    def run(self, seconds: float) -> Report:
        """The mix, for so long."""
        self._report = Report(times={name: Histogram() for name in OPERATIONS})
        one = self._single if self._load.batch == 1 else self._batch
        start = time.monotonic()
        while (now := time.monotonic() - start) < seconds:
            one(start + seconds)
        self._report.seconds = now
        return self._report

    def check(self) -> Report:
        """Loads this worker's share of all slots once more."""
        self._report = Report()
        for slot in range(self._index, self._load.slots, self._load.workers):
            self._check(slot, self._swap.load_into(slot, self._pages[0]), self._pages[0], "at the end")
        return self._report

    def _single(self, end: float) -> None:
        clock, page, swap = time.perf_counter_ns, self._pages[0], self._swap
        times: tuple[array[int], ...] = (array("Q"), array("Q"), array("Q"))
        for n, (operation, slot) in enumerate(zip(self._draws.operations(DRAW), self._draws.slots(DRAW), strict=True)):
            if operation == 0:
                took = self._store(slot)
            elif operation == 1:
                start = clock()
                hit = swap.load_into(slot, page)
                took = clock() - start
                self._check(slot, hit, page, "")
            else:
                start = clock()
                swap.invalidate_page(slot)
                took = clock() - start
            times[operation].append(took)
            if n % 64 == 63 and time.monotonic() >= end:
                break
        for name, taken in zip(OPERATIONS, times, strict=True):
            self._report.times[name].add(taken)
            self._report.pages[name] += len(taken)

    def _store(self, slot: int) -> int:
        self._sequence += 1
        page = self._pages[0]
        self._stamp.write(page, slot, self._index, self._sequence)
        start = time.perf_counter_ns()
        self._swap.store(slot, page)
        took = time.perf_counter_ns() - start
        self._seen[self._index][slot] = self._sequence
        self._held[slot] = 1
        return took

    def _batch(self, _end: float) -> None:
        clock, size = time.perf_counter_ns, self._load.batch
        operation, slots = self._draws.operations(1)[0], self._draws.slots(size)
        if operation == 0:
            for page, slot in zip(self._many, slots, strict=True):
                self._sequence += 1
                self._stamp.write(page, slot, self._index, self._sequence)
            start = clock()
            self._swap.store_many(slots, self._many)
            took = clock() - start
            for n, slot in enumerate(slots):  # of equal slots the last wins
                self._seen[self._index][slot] = self._sequence - size + 1 + n
                self._held[slot] = 1
        elif operation == 1:
            start = clock()
            hits = self._swap.load_many(slots, self._many)
            took = clock() - start
            for page, slot, hit in zip(self._many, slots, hits, strict=True):
                self._check(slot, hit, page, "in a batch")
        else:
            start = clock()
            for slot in slots:
                self._swap.invalidate_page(slot)
            took = clock() - start
        self._report.times[OPERATIONS[operation]].add([took / size])
        self._report.pages[OPERATIONS[operation]] += size

    def _check(self, slot: int, hit: bool, page: Words, where: str) -> None:
        if not hit:
            if self._lost_counts and self._held[slot]:
                self._report.wrong(f"slot {slot} {where}: its page is lost")
            return
        read = self._stamp.read(page)
        if read is None:
            self._report.wrong(f"slot {slot} {where}: a page that is not whole, stamp {int(page[0]):#x}")
            return
        found, writer, sequence = read
        if found != slot or writer >= self._load.workers:
            self._report.wrong(f"slot {slot} {where}: the page of slot {found}, writer {writer}, sequence {sequence}")
        elif sequence < self._seen[writer][slot]:
            self._report.wrong(
                f"slot {slot} {where}: sequence {sequence} of writer {writer} after {self._seen[writer][slot]} was seen"
            )
        else:
            self._seen[writer][slot] = sequence
            self._held[slot] = 1


def make_worker(index: int, stack: ExitStack, load: Load) -> Callable[..., Any]:
    """A worker process's ear."""
    return Worker(index, stack, load).act


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
        return report, guests.report, guests.failures, {"counters": counters, "slots": slots, "sync_ms": sync_ms}


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
    write_json(options.out, "Does every page come back whole under load, and how fast?", found, vars(options), results)
    return 1 if results["errors"] or results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
