"""What do the three ways of reading and writing spill files cost, and what do they leave in the page cache?

Each way has a broker of its own and the same pages, far more than its arena has room for; they take turns, a batch each, within rounds. Asked are
stores written through, stores written behind with the file counted (`sync` ends the clock), loads of what is in the file alone, at random and in
order, and loads from memory; and how much of the spill file the page cache holds afterwards. Then, in C, on bare files: writes and reads of
1 to 64 neighbours in one call, single writes of a file that was laid so, and scattered writes one by one or 32 at once through io_uring. In the
end, how many writes overwriting saves on a skewed workload.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from _common import OUT, Ratio, Samples, Summary, compile_c, describe_machine, machine, scratch, table, write_json

import gcma_shm
from gcma_shm import layout
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.swap import Swap
from gcma_shm.sizes import format_size, parse_size

WAYS = layout.SPILL_IO
TIMES = 4  # as many pages as the arena has room for
RUNS = (1, 4, 16, 64)
JOBS = (
    "store through",
    "store behind, synced",
    "load, file, random",
    "load, file, in order",
    "load, memory",
    "load, file, in reverse",
)
# Those of a group take turns within a round. Stores bring pages into memory that loads are to find in the file, so they come before.
GROUPS = ((JOBS[0],), (JOBS[1],), (JOBS[2], JOBS[3], JOBS[5]), (JOBS[4],))
SPILLED = 2  # state of a slot word
IN_ORDER = 4  # as many loads in order as at random
WINS = 3.0  # what a hit in memory has to be ahead of a load from the file, where that is not in the page cache
_C_SOURCE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* `way`: 0 buffered, 1 RWF_DONTCACHE, 2 O_DIRECT, 3 with sync_file_range, waited for, and POSIX_FADV_DONTNEED, 4 the same not waited for. */
static int one(int fd, char *pages, int64_t at, int run, size_t size, int way, int writes)
{
    struct iovec parts[64];
    for (int i = 0; i < run; i++)
        parts[i] = (struct iovec){pages + i * size, size};
    int flags = way == 1 ? 0x80 : 0;
    ssize_t done = writes ? pwritev2(fd, parts, run, at, flags) : preadv2(fd, parts, run, at, flags);
    if (writes && way >= 3)
        sync_file_range(fd, at, run * size, way == 3 ? 7 : SYNC_FILE_RANGE_WRITE);
    if (way == 3)
        posix_fadvise(fd, at, run * size, POSIX_FADV_DONTNEED);
    return done == (ssize_t)(run * size) ? 0 : -1;
}

/* Runs of `run` neighbours at each of n places. */
int runs(int fd, char *pages, const int64_t *which, size_t n, int run, size_t size, int way, int writes)
{
    for (size_t i = 0; i < n; i++)
        if (one(fd, pages, which[i] * size, run, size, way, writes))
            return -1;
    return 0;
}

struct ring {
    int fd;
    unsigned *tail, *mask, *array, *done_head, *done_tail, *done_mask;
    struct io_uring_sqe *entries;
    struct io_uring_cqe *done;
};

static int open_ring(struct ring *r, unsigned depth)
{
    struct io_uring_params p = {0};
    r->fd = syscall(SYS_io_uring_setup, depth, &p);
    if (r->fd < 0)
        return -errno;
    char *sq = mmap(0, p.sq_off.array + p.sq_entries * 4, 3, MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_SQ_RING);
    char *cq = mmap(0, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe), 3, MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_CQ_RING);
    r->entries = mmap(0, p.sq_entries * sizeof *r->entries, 3, MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_SQES);
    if (sq == MAP_FAILED || cq == MAP_FAILED || r->entries == MAP_FAILED)
        return -ENOMEM;
    r->tail = (unsigned *)(sq + p.sq_off.tail), r->mask = (unsigned *)(sq + p.sq_off.ring_mask), r->array = (unsigned *)(sq + p.sq_off.array);
    r->done_head = (unsigned *)(cq + p.cq_off.head), r->done_tail = (unsigned *)(cq + p.cq_off.tail), r->done_mask = (unsigned *)(cq + p.cq_off.ring_mask);
    r->done = (struct io_uring_cqe *)(cq + p.cq_off.cqes);
    return 0;
}

/* Single pages at n places, `depth` under way at a time: submitted together, and waited for together, as a batch of cleaning would. */
int by_ring(int fd, char *pages, const int64_t *which, size_t n, size_t size, unsigned depth, int writes)
{
    struct ring r;
    int failed = open_ring(&r, depth);
    for (size_t first = 0; !failed && first < n; first += depth) {
        unsigned count = n - first < depth ? n - first : depth, tail = *r.tail;
        for (unsigned i = 0; i < count; i++, tail++) {
            struct io_uring_sqe *e = &r.entries[tail & *r.mask];
            memset(e, 0, sizeof *e);
            e->opcode = writes ? IORING_OP_WRITE : IORING_OP_READ;
            e->fd = fd, e->addr = (uint64_t)(pages + i * size), e->len = size, e->off = which[first + i] * size;
            r.array[tail & *r.mask] = tail & *r.mask;
        }
        __atomic_store_n(r.tail, tail, __ATOMIC_RELEASE);
        if (syscall(SYS_io_uring_enter, r.fd, count, count, IORING_ENTER_GETEVENTS, 0, 0) != (long)count)
            failed = -errno;
        unsigned head = *r.done_head;
        for (; !failed && head != __atomic_load_n(r.done_tail, __ATOMIC_ACQUIRE); head++)
            if (r.done[head & *r.done_mask].res != (int)size)
                failed = r.done[head & *r.done_mask].res;
        __atomic_store_n(r.done_head, head, __ATOMIC_RELEASE);
    }
    if (r.fd >= 0)
        close(r.fd);
    return failed;
}

long cached(int fd, size_t size, unsigned char *states)
{
    long found = 0;
    void *at = mmap(0, size, PROT_READ, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED || mincore(at, size, states))
        return -1;
    for (size_t i = 0; i < size / 4096; i++)
        found += states[i] & 1;
    munmap(at, size);
    return found;
}
"""


class Bare:
    """The C side."""

    def __init__(self, directory: Path) -> None:
        library = ctypes.CDLL(str(compile_c(directory, "spill_io", _C_SOURCE)))
        p, n, i = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        library.runs.argtypes = [i, p, p, n, i, n, i, i]
        library.by_ring.argtypes = [i, p, p, n, n, ctypes.c_uint, i]
        library.cached.argtypes, library.cached.restype = [i, n, p], ctypes.c_long
        self.runs: Callable[..., int] = library.runs
        self.by_ring: Callable[..., int] = library.by_ring
        self._cached: Callable[..., int] = library.cached

    def cached_bytes(self, file: Path) -> int:
        """What the page cache holds of a file."""
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size // 4096 * 4096
            pages = self._cached(opened.fileno(), size, ctypes.create_string_buffer(size // 4096 + 1))
        if pages < 0:
            raise OSError("mincore failed")
        return pages * 4096


class Way:
    """One way: a broker, a type written through and one written behind, and the pages of both."""

    def __init__(self, name: str, size: int, page_size: int, directory: Path, stack: ExitStack) -> None:
        self.name = name
        directory.mkdir()
        self.directory = directory
        slots = TIMES * size // page_size
        self.client: EmbeddedClient = stack.enter_context(
            gcma_shm.embedded(size, page_size=page_size, slots=2 * slots, clients=8, spill_dir=directory, spill_io=name)
        )
        self.slots = slots
        self.through: Swap = self.client.swap(0, slots)
        self.behind: Swap = self.client.swap(1, slots, "behind")
        self.page = bytearray(np.random.default_rng(1).bytes(page_size))
        for first in range(0, slots, 64):
            which = range(first, min(first + 64, slots))
            self.through.store_many(which, bytes(self.page) * len(which))
            self.behind.store_many(which, bytes(self.page) * len(which))
        self.behind.sync()
        self._random = np.random.default_rng(2)

    def file(self, type_: int) -> Path:
        """The spill file of a type."""
        (found,) = self.directory.glob(f"*/{type_:03}.*")
        return found

    def job(self, name: str, batch: int) -> Callable[[], None]:
        """A batch of one job. What is to be loaded from the file is in the file alone when the job is made."""
        if name == JOBS[0]:
            return lambda: self._store(self.through, self._anywhere(batch))
        if name == JOBS[1]:
            return lambda: self._store(self.behind, self._anywhere(batch), sync=True)
        if name == JOBS[2]:
            return self._loads(self._random.choice(self._spilled(), batch, replace=False).tolist())
        if name in (JOBS[3], JOBS[5]):
            stretch = self._stretch(IN_ORDER * batch)
            return self._loads(stretch if name == JOBS[3] else stretch[::-1])  # nothing is read ahead of a reverse one
        hot = self._anywhere(batch // 4)
        self._store(self.through, hot)
        return self._loads(hot * 4)

    def _anywhere(self, count: int) -> list[int]:
        found: list[int] = self._random.integers(0, self.slots, count).tolist()
        return found

    def _store(self, swap: Swap, which: list[int], sync: bool = False) -> None:
        for n in which:
            swap.store(n, self.page)
        if sync:
            swap.sync()

    def _loads(self, which: list[int]) -> Callable[[], None]:
        def load() -> None:
            for n in which:
                self.through.load_into(n, self.page)

        return load

    def _spilled(self) -> npt.NDArray[np.int64]:
        """The slots whose pages are in the file alone."""
        plane = self.client._plane
        assert plane is not None
        g = plane.geometry
        words = plane.read_many(
            g.slots_at + layout.SLOT_BYTES * plane.read(g.type_at(0) + layout.TYPE_BASE_AT),
            self.slots,
            layout.SLOT_BYTES,
        )
        found: npt.NDArray[np.int64] = np.flatnonzero(
            np.array(words, np.uint64) >> np.uint64(33) & np.uint64(7) == SPILLED
        )
        return found

    def _stretch(self, batch: int) -> list[int]:
        """Neighbours, each but a few in the file alone."""
        spilled = np.zeros(self.slots + 1, np.int64)
        spilled[self._spilled()] = 1
        counts = np.convolve(spilled[:-1], np.ones(batch, np.int64), "valid")
        start = int(self._random.choice(np.flatnonzero(counts >= min(0.9 * batch, counts.max()))))
        return list(range(start, start + batch))

    def hits(self) -> tuple[int, int]:
        """Loads served from the file, and pages that were read ahead."""
        counters = self.client.stats()["counters"]
        return counters["hits_spill"], counters["read_ahead"]


def timed(job: Callable[[], object], operations: int) -> float:
    """Nanoseconds an operation."""
    begun = time.perf_counter_ns()
    job()
    return (time.perf_counter_ns() - begun) / operations


def measure_ways(page_size: int, size: int, rounds: int, directory: Path, bare: Bare) -> dict[str, Any]:
    """The three ways side by side."""
    batch = 64
    with ExitStack() as stack:
        ways = [Way(name, size, page_size, directory / name, stack) for name in WAYS]
        times: dict[str, dict[str, list[float]]] = {job: {name: [] for name in WAYS} for job in JOBS}
        from_file: dict[str, dict[str, int]] = {job: dict.fromkeys(WAYS, 0) for job in JOBS}
        for number, group in ((number, group) for group in GROUPS for number in range(rounds)):
            for way in ways[number % 3 :] + ways[: number % 3]:
                for job in group:
                    before = way.hits()
                    work = way.job(job, batch)
                    times[job][way.name].append(timed(work, IN_ORDER * batch if job in (JOBS[3], JOBS[5]) else batch))
                    from_file[job][way.name] += way.hits()[0] - before[0]
        ahead = {way.name: way.hits()[1] for way in ways}
        time.sleep(2.5)  # twice what the broker's dropping takes to come round
        cache = {way.name: sum(bare.cached_bytes(way.file(type_)) for type_ in (0, 1)) for way in ways}
        whole = sum(way.file(type_).stat().st_size for way in ways for type_ in (0, 1)) // len(ways)
    rows = []
    for job in JOBS:
        row: list[object] = [job]
        for name in WAYS:
            row += [f"{np.median(times[job][name]) / 1000:.1f}"]
        row += [str(Ratio.of(times[job][name], times[job]["buffered"])) for name in WAYS[1:]]
        rows.append(row)
    rows.append(
        [
            "a load in order / in reverse",
            *(str(Ratio.of(times[JOBS[3]][n], times[JOBS[5]][n])) for n in WAYS),
            "",
            "",
        ]
    )
    rows.append(
        [
            "a random load from the file / from memory",
            *(str(Ratio.of(times[JOBS[2]][n], times[JOBS[4]][n])) for n in WAYS),
            "",
            "",
        ]
    )
    rows.append(
        [
            "loads served from the file: random, in order",
            *(
                f"{share(from_file, JOBS[2], n, rounds * batch)}, {share(from_file, JOBS[3], n, rounds * IN_ORDER * batch)}"
                for n in WAYS
            ),
            "",
            "",
        ]
    )
    rows.append(["of the files in the page cache", *(f"{cache[name] / whole:.0%}" for name in WAYS), "", ""])
    head = [f"{format_size(page_size)}, us a page", *WAYS, "uncached / buffered", "direct / buffered"]
    print("\n" + table(head, rows), flush=True)
    for name in WAYS[1:]:
        ratio = Ratio.of(times[JOBS[2]][name], times[JOBS[4]][name])
        print(
            f"{name}: a hit in memory wins by {ratio}, at least {WINS:g} expected: {'met' if ratio.median >= WINS else 'missed'}"
        )
    summaries = {
        job: {name: Summary.of(np.asarray(values)) for name, values in of.items()} for job, of in times.items()
    }
    return {"times": summaries, "page_cache": cache, "files": whole, "from_file": from_file, "read_ahead": ahead}


def share(from_file: dict[str, dict[str, int]], job: str, name: str, of: int) -> str:
    """How many of the loads read the file."""
    return f"{from_file[job][name] / of:.0%}"


@contextlib.contextmanager
def bare_file(path: Path, direct: bool) -> Iterator[int]:
    """A fresh file."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0))
    try:
        yield fd
    finally:
        os.close(fd)
        path.unlink()


BARE = ("buffered", "uncached", "direct", "fadvise, waited for", "fadvise, not waited for")


def places(random: np.random.Generator, pages: int, count: int, run: int) -> npt.NDArray[np.int64]:
    """Where runs begin: none overlaps another."""
    found: npt.NDArray[np.int64] = random.permutation(pages // run)[:count].astype(np.int64) * run
    return found


def measure_bare(page_size: int, rounds: int, directory: Path, bare: Bare) -> dict[str, Any]:
    """Runs of neighbours, what laying a file in them does to later single writes, and io_uring, on bare files."""
    pages = max((64 << 20) // page_size, 1024)
    memory = mmap.mmap(-1, 64 * page_size)
    memory[:] = np.random.default_rng(4).bytes(64 * page_size)
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    random = np.random.default_rng(5)
    found: dict[str, Samples] = {}
    for way, name in enumerate(BARE):
        for laid in RUNS:
            with bare_file(directory / "bare", direct=name == "direct") as fd:

                def call(which: npt.NDArray[np.int64], run: int, writes: int, fd: int = fd, way: int = way) -> float:
                    begun = time.perf_counter_ns()
                    if bare.runs(fd, at, which.ctypes.data, which.size, run, page_size, way, writes):
                        raise OSError("a write or a read failed")
                    return (time.perf_counter_ns() - begun) / (which.size * run)

                found[f"{name}: lay, runs of {laid}"] = np.array([call(np.arange(0, pages, laid), laid, 1)])
                os.fsync(fd)
                again = [call(places(random, pages, 128, 1), 1, 1) for _ in range(rounds)]
                found[f"{name}: write one, laid in runs of {laid}"] = np.array(again)
                if name != "fadvise, waited for":
                    some = [call(places(random, pages, 256 // laid, laid), laid, 1) for _ in range(rounds)]
                    found[f"{name}: write runs of {laid}"] = np.array(some)
                if name == "direct":
                    found[f"{name}: read runs of {laid}"] = np.array(
                        [call(places(random, pages, 256 // laid, laid), laid, 0) for _ in range(rounds)]
                    )
    rows = [[job, *(_micro(found, f"{name}: {job}") for name in BARE)] for job in _jobs()]
    print("\n" + table([f"bare files, {format_size(page_size)}, us a page", *BARE], rows), flush=True)
    ring = measure_ring(page_size, pages, rounds, directory, bare, at)
    return {"runs": {name: Summary.of(values) for name, values in found.items()}, "io_uring": ring}


def _jobs() -> list[str]:
    return [
        *(f"lay, runs of {run}" for run in RUNS),
        *(f"write one, laid in runs of {run}" for run in RUNS),
        *(f"write runs of {run}" for run in RUNS),
        *(f"read runs of {run}" for run in RUNS),
    ]


def _micro(found: dict[str, Samples], key: str) -> str:
    return f"{np.median(found[key]) / 1000:.1f}" if key in found else "-"


def measure_ring(page_size: int, pages: int, rounds: int, directory: Path, bare: Bare, at: int) -> dict[str, Any]:
    """Scattered pages: one call each, against 32 at a time through io_uring."""
    random = np.random.default_rng(6)
    rows: list[list[object]] = []
    results: dict[str, Any] = {}
    for name, direct in (("buffered", False), ("direct", True)):
        with bare_file(directory / "ring", direct) as fd:
            whole = np.arange(0, pages, 64, dtype=np.int64)
            if bare.runs(fd, at, whole.ctypes.data, whole.size, 64, page_size, 0, 1):
                raise OSError("a write failed")
            os.fsync(fd)
            for writes, what in ((1, "write"), (0, "read")):
                one: list[float] = []
                ring: list[float] = []
                for _ in range(rounds):
                    which = places(random, pages, 128, 1)
                    begun = time.perf_counter_ns()
                    if bare.runs(fd, at, which.ctypes.data, 128, 1, page_size, 0, writes):
                        raise OSError("a write or a read failed")
                    one.append((time.perf_counter_ns() - begun) / 128)
                    begun = time.perf_counter_ns()
                    failed = bare.by_ring(fd, at, which.ctypes.data, 128, page_size, 32, writes)
                    if failed:
                        print(f"io_uring: {os.strerror(-failed)}")
                        return results
                    ring.append((time.perf_counter_ns() - begun) / 128)
                ratio = Ratio.of(ring, one)
                rows.append(
                    [f"{name}: {what}", f"{np.median(one) / 1000:.1f}", f"{np.median(ring) / 1000:.1f}", str(ratio)]
                )
                results[f"{name}: {what}"] = {"one": np.median(one), "ring": np.median(ring), "ratio": ratio}
    print(
        "\n"
        + table(
            [f"scattered pages of {format_size(page_size)}, us each", "one by one", "io_uring, 32 at once", "ratio"],
            rows,
        ),
        flush=True,
    )
    return results


def measure_saved(page_size: int, size: int, stores: int, directory: Path) -> dict[str, Any]:
    """Stores written behind to slots of Zipf's distribution: how many of them were never written, as a newer one came first."""
    rows, results = [], {}
    slots = TIMES * size // page_size
    for exponent in (0.0, 0.8, 1.0, 1.2):
        weights = np.arange(1, slots + 1, dtype=float) ** -exponent
        dice = np.random.default_rng(7)
        which = dice.permutation(slots)[dice.choice(slots, stores, p=weights / weights.sum())].tolist()
        target = directory / f"zipf-{exponent}"
        target.mkdir()
        with gcma_shm.embedded(size, page_size=page_size, slots=slots, clients=8, spill_dir=target) as client:
            swap = client.swap(0, slots, "behind")
            page = bytearray(np.random.default_rng(8).bytes(page_size))
            begun = time.perf_counter()
            for n in which:
                swap.store(n, page)
            swap.sync()
            elapsed = time.perf_counter() - begun
            counters = client.stats()["counters"]
        saved, cleaned = counters["overwrites_saved"], counters["cleaned"]
        rows.append(
            [
                exponent,
                len(set(which)),
                stores,
                cleaned,
                saved,
                f"{saved / stores:.0%}",
                f"{elapsed / stores * 1e6:.1f}",
            ]
        )
        results[str(exponent)] = {
            "stores": stores,
            "slots": len(set(which)),
            "cleaned": cleaned,
            "saved": saved,
            "seconds": elapsed,
        }
    print(
        "\n"
        + table(
            ["Zipf's exponent", "slots", "stores", "cleaned", "overwrites_saved", "of the stores", "us a store"], rows
        ),
        flush=True,
    )
    return results


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-size", nargs="+", default=["4K", "64K"])
    parser.add_argument("--size", default="32M", help="of each arena; its files are four times as large, each")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--stores", type=int, default=200_000, help="of the skewed workload")
    parser.add_argument("--parts", nargs="+", choices=("ways", "bare", "saved"), default=["ways", "bare", "saved"])
    parser.add_argument("--out", type=Path, default=OUT / "spill_io.json")
    options = parser.parse_args()
    found, size = machine(), parse_size(options.size)
    print(describe_machine(found))
    results: dict[str, Any] = {}
    with scratch() as directory:
        bare = Bare(directory)
        for text in options.page_size:
            page_size, place = parse_size(text), directory / text
            place.mkdir()
            results[text] = {}
            if "ways" in options.parts:
                results[text]["ways"] = measure_ways(page_size, size, options.rounds, place, bare)
            if "bare" in options.parts:
                results[text]["bare"] = measure_bare(page_size, max(options.rounds // 3, 3), place, bare)
        if "saved" in options.parts:
            results["saved"] = measure_saved(parse_size(options.page_size[0]), size, options.stores, directory)
    write_json(options.out, (__doc__ or "").splitlines()[0], found, vars(options), results)


if __name__ == "__main__":
    main()
