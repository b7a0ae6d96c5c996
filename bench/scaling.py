"""Do loads scale? Two workers against one, 64 against two, and beside a guest that takes most of the arena ten times a second.

Each worker loads pages of a working set that is in memory, at random: all of them the same slots; slots that are neighbours (of eight in a
row worker i always takes the i-th, so that words and descriptors of all workers share cache lines); or each its own type. Before each turn it
loads as many that do not count. The ratio is of pages a second of all workers together, in turns within rounds. On a machine that is busy with
other work that tells more of the scheduler, which gives many workers more of the processors than few; so a second verdict is by the workers'
own processor time, of which a load must take no more where others load beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _common import (
    OUT,
    Crew,
    Histogram,
    Ratio,
    Section,
    Verdict,
    crew,
    describe_machine,
    machine,
    scratch,
    tell,
    write_json,
)
from report import cell

import gcma_shm
from gcma_shm.sizes import format_size, parse_size

PLACES = ("same slots", "neighbouring slots", "separate types")
NEIGHBOURS = 8  # slots in turn, worker i takes the i-th of them: the words of four lie in one cache line
TYPES = 2  # that the separate types are: worker i loads from type 1 + i % TYPES
SAMPLE = 64  # one load in so many is timed by itself
GUEST_PART = 0.8  # of the area that the guest takes
GUEST_S = 0.1  # from one time to the next
PASSES = 6
CORES = 2  # that the expectations were made for


@dataclass
class Turn:
    """What one worker did in its turn."""

    pages: int
    seconds: float
    cpu: float  # seconds of this process
    misses: int
    times: Histogram


class Worker:
    """Loads for as long as it is told."""

    def __init__(self, index: int, stack: ExitStack, endpoint: str, pages: int, seed: int) -> None:
        self._index = index
        self._pages = pages
        self._rng = np.random.default_rng([seed, index])
        self._client = stack.enter_context(gcma_shm.connect(endpoint, mapped=True, prefault=True))
        self._out = bytearray(self._client.page_size)

    def act(self, place: str, workers: int, start: float, seconds: float) -> Turn | None:
        """From `start` on, by the clock that all processes share; the first half of the time does not count."""
        if self._index >= workers:
            return None
        swap = self._client.swap(1 + self._index % TYPES if place == "separate types" else 0, self._pages)
        offsets = self._rng.integers(0, self._pages, 1 << 15)
        if place == "neighbouring slots":
            offsets = offsets // NEIGHBOURS * NEIGHBOURS + self._index % NEIGHBOURS
        batches = np.minimum(offsets, self._pages - 1).reshape(-1, SAMPLE).tolist()
        load, out, clock = swap.load_into, self._out, time.perf_counter_ns
        while time.monotonic() < start:
            time.sleep(0.0005)
        turn = Turn(0, 0.0, 0.0, 0, Histogram())
        for half in (1, 2):
            times, end = [], start + seconds * half
            begun, cpu, pages, misses = time.monotonic(), time.process_time(), 0, 0
            while time.monotonic() < end:
                batch = batches[(pages // SAMPLE) % len(batches)]
                before = clock()
                misses += not load(batch[0], out)
                times.append(clock() - before)
                for offset in batch[1:]:
                    misses += not load(offset, out)
                pages += SAMPLE
            turn.pages, turn.seconds, turn.misses = pages, time.monotonic() - begun, misses
            turn.cpu = time.process_time() - cpu
        turn.times.add(times)
        return turn


def make_worker(index: int, stack: ExitStack, endpoint: str, pages: int, seed: int) -> Callable[..., Any]:
    """A worker process's ear."""
    return Worker(index, stack, endpoint, pages, seed).act


class Guest(threading.Thread):
    """Allocates most of the area and frees it again, ten times a second, until it is told to stop."""

    def __init__(self, client: gcma_shm.Client) -> None:
        super().__init__(daemon=True)
        self._client = client
        self._over = threading.Event()
        self.taken = 0

    def run(self) -> None:
        """See Thread."""
        nbytes = int(self._client.areas()[0].size * GUEST_PART)
        while not self._over.wait(GUEST_S):
            self._client.alloc_contig(nbytes, timeout=5).free()
            self.taken += 1

    def stop(self) -> None:
        """Returns when it holds nothing."""
        self._over.set()
        self.join()


@dataclass
class Figures:
    """Of one contender, one figure a round: pages a second of all its workers, and pages of a second of their processor time."""

    speed: list[float] = field(default_factory=list)
    cpu_speed: list[float] = field(default_factory=list)
    times: Histogram = field(default_factory=Histogram)


@dataclass(frozen=True)
class Contender:
    """So many workers, with or without the guest beside them."""

    workers: int
    guest: bool = False

    def __str__(self) -> str:
        return f"{self.workers} worker{'s' * (self.workers > 1)}{', guest' * self.guest}"


def fill(client: gcma_shm.Client, pages: int) -> None:
    """The working set of each type, stored and as far as the arena takes it in memory."""
    page = np.random.default_rng(1).integers(1, 256, client.page_size, np.uint8).tobytes()
    swaps = [client.swap(type_, pages) for type_ in range(1 + TYPES)]
    for swap in swaps:
        for n in range(pages):
            swap.store(n, page)
    refresh(swaps, pages)


def refresh(swaps: list[gcma_shm.Swap], pages: int) -> None:
    """Brings back what a guest has displaced."""
    for _ in range(PASSES):
        for swap in swaps:
            for n in range(pages):
                swap.load(n)
        time.sleep(0.1)


def turn(team: Crew, client: gcma_shm.Client, contender: Contender, place: str, seconds: float, found: Figures) -> None:
    """One contender in its turn."""
    guest = Guest(client) if contender.guest else None
    if guest:
        guest.start()
    try:
        turns = [done for done in team.ask(place, contender.workers, time.monotonic() + 0.05, seconds) if done]
    finally:
        if guest:
            guest.stop()
    if any(done.misses for done in turns):
        raise RuntimeError("a page that was stored was not there")
    found.speed.append(sum(done.pages / done.seconds for done in turns))
    found.cpu_speed.append(sum(done.pages for done in turns) / sum(done.cpu for done in turns))
    for done in turns:
        found.times.merge(done.times)


Expected = dict[Contender, tuple[Contender, float]]


def section(place: str, figures: dict[Contender, Figures], expected: Expected) -> Section:
    """A place's figures, with what was expected of them by the clock and by processor time."""
    rows: list[list[object]] = [
        [
            str(contender),
            float(np.median(found.speed)) / 1e6,
            float(np.median(found.cpu_speed)) / 1e6,
            found.times.percentile(50) / 1e3,
            found.times.percentile(99) / 1e3,
        ]
        for contender, found in figures.items()
    ]
    verdicts = []
    for contender, (against, least) in expected.items():
        ours, theirs = figures[contender], figures[against]
        # The first figure expects two processors of two workers; by processor time they have one each.
        least_cpu = least / min(contender.workers, CORES) * min(against.workers, CORES)
        for how, limit, ratio in (
            ("loads a second", least, Ratio.of(ours.speed, theirs.speed)),
            ("loads a second of processor time", least_cpu, Ratio.of(ours.cpu_speed, theirs.cpu_speed)),
        ):
            words = f"{contender} / {against}, {how}, {place}"
            verdicts.append(Verdict(words, limit, ratio.median, True, f"{cell(ratio.low)} to {cell(ratio.high)}"))
    columns = ["", "M loads/s", "M loads a processor second", "median µs", "p99 µs"]
    note = "Of all workers together; beside the verdicts the middle 80 % of the rounds' ratios."
    return Section(place, columns, rows, note, verdicts)


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--many", type=int, default=64, metavar="N", help="workers on the same cores (default: 64)")
    parser.add_argument("--working-set", type=parse_size, default=24 << 20, metavar="SIZE", help="of each of 3 types")
    parser.add_argument("--arena", type=parse_size, default=256 << 20, metavar="SIZE")
    parser.add_argument("--seconds", type=float, default=0.5, help="a turn, and as long before it that does not count")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--out", type=Path, default=OUT / "scaling.json", metavar="FILE")
    options = parser.parse_args(argv)
    about = machine()
    print(describe_machine(about))
    one, two, many, guest = Contender(1), Contender(2), Contender(options.many), Contender(1, guest=True)
    expected = {two: (one, 1.8), many: (two, 0.9), guest: (one, 0.8)}
    results: dict[str, Any] = {}
    sections = []
    with scratch() as directory, ExitStack() as stack:
        client = stack.enter_context(
            gcma_shm.embedded(options.arena, spill_dir=directory, prefault=True, clients=options.many + 8)
        )
        pages = options.working_set // client.page_size
        fill(client, pages)
        swaps = [client.swap(type_, pages) for type_ in range(1 + TYPES)]
        team = stack.enter_context(crew(options.many, make_worker, client.endpoint, pages, options.seed))
        print(
            f"{format_size(options.working_set)} of {format_size(client.page_size)} pages, {os.cpu_count()} processors"
        )
        for place in options.place:
            figures = {contender: Figures() for contender in (one, two, many, guest)}
            order = list(figures)
            for n in range(options.rounds):
                for contender in order[n % len(order) :] + order[: n % len(order)]:
                    turn(team, client, contender, place, options.seconds, figures[contender])
                    if contender.guest:
                        refresh(swaps, pages)
            results[place] = {
                str(contender): {"speed": of.speed, "cpu_speed": of.cpu_speed, "times": of.times.describe()}
                for contender, of in figures.items()
            }
            sections.append(section(place, figures, expected))
            tell(sections[-1])
    write_json(options.out, "Do loads scale?", about, vars(options), results, sections)
    return 0


if __name__ == "__main__":
    sys.exit(main())
