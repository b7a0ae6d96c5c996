"""Bare spill files, without an arena: what runs of neighbours cost in each way of writing, what laying a file in them does to later writes of
single pages, and what io_uring would make of scattered ones. For spill_io.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from _common import Ratio, Samples, Section, Summary, compile_c

from gcma_shm.sizes import format_size

RUNS = (1, 4, 16, 64)
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
    """The C that is compiled here."""

    def __init__(self, directory: Path) -> None:
        library = ctypes.CDLL(str(compile_c(directory, "spill_bare", _C_SOURCE)))
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


def measure_bare(page_size: int, rounds: int, directory: Path, bare: Bare) -> tuple[dict[str, Any], list[Section]]:
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
    runs = Section(
        f"Bare files, {format_size(page_size)}", ["", *BARE], rows, "µs a page, medians; in C, without an arena."
    )
    ring, scattered = measure_ring(page_size, pages, rounds, directory, bare, at)
    return {"runs": {name: Summary.of(values) for name, values in found.items()}, "io_uring": ring}, [runs, scattered]


def _jobs() -> list[str]:
    return [
        *(f"lay, runs of {run}" for run in RUNS),
        *(f"write one, laid in runs of {run}" for run in RUNS),
        *(f"write runs of {run}" for run in RUNS),
        *(f"read runs of {run}" for run in RUNS),
    ]


def _micro(found: dict[str, Samples], key: str) -> object:
    return float(np.median(found[key])) / 1000 if key in found else "-"


def measure_ring(
    page_size: int, pages: int, rounds: int, directory: Path, bare: Bare, at: int
) -> tuple[dict[str, Any], Section]:
    """Scattered pages: one call each, against 32 at a time through io_uring."""
    random = np.random.default_rng(6)
    rows: list[list[object]] = []
    results: dict[str, Any] = {}
    title = f"Scattered pages through io_uring, {format_size(page_size)}"
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
                        return results, Section(title, [], [], f"io_uring: {os.strerror(-failed)}.")
                    ring.append((time.perf_counter_ns() - begun) / 128)
                ratio = Ratio.of(ring, one)
                rows.append(
                    [f"{name}: {what}", float(np.median(one)) / 1000, float(np.median(ring)) / 1000, str(ratio)]
                )
                results[f"{name}: {what}"] = {"one": np.median(one), "ring": np.median(ring), "ratio": ratio}
    columns = ["", "one by one", "io_uring, 32 at once", "ratio"]
    return results, Section(title, columns, rows, "µs a page, medians; ratios with their middle 80 %.")
