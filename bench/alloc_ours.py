"""gcma-shm's part of `alloc.py`: alloc_contig and claims of reservations from areas that are lent out, and an idle reserve.

Each job has an area of its own, so that what one takes leaves the others' lent. Before each sample the cache is given time to take all of the
area back; what it had is told with the sample.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from _common import Crew, Floor, address_of, crew
from alloc_job import NAN, PAUSE_S, Job, Sample
from echo import WARM_UP
from stress_work import Load, make_worker

import gcma_shm
from gcma_shm.clients.embedded import EmbeddedClient

LENT_AREAS = ("alloc", "claim")
IDLE_AREA = "idle"
CACHE_TYPE = 1
FULL = 0.97  # of an area: it counts as all lent
FILL_S = 60.0  # for all areas, at the start
REFILL_S = 20.0  # for one, between samples
NURSERY_SHARE = 6  # the arena is this much larger than its areas, by a sixth
PAGE = 4096


class Stage:
    """An arena with its areas, and workers that store and load at full speed; without any, the parent fills it."""

    def __init__(self, client: EmbeddedClient, floor: Floor, workers: int) -> None:
        self.client = client  # connected with prefault
        self.floor = floor
        self.workers = workers
        self.sizes = {area.name: area.size for area in client.areas()}
        self._slots = client.stats()["arena"]["slots"] // 4
        self._swap = client.swap(CACHE_TYPE, self._slots, write="behind")
        self._page = os.urandom(PAGE - 1) + b"\1"
        self._next_slot = 0

    def refill(self, name: str, seconds: float = REFILL_S) -> float:
        """Waits until the cache has all of an area; the share that it has."""
        deadline = time.monotonic() + seconds
        while (lent := self._lent(name)) < FULL and time.monotonic() < deadline:
            if self.workers:
                time.sleep(PAUSE_S)
            else:
                self._store(int((1 - lent) * self.sizes[name] / PAGE) + 64)
        return lent

    def _lent(self, name: str) -> float:
        area = next(area for area in self.client.areas() if area.name == name)
        return area.lent / area.size

    def _store(self, pages: int) -> None:
        for _ in range(pages):
            self._swap.store(self._next_slot % self._slots, self._page)
            self._next_slot += 1
        self._swap.sync(timeout=60)


@contextmanager
def stage(sizes_max: int, workers: int, directory: Path, floor: Floor, seed: int) -> Iterator[Stage]:
    """An arena whose areas are all lent, and its workers."""
    area = sizes_max * 5 // 4 + (16 << 20)
    areas = {name: str(area) for name in LENT_AREAS} | {IDLE_AREA: f"{area},cache=off"}
    size = area * len(areas) * (NURSERY_SHARE + 1) // NURSERY_SHARE + (64 << 20)
    with ExitStack() as stack:
        client = stack.enter_context(gcma_shm.embedded(size, areas=areas, spill_dir=directory, prefault=True))
        if workers:
            slots = (
                2 * area * len(LENT_AREAS) // PAGE
            )  # twice what the areas hold: there is always something to lend to
            load = Load(client.endpoint, workers, slots, "behind", (50.0, 50.0, 0.0), 0.0, 1, seed)
            team = stack.enter_context(crew(workers, make_worker, load))
            for connection in team.connections:
                connection.send(("run", 1e9))
            stack.callback(_end_load, team)
        made = Stage(client, floor, workers)
        lent = {name: made.refill(name, FILL_S) for name in LENT_AREAS}
        print(
            f"{workers} workers; lent: " + ", ".join(f"{name} {share:.0%}" for name, share in lent.items()), flush=True
        )
        yield made


def _end_load(team: Crew) -> None:
    for connection in team.connections:
        with suppress(OSError):
            connection.close()
    for process in team.processes:
        process.terminate()


class Allocate(Job):
    """`alloc_contig`, walking through an area, so that each buffer takes pages that were not just given back."""

    def __init__(
        self, name: str, at: Stage, area: str, prefault: bool = True, warm: bool = False, placed: bool = False
    ) -> None:
        self.name = name
        self._stage = at
        self._area = area
        self._placed = placed  # by the broker
        self._prefault = prefault
        self._warm = warm
        self._next_offset = 0

    @contextmanager
    def ready(self, nbytes: int) -> Iterator[Callable[[], Sample]]:
        """One buffer."""
        lent = self._stage.refill(self._area) if self._area in LENT_AREAS else NAN
        offset = None if self._placed else self._offset(nbytes)

        def act() -> Sample:
            for _ in range(WARM_UP if self._warm else 0):
                client.areas()
            start = time.perf_counter_ns()
            buffer = client.alloc_contig(nbytes, area=self._area, offset=offset)
            handed_over = time.perf_counter_ns()
            used = touch(buffer, self._stage.floor)
            buffer.free()
            return Sample(handed_over - start, used - start, lent)

        with ExitStack() as stack:
            client = client_for(self._stage, self._prefault, stack)
            yield act

    def _offset(self, nbytes: int) -> int:
        pages = -(-nbytes // PAGE)
        if (self._next_offset + pages) * PAGE > self._stage.sizes[self._area]:
            self._next_offset = 0
        offset = self._next_offset
        self._next_offset += pages
        return offset


class Claim(Job):
    """A claim of a reservation that was lent to the cache since it was made."""

    def __init__(self, name: str, at: Stage, prefault: bool = True, warm: bool = False) -> None:
        self.name = name
        self._stage = at
        self._prefault = prefault
        self._warm = warm

    @contextmanager
    def ready(self, nbytes: int) -> Iterator[Callable[[], Sample]]:
        """One claim of a reservation of its own. Warm: right after some claims of another one, of a page."""

        def act() -> Sample:
            for _ in range(WARM_UP if self._warm else 0):
                small.claim().free()
            start = time.perf_counter_ns()
            buffer = reservation.claim()
            handed_over = time.perf_counter_ns()
            used = touch(buffer, self._stage.floor)
            buffer.free()
            return Sample(handed_over - start, used - start, lent)

        with ExitStack() as stack:
            client = client_for(self._stage, self._prefault, stack)
            reservation = client.reserve(nbytes, area="claim")
            stack.callback(reservation.release)
            if self._warm:
                small = client.reserve(PAGE, area="claim")
                stack.callback(small.release)
            lent = self._stage.refill("claim")
            yield act


def client_for(at: Stage, prefault: bool, stack: ExitStack) -> gcma_shm.Client:
    """The prefaulted one, or a fresh one with a page table of its own, empty."""
    if prefault:
        return at.client
    return stack.enter_context(gcma_shm.connect(at.client.endpoint, mapped=True))


def touch(buffer: gcma_shm.Buffer, floor: Floor) -> int:
    """Writes the first byte of each page; the time when that was done."""
    with buffer.view as view:
        floor.touch(address_of(view), buffer.nbytes)
        return time.perf_counter_ns()
