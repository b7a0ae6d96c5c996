"""Does the main job hold on real input? Four workers share a cache several times too small, while buffers take most of
it away.

Each worker stores this Python installation's own files, page by page, into a swap type of its own; other workers load
them back and compare SHA-256 with the file. Meanwhile the parent allocates contiguous buffers from 64 KiB up to most
of the arena. Exit status 1 when one page is wrong or one allocation fails.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import queue
import statistics
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gcma_shm
from gcma_shm.sizes import format_size

if TYPE_CHECKING:
    from gcma_shm import Client, Swap

WORKERS = 4
TIMES_FULL = 5  # how often the files would fill the arena
PAGE_BYTES = 4096
INPUT_BYTES = 192 << 20
FILE_BYTES_MAX = 8 << 20
REPORT_S = 2.0
WATCH_S = 300.0
SIZES = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20]  # and nine tenths of the largest area


@dataclass(frozen=True)
class Stored:
    """A file whose pages are in slots `first` and following of `type`."""

    type: int
    first: int
    pages: int
    size: int
    path: str


@dataclass
class Done:
    """What one worker has done."""

    worker: int
    pages_stored: int = 0
    store_s: float = 0.0
    pages_loaded: int = 0
    load_s: float = 0.0
    files: int = 0
    mismatches: int = 0


def real_files() -> list[Path]:
    """This installation's own standard library, packages and shared objects, up to INPUT_BYTES of them."""
    roots = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    found: dict[Path, int] = {}
    for root in sorted(roots):
        for path in sorted(root.rglob("*")):
            if path.suffix in {".py", ".so", ".pyc"} and path.is_file() and not path.is_symlink():
                size = path.stat().st_size
                if 0 < size <= FILE_BYTES_MAX:
                    found[path] = size
    chosen, total = [], 0
    for path, size in found.items():
        if total + size <= INPUT_BYTES:
            chosen.append(path)
            total += size
    return chosen


def pages_of(data: bytes, page_size: int) -> int:
    return -(-len(data) // page_size)


def store_file(swap: Swap, first: int, path: str, done: Done) -> Stored:
    data = Path(path).read_bytes()
    pages = pages_of(data, swap.page_size)
    padded = memoryview(data.ljust(pages * swap.page_size, b"\0"))
    begin = time.perf_counter()
    for page in range(pages):
        swap.store(first + page, padded[page * swap.page_size : (page + 1) * swap.page_size])
    done.store_s += time.perf_counter() - begin
    done.pages_stored += pages
    return Stored(swap.type, first, pages, len(data), path)


def prove_file(swap: Swap, stored: Stored, done: Done) -> None:
    begin = time.perf_counter()
    pages = [swap.load(stored.first + page) for page in range(stored.pages)]
    done.load_s += time.perf_counter() - begin
    done.pages_loaded += stored.pages
    done.files += 1
    loaded = hashlib.sha256(b"".join(page or b"missing" for page in pages)[: stored.size]).digest()
    if loaded != hashlib.sha256(Path(stored.path).read_bytes()).digest():
        done.mismatches += 1


def work(worker: int, endpoint: str, slots: list[int], files: list[str], inboxes: list[Any], results: Any) -> None:
    """Stores its own files; proves what the others announce in its inbox, until all of them have said that they are
    through.
    """
    done = Done(worker)
    with gcma_shm.connect(endpoint) as client:
        swaps = [
            client.swap(type_, slots=count, write="behind" if type_ % 2 else "through")
            for type_, count in enumerate(slots)
        ]
        others = WORKERS - 1
        announced: list[Stored] = []
        first = 0

        def prove(block: bool) -> int:
            """Proves one announced file; 1 when it was somebody's last word instead."""
            try:
                stored = inboxes[worker].get(block)
            except queue.Empty:
                return 0
            if stored is None:
                return 1
            announced.append(stored)
            prove_file(swaps[stored.type], stored, done)
            return 0

        through = 0
        for path in files:
            stored = store_file(swaps[worker], first, path, done)
            first += stored.pages
            inboxes[(worker + 1) % WORKERS].put(stored)
            through += prove(block=False)
        for inbox in (*inboxes[:worker], *inboxes[worker + 1 :]):
            inbox.put(None)
        while through < others:
            through += prove(block=True)
        for stored in announced:  # once more, now that most of it has left memory
            prove_file(swaps[stored.type], stored, done)
        results.put(done)


def split(files: list[Path]) -> list[list[str]]:
    """The files, dealt out by size so that each worker has about as many pages."""
    parts: list[list[str]] = [[] for _ in range(WORKERS)]
    totals = [0] * WORKERS
    for path in sorted(files, key=lambda p: (-p.stat().st_size, p)):
        least = totals.index(min(totals))
        parts[least].append(str(path))
        totals[least] += path.stat().st_size
    return parts


def sizes_for(client: Client) -> list[int]:
    largest = max(area.size for area in client.areas())
    most = largest * 9 // 10 // client.page_size * client.page_size
    return [size for size in SIZES if size < most] + [most]


def allocate_once(client: Client, size: int, latencies: dict[int, list[float]]) -> int:
    """Allocates, touches and frees one buffer; 1 when that fails."""
    begin = time.perf_counter()
    try:
        buffer = client.alloc_contig(size)
    except gcma_shm.GcmaError as error:
        print(f"  allocation of {format_size(size)} FAILED: {error}")
        return 1
    latencies[size].append(time.perf_counter() - begin)
    with buffer, buffer.view as view:
        view[:: client.page_size] = bytes(len(view[:: client.page_size]))
    return 0


def fullness(client: Client) -> Iterator[str]:
    for area in client.areas():
        buffers, cache = (30 * part // area.size for part in (area.held, area.lent))
        bar = "#" * buffers + "+" * cache + "." * (30 - buffers - cache)
        yield f"  {area.name:<10} [{bar}] buffers {format_size(area.held)}, cache {format_size(area.lent)}, free {format_size(area.free)}"


def watch(client: Client, workers: list[Any], results: Any) -> tuple[dict[int, list[float]], int, list[Done]]:
    """Allocates in all sizes, round and round, until every worker has reported."""
    latencies: dict[int, list[float]] = defaultdict(list)
    failures = 0
    end = time.monotonic() + WATCH_S
    finished: list[Done] = []
    sizes, last = sizes_for(client), time.monotonic()
    while len(finished) < len(workers):
        for size in sizes:
            failures += allocate_once(client, size, latencies)
        try:
            finished.append(results.get(timeout=0.02))  # a moment in which the cache fills up again
        except queue.Empty:
            if any(worker.exitcode not in (None, 0) for worker in workers) or time.monotonic() > end:
                raise RuntimeError("a worker died, its words are above; or it does not come to an end") from None
        if time.monotonic() - last >= REPORT_S:
            last = time.monotonic()
            counters = client.stats()["counters"]
            print(
                f"  {counters['stores']:>7} pages stored, {sum(counters[name] for name in counters if name.startswith('hits_')):>7} loaded, "
                f"{sum(map(len, latencies.values())):>6} buffers, {counters['discards']:>8} cached pages dropped for them",
                flush=True,
            )
    return latencies, failures, finished


def report(client: Client, latencies: dict[int, list[float]], failures: int, finished: list[Done]) -> bool:
    print("\nworker   stored pages/s   loaded pages/s   files proved   mismatches")
    for done in sorted(finished, key=lambda d: d.worker):
        print(
            f"{done.worker:>6} {done.pages_stored / done.store_s:>16,.0f} {done.pages_loaded / done.load_s:>16,.0f} {done.files:>14} {done.mismatches:>12}"
        )
    counters = client.stats()["counters"]
    hits = {name.removeprefix("hits_"): count for name, count in counters.items() if name.startswith("hits_")}
    total = sum(hits.values())
    print("\nhits      " + "   ".join(f"{name} {count:,} ({count / total:.1%})" for name, count in hits.items()))
    print(
        "cache     "
        + ", ".join(
            f"{name} {counters[name]:,}"
            for name in ("promotions", "evictions", "discards", "refaults", "heals", "direct_reclaims")
        )
    )
    print("\nalloc_contig     buffers   median us      p99 us    worst us")
    for size, seconds in sorted(latencies.items()):
        ordered = sorted(seconds)
        p99 = ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)]
        print(
            f"{format_size(size):>12} {len(ordered):>11} {statistics.median(ordered) * 1e6:>11.0f} {p99 * 1e6:>11.0f} {ordered[-1] * 1e6:>11.0f}"
        )
    with client.alloc_contig(max(area.size for area in client.areas()) // 3):
        print("\nareas, with a third of the largest in a buffer")
        print("\n".join(fullness(client)))
    mismatches = sum(done.mismatches for done in finished)
    print(f"\nfailures {failures}, mismatches {mismatches}")
    return not failures and not mismatches


def write(
    out: Path,
    found: dict[str, Any],
    client: Client,
    latencies: dict[int, list[float]],
    failures: int,
    finished: list[Done],
) -> None:
    """The run's record, as the benchmarks here write it."""
    from _common import Section, Verdict, write_json  # needs the `bench` extra; the job itself does not

    workers = [
        [
            done.worker,
            f"{done.pages_stored / done.store_s:,.0f}",
            f"{done.pages_loaded / done.load_s:,.0f}",
            done.files,
            done.mismatches,
        ]
        for done in sorted(finished, key=lambda d: d.worker)
    ]
    buffers = [
        [format_size(size), len(times), *(f"{figure * 1e3:.2f}" for figure in (statistics.median(times), max(times)))]
        for size, times in sorted(latencies.items())
    ]
    counters = client.stats()["counters"]
    hits = {name: count for name, count in counters.items() if name.startswith("hits_")}
    places = ", ".join(f"{name.removeprefix('hits_')} {count / sum(hits.values()):.0%}" for name, count in hits.items())
    verdicts = [
        Verdict("allocations that failed", 0, failures),
        Verdict("files that came back wrong", 0, sum(done.mismatches for done in finished)),
    ]
    sections = [
        Section(
            "Workers",
            ["worker", "stored pages/s", "loaded pages/s", "files proved", "wrong"],
            workers,
            f"Loads by place: {places}.",
            verdicts,
        ),
        Section("alloc_contig beside them", ["size", "buffers", "median ms", "worst ms"], buffers),
    ]
    results = {
        "workers": [asdict(done) for done in finished],
        "alloc_s": latencies,
        "failures": failures,
        "stats": client.stats(),
    }
    write_json(out, " ".join(str(__doc__).split("\n\n")[0].split()), found, {}, results, sections)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the figures there, as JSON")
    parsed = parser.parse_args()
    found: dict[str, Any] = {}
    if parsed.out:
        from _common import machine

        found = machine()
    files = real_files()
    parts = split(files)
    context = multiprocessing.get_context("spawn")
    slots = [sum(-(-Path(path).stat().st_size // PAGE_BYTES) for path in part) for part in parts]
    arena_bytes = sum(slots) * PAGE_BYTES // TIMES_FULL
    with gcma_shm.embedded(arena_bytes, page_size=PAGE_BYTES, slots=sum(slots)) as client:
        print(
            f"An arena of {format_size(arena_bytes)}, {WORKERS} workers, {len(files)} files with {sum(slots)} pages of {PAGE_BYTES} bytes: "
            f"{sum(slots) * PAGE_BYTES / sum(area.size for area in client.areas()):.1f} times what the areas hold."
        )
        print("Storing and proving, while the parent takes up to nine tenths of the area away and gives it back:")
        inboxes = [context.Queue() for _ in range(WORKERS)]
        results = context.Queue()
        workers = [
            context.Process(target=work, args=(n, client.endpoint, slots, parts[n], inboxes, results))
            for n in range(WORKERS)
        ]
        for worker in workers:
            worker.start()
        try:
            latencies, failures, finished = watch(client, workers, results)
        finally:
            for worker in workers:
                worker.join(timeout=10)
                worker.kill()
        sound = report(client, latencies, failures, finished)
        if parsed.out:
            write(parsed.out, found, client, latencies, failures, finished)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
