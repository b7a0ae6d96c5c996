"""The machines that `lent.py` compares: memory of a fixed size, of which a reserve must be there for guests at any moment, workers with
their work, and the guests.

A machine whose memory is full has no page cache to spare: what the arena does not hold is read from the disk. The spill files' pages
are therefore kept out of the kernel's page cache: by `spill_io` "direct" or "uncached", or by "emulated", where the broker's writes go
through the page cache, a thread here pushes them out of it, and the workers read past it (O_DIRECT).
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from _common import Crew, crew
from cma import WriteOut
from lent_work import PAGE, Done, Work, make_worker, total

import gcma_shm
from gcma_shm import GcmaError
from gcma_shm.layout import plan

RESERVE = "reserve"
DROP_S = 0.02
LOOK_EVERY = 100  # turns of dropping, for files that are new
CLIENTS = 16
STAMP = np.uint8(0xA5)
CMA_DIRTY = 0.5  # as in `alloc.py`
HITS = ("hits_nursery", "hits_area", "hits_zero", "hits_filled")
READS = 2000  # to find what one costs
SHORTAGE = 16  # searches for the arena's size: tables and alignment take a little more than was thought


@dataclass(frozen=True)
class Guests:
    """Somebody who takes `nbytes` of the reserve every `period_s`, and holds them for the share `duty` of the time. `claims`: of a
    reservation that was made before, instead of allocating.
    """

    nbytes: int
    period_s: float
    duty: float
    claims: bool = False


@dataclass
class Slice:
    """What one machine did in one slice of time."""

    done: Done
    hit_ratio: float
    latencies_us: list[float] = field(default_factory=list)
    failures: int = 0
    damaged: int = 0  # buffers in which something else was found in the end than what their guest had written


def arena_bytes(nursery: int, reserve: int, slots: int) -> int:
    """Of an arena with such a nursery beside the reserve."""
    size = nursery + reserve + slots * 16
    for _ in range(SHORTAGE):
        with suppress(GcmaError):
            geometry, _ = plan(size, PAGE, {RESERVE: reserve}, slots, CLIENTS)
            if geometry.nursery_pages * PAGE >= nursery:
                return size
        size += (nursery + reserve) // 64
    raise ValueError("no size of an arena fits")


class Machine:
    """One contender: an arena, and workers whose data is there. `write_out`: what guests wait for before they get a buffer."""

    def __init__(self, client: gcma_shm.Client, team: Crew, write_out: WriteOut | None) -> None:
        self._client = client
        self._team = team
        self._write_out = write_out

    def run(self, guests: Guests | None, warm_s: float, seconds: float) -> Slice:
        """Works for `warm_s`, and then for as long as is measured, with these guests all the time."""
        found = Slice(Done(), 0.0)
        stop = threading.Event()
        guest = threading.Thread(target=self._visit, args=(guests, stop, found)) if guests else None
        if guest:
            guest.start()
        try:
            first = self._team.ask("run", warm_s)
            before = self._client.stats()["counters"]
            parts = self._team.ask("run", seconds)
            after = self._client.stats()["counters"]
        finally:
            stop.set()
            if guest:
                guest.join()
        found.done = total(parts)
        found.done.mismatches += total(first).mismatches
        counted = {key: after[key] - before[key] for key in (*HITS, "hits_spill")}
        found.hit_ratio = sum(counted[key] for key in HITS) / max(sum(counted.values()), 1)
        return found

    def _visit(self, guests: Guests, stop: threading.Event, found: Slice) -> None:
        with ExitStack() as stack:
            take: Callable[[], gcma_shm.Buffer] = partial(self._client.alloc_contig, guests.nbytes, area=RESERVE)
            if guests.claims:
                reservation = self._client.reserve(guests.nbytes, area=RESERVE)
                stack.callback(reservation.release)
                take = reservation.claim
            self._visits(guests, take, stop, found)

    def _visits(self, guests: Guests, take: Callable[[], gcma_shm.Buffer], stop: threading.Event, found: Slice) -> None:
        start = time.monotonic()
        visits = 0
        while not stop.wait(max(start + visits * guests.period_s - time.monotonic(), 0.0)):
            write = self._write_out.ready(guests.nbytes) if self._write_out else None
            begin = time.perf_counter_ns()
            try:
                if write is not None and (error := write()):
                    raise OSError(error, os.strerror(error))
                buffer = take()
            except (GcmaError, OSError) as failure:
                found.failures += 1
                print(f"  a guest FAILED: {failure}", flush=True)
            else:
                found.latencies_us.append((time.perf_counter_ns() - begin) / 1e3)
                pages = buffer.numpy((guests.nbytes // PAGE, PAGE), np.uint8)
                pages[:, visits % PAGE] = STAMP
                stop.wait(max(start + (visits + guests.duty) * guests.period_s - time.monotonic(), 0.0))
                found.damaged += not (pages[:, visits % PAGE] == STAMP).all()
                del pages
                buffer.free()
            late = time.monotonic() - start
            visits = max(
                visits + 1, int(late / guests.period_s)
            )  # a visit that took too long is no reason for two at once


@contextmanager
def machine(
    name: str, work: Work, slots: int, nursery: int, reserve: int, spill_io: str, directory: Path
) -> Iterator[Machine]:
    """`name`: "idle", "lent", "CMA" or "no reserve". Its workers have stored their data when it is there."""
    spill_dir = directory / name.replace(" ", "-")
    spill_dir.mkdir()
    lent = "off" if name == "idle" else "on"
    with ExitStack() as stack:
        client = stack.enter_context(
            gcma_shm.embedded(
                arena_bytes(nursery, reserve, slots),
                areas={RESERVE: f"{reserve},cache={lent}"},
                slots=slots,
                clients=CLIENTS,
                spill_dir=spill_dir,
                spill_io="buffered" if spill_io == "emulated" else spill_io,
                prefault=True,
                timeout=60.0,
            )
        )
        write_out = WriteOut(reserve, directory, stack, CMA_DIRTY, True, 256, work.seed) if name == "CMA" else None
        team = stack.enter_context(crew(work.workers, make_worker, work, client.endpoint, spill_dir))
        yield Machine(client, team, write_out)


def read_us(directory: Path) -> float:
    """What a page from the disk costs: the median of random reads, O_DIRECT, of the largest file below `directory`."""
    path = max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    pages = path.stat().st_size // PAGE
    times = []
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PAGE) as out:
            for page in np.random.default_rng(1).integers(0, pages, READS):
                start = time.perf_counter_ns()
                os.preadv(fd, [out], int(page) * PAGE)
                times.append(time.perf_counter_ns() - start)
    finally:
        os.close(fd)
    return float(np.median(times)) / 1e3


@contextmanager
def dropped(directory: Path) -> Iterator[None]:
    """Keeps the files below it out of the page cache: what is dirty is on its way to the disk, and goes the next time."""
    stop = threading.Event()

    def drop() -> None:
        files: dict[Path, int] = {}
        turns = itertools.count()
        try:
            while not stop.wait(DROP_S):
                if next(turns) % LOOK_EVERY == 0:
                    found = [path for path in directory.rglob("*") if path.is_file() and path not in files]
                    files.update({path: os.open(path, os.O_RDONLY) for path in found})
                for fd in files.values():
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            for fd in files.values():
                os.close(fd)

    thread = threading.Thread(target=drop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
