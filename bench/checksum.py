"""What does the checksum cost? CRC32C of a page against the read and the write of the spill file that it guards, by instruction and by table.

Twice in one run, in turns: in C, where the same loop reads (or writes) pages of a file with and without the sum; and as a caller sees it,
loads from the spill file and stores written through. The file is in the page cache, where the sum weighs most; what counts is the processor's time of
the calling thread, so that other load on the machine does not. "Cold" reads come from the disk, and their time is the clock's.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from _common import (
    OUT,
    Ratio,
    Section,
    Summary,
    Verdict,
    address_of,
    compile_c,
    describe_machine,
    machine,
    scratch,
    table,
    tell,
    write_json,
)

import gcma_shm
from gcma_shm import layout
from gcma_shm._core import COUNTERS, Plane, Slots
from gcma_shm.sizes import format_size, parse_size

Which = npt.NDArray[np.int64]
Job = Callable[[], object]
WAYS = ("instruction", "table")
SHARE_MAX = 0.15  # of a read from the page cache that the sum may add, by the CPU's instruction, to be on for everybody
_HEADER = Path(gcma_shm.__file__).parent / "_crc32c.h"
_C_SOURCE = f"""
#define _GNU_SOURCE
#include <unistd.h>
#include "{_HEADER}"

static crc32c_t ways[2]; /* instruction, table */
volatile uint32_t sink;

int begin(size_t size)
{{
    crc32c_init(&ways[0], size, 1);
    crc32c_init(&ways[1], size, 0);
    return ways[0].hardware;
}}

/* `way`: -1, none. */
int read_pages(int fd, uint8_t *out, const int64_t *which, size_t n, size_t size, int way)
{{
    for (size_t i = 0; i < n; i++) {{
        if (pread(fd, out, size, which[i] * size) != (ssize_t)size)
            return -1;
        if (way >= 0)
            sink = crc32c_page(&ways[way], out);
    }}
    return 0;
}}

int write_pages(int fd, const uint8_t *pages, const int64_t *which, size_t n, size_t size, int way)
{{
    for (size_t i = 0; i < n; i++) {{
        const uint8_t *page = pages + which[i] * size;
        if (way >= 0)
            sink = crc32c_page(&ways[way], page);
        if (pwrite(fd, page, size, which[i] * size) != (ssize_t)size)
            return -1;
    }}
    return 0;
}}

void sum_pages(const uint8_t *pages, const int64_t *which, size_t n, size_t size, int way)
{{
    for (size_t i = 0; i < n; i++)
        sink = crc32c_page(&ways[way], pages + which[i] * size);
}}
"""


class InC:
    """A file of `pages` pages, and the same in memory; each job is one call in C."""

    def __init__(self, directory: Path, page_size: int, pages: int, batch: int) -> None:
        library = ctypes.CDLL(str(compile_c(directory, "checksum", _C_SOURCE)))
        for name in ("read_pages", "write_pages"):
            getattr(library, name).argtypes = [
                ctypes.c_int,
                *[ctypes.c_void_p] * 2,
                *[ctypes.c_size_t] * 2,
                ctypes.c_int,
            ]
        library.sum_pages.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_size_t] * 2, ctypes.c_int]
        library.begin.argtypes = [ctypes.c_size_t]
        self._library = library
        self.hardware = bool(library.begin(page_size))
        self._size, self._batch = page_size, batch
        self._pages = mmap.mmap(-1, pages * page_size)
        self._pages[:] = np.random.default_rng(1).bytes(pages * page_size)
        self._out = bytearray(page_size)
        self._fd = os.open(directory / "pages", os.O_CREAT | os.O_RDWR)
        os.pwrite(self._fd, self._pages, 0)
        os.fsync(self._fd)

    def jobs(self, which: Which) -> dict[str, Job]:
        """Each of `batch` pages; a name says what is done and which sum is taken."""
        at, n, size = which.ctypes.data, self._batch, self._size
        out, pages = address_of(self._out), address_of(self._pages)

        def read(way: int) -> None:
            assert self._library.read_pages(self._fd, out, at, n, size, way) == 0

        def write(way: int) -> None:
            assert self._library.write_pages(self._fd, pages, at, n, size, way) == 0

        jobs: dict[str, Job] = {"read": lambda: read(-1), "write": lambda: write(-1)}
        for way, name in enumerate(WAYS):
            jobs[f"sum, {name}"] = lambda way=way: self._library.sum_pages(pages, at, n, size, way)  # type: ignore[misc]
            jobs[f"read, {name}"] = lambda way=way: read(way)  # type: ignore[misc]
            jobs[f"write, {name}"] = lambda way=way: write(way)  # type: ignore[misc]
        return jobs

    def forget(self) -> None:
        """The page cache forgets the file."""
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Gives the file back."""
        os.close(self._fd)


class Loads:
    """Loads from a spill file, and stores written through, in a private arena that has room for a few pages only."""

    def __init__(self, directory: Path, page_size: int, pages: int, batch: int) -> None:
        geometry, areas = layout.plan(64 * page_size + (4 << 20), page_size, slots=pages, clients_max=8)
        memory = mmap.mmap(-1, geometry.size)
        with memoryview(memory) as view:
            layout.write_header(view, geometry, areas, bytes(16))
        spill = directory / "spill"
        spill.mkdir()
        self._planes = [
            Plane(memory, geometry, layout.BROKER + way, os.fsencode(spill), crc_hardware=not way)
            for way in range(len(WAYS))
        ]
        (spill / "000.1").touch()
        self._planes[0].begin_type(0, 0, pages, 0)
        self._swaps: list[Slots] = [plane.slots(0, 1, 10.0) for plane in self._planes]
        self._page = bytearray(np.random.default_rng(2).bytes(page_size))
        self._batch = batch
        for n in range(pages):
            self._swaps[0].store(n, self._page)
        # All of the nursery in somebody else's hands: no load puts a page back, and the next one finds it in the file again.
        self._nursery = {geometry.life_at + 8 * page: 0 for page in range(geometry.nursery_pages)}
        for at in self._nursery:
            self._nursery[at] = self._planes[0].read(at)
            self._planes[0].write(at, 1 << 62 | 7 << 46 | self._nursery[at] & (1 << 46) - 1)
        self._spilled = pages - geometry.nursery_pages

    def jobs(self, which: Which) -> dict[str, Job]:
        """Each of `batch` pages."""
        offsets = [int(n) % self._spilled for n in which[: self._batch]]

        def each(call: Callable[[int, Any], object]) -> None:
            for offset in offsets:
                call(offset, self._page)

        jobs: dict[str, Job] = {}
        for way, swap in zip(WAYS, self._swaps, strict=True):
            jobs[f"load, {way}"] = lambda swap=swap: each(swap.load_into)  # type: ignore[misc]
        return jobs

    def stores(self, which: Which) -> dict[str, Job]:
        """The same of stores. After them, nothing of what `jobs` wants is in the file alone."""
        for at, life in self._nursery.items():
            self._planes[0].write(at, life)
        self._nursery.clear()
        offsets = [int(n) for n in which[: self._batch]]

        def each(swap: Slots) -> None:
            for offset in offsets:
                swap.store(offset, self._page)

        return {f"store, {way}": lambda swap=swap: each(swap) for way, swap in zip(WAYS, self._swaps, strict=True)}  # type: ignore[misc]

    def hits_in_the_file(self) -> int:
        """By both handles."""
        at = self._planes[0].geometry.clients_at + layout.CLIENT_COUNTERS_AT + 8 * COUNTERS.index("hits_spill")
        return sum(self._planes[0].read(at + layout.CLIENT_BYTES * (layout.BROKER + way)) for way in range(len(WAYS)))


def timed(job: Job, batch: int, clock: Callable[[], int] = time.thread_time_ns) -> float:
    """Nanoseconds a page."""
    start = clock()
    job()
    return (clock() - start) / batch


def measure(page_size: int, rounds: int, directory: Path) -> dict[str, Any]:
    """One page size; prints its table, returns its results for JSON."""
    pages = max(256, (64 << 20) // page_size)
    batch = max(16, min(512, pages // 2))
    directory.mkdir()
    in_c, loads = InC(directory, page_size, pages, batch), Loads(directory, page_size, pages, batch)
    random = np.random.default_rng(3)
    times: dict[str, list[float]] = {}
    cold_batch = min(batch, 64)
    for _ in range(rounds):
        which: Which = random.permutation(pages)[:batch].astype(np.int64)
        for name, job in (in_c.jobs(which) | loads.jobs(which)).items():
            times.setdefault(name, []).append(timed(job, batch))
    loaded = loads.hits_in_the_file()
    assert loaded == 2 * rounds * batch, f"{loaded} loads from the file, expected {2 * rounds * batch}"
    for _ in range(rounds):
        which = random.permutation(pages)[:batch].astype(np.int64)
        for name, job in loads.stores(which).items():
            times.setdefault(name, []).append(timed(job, batch))
    in_c._batch = cold_batch
    for _ in range(rounds):
        for name in ("read", *(f"read, {way}" for way in WAYS)):
            which = random.permutation(pages)[:batch].astype(np.int64)
            in_c.forget()
            times.setdefault(f"cold {name}", []).append(timed(in_c.jobs(which)[name], cold_batch, time.perf_counter_ns))
    in_c.close()
    rows, results = [], {}
    bases = {
        "read": "read",
        "write": "write",
        "cold read": "cold read",
        "load": "load, instruction",
        "store": "store, instruction",
    }
    for name, values in times.items():
        base = bases.get(name.partition(",")[0], "read")
        ratio = Ratio.of(values, times[base])
        summary = Summary.of(np.asarray(values))
        rows.append([name, f"{summary.median / 1000:.3f}", str(ratio), base])
        results[name] = {"ns_per_page": summary, "ratio": ratio, "of": base}
    by = "the CPU's instruction" if in_c.hardware else "no instruction on this CPU: the table in its place"
    print("\n" + table([f"{format_size(page_size)}; {by}", "us a page", "ratio (middle 80 %)", "of"], rows), flush=True)
    return {"hardware": in_c.hardware, "times": results}


def section(results: dict[str, Any]) -> Section:
    """What is published: each job against the same without the sum, or with the other one."""
    first_size, first = next(iter(results.items()))
    rows = [
        [f"{name} / {found['of']}", *(str(one["times"][name]["ratio"]) for one in results.values())]
        for name, found in first["times"].items()
        if name != found["of"]
    ]
    added = first["times"]["read, instruction"]["ratio"].median - 1
    verdict = Verdict(f"what the sum by instruction adds to a read of {first_size}", SHARE_MAX, added)
    by = "" if first["hardware"] else " No instruction on this CPU: the table is in its place."
    note = f"Medians of the rounds' ratios, in brackets their middle 80 %; cold: from the disk, by the clock; else the thread's processor time.{by}"
    return Section("What the sum adds", ["", *results], rows, note, [verdict])


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-size", nargs="+", default=["4K", "64K", "1M"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=OUT / "checksum.json")
    options = parser.parse_args()
    found = machine()
    print(describe_machine(found))
    results: dict[str, Any] = {}
    with scratch() as directory:
        for text in options.page_size:
            results[text] = measure(parse_size(text), options.rounds, directory / text)
    found_all = section(results)
    tell(found_all)
    write_json(options.out, (__doc__ or "").splitlines()[0], found, vars(options), results, [found_all])


if __name__ == "__main__":
    main()
