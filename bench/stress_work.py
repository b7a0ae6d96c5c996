"""What a worker of `stress.py` does: pages that tell whose they are, operations drawn from a seed, and every page that comes back looked at.

With `record`, each operation is also noted with its start and its end (gcma_shm.clients.history), for the check of the whole history.
"""

from __future__ import annotations

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
from _common import Histogram

import gcma_shm
from gcma_shm.clients.history import Log, RecordedSwap
from gcma_shm.clients.proof import UNIQUE, value_id

OPERATIONS = ("store", "load", "invalidate")
TOLD_MAX = 20  # errors that are told in full
DRAW = 8192  # operations that are drawn at once, before they are timed
TYPE = 0
WRITER_BITS = 12
MASK = (1 << 64) - 1
MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)  # odd, so that every bit of a stamp reaches the words
RECORDED_MAX = 1 << 23  # operations of one worker; then it ends early
NOT_WHOLE = UNIQUE - 1  # the value of a page that is not one of the slot's: nobody has stored it

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
    record: Path | None = None  # where logs are to lie


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
        swap = self._client.swap(TYPE, load.slots, write="behind" if load.write == "behind" else "through")
        self._log = Log(log_of(load.record, index), index + 1, RECORDED_MAX) if load.record else None
        self._swap = RecordedSwap(swap, self._log, read=self._value) if self._log else swap
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
        while (now := time.monotonic() - start) < seconds and self._room():
            one(start + seconds)
        self._report.seconds = now
        return self._report

    def check(self) -> Report:
        """Loads this worker's share of all slots once more."""
        self._report = Report()
        for slot in range(self._index, self._load.slots, self._load.workers):
            self._check(slot, self._swap.load_into(slot, self._pages[0]), self._pages[0], "at the end")
        return self._report

    def _room(self) -> bool:
        """Whether the log takes another lap, and the look at every slot after the last."""
        return self._log is None or self._log.room > DRAW + self._load.batch + self._load.slots

    def _value(self, slot: int, page: bytes) -> int:
        """For the history; what is wrong with a page is told by `_check`."""
        read = self._stamp.read(np.frombuffer(page, np.uint64))
        return NOT_WHOLE if read is None or read[0] != slot else value_id(read[1] + 1, read[2])

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


def log_of(directory: Path, index: int) -> Path:
    """Where a worker's log lies."""
    return directory / f"log.{index}"
