"""Histories: what processes did to slots, from when to when, in logs that survive SIGKILL.

`RecordedSwap` does what a swap type does and notes each operation in a `Log`. What failed is noted as what it may have done: nothing
(NurseryFull), its whole work (SlotBusy and a SpillError that says so: the page is stored and visible, and that is held against it), or either, at
any time from its start on (whatever else was raised, or the process ended). `linearizable.check` judges a history.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from gcma_shm.clients.proof import MISS, ZEROS, read_page
from gcma_shm.clients.swap import Swap
from gcma_shm.errors import GcmaError, NurseryFull, SlotBusy, SpillError

NEVER = (1 << 64) - 1  # the end of an operation of which nobody knows whether it ended: it may also happen later


class Kind(IntEnum):
    """What an operation was. 0 is no operation: the end of a log."""

    LOAD = 1
    STORE = 2  # an invalidation stores MISS
    REFUSED = 3  # a store that said that nothing has changed


class Operation(NamedTuple):
    """One operation on one slot, by CLOCK_MONOTONIC, which all processes share."""

    kind: Kind
    slot: int
    value: int
    start_ns: int
    end_ns: int = NEVER
    writer: int = 0  # whose log it stands in

    def __str__(self) -> str:
        value = {MISS: "nothing", ZEROS: "zeros"}.get(self.value, f"{self.value >> 32}.{self.value & 0xFFFFFFFF}")
        end = "?" if self.end_ns == NEVER else self.end_ns
        return f"{self.kind.name} slot {self.slot} = {value} [{self.start_ns}, {end}] by {self.writer}"


class Log:
    """The operations of one process, in a mapped file: what it has begun and ended is there also when SIGKILL ends it."""

    _RECORD = struct.Struct(
        "<QQQQQ"
    )  # kind, slot, value, start, end: kind is written last, end (0 till then) when it has ended

    def __init__(self, path: Path, writer: int, operations_max: int = 0) -> None:
        """Makes a log for `operations_max` operations; 0: opens the one that is there."""
        self.path = path
        self.writer = writer
        if operations_max:
            with path.open("xb") as new:
                new.truncate((1 + operations_max) * self._RECORD.size)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self.operations_max = len(self._memory) // self._RECORD.size - 1
        self._words = memoryview(self._memory).cast("Q")
        self._count = 0

    def begin(self, kind: Kind, slot: int, value: int = MISS) -> int:
        """Notes an operation before it is done; returns its place."""
        place = 5 * (1 + self._count)
        self._count += 1
        words = self._words
        words[place + 1], words[place + 2], words[place + 3] = slot, value, time.monotonic_ns()
        words[place] = kind
        return place

    def end(self, place: int, value: int | None = None) -> None:
        """Notes that it was done; for a load, what it returned."""
        self.end_at(place, time.monotonic_ns(), value)

    def end_at(self, place: int, end_ns: int, value: int | None = None) -> None:
        """The same of one that was done at `end_ns`: what was loaded may have to be looked at first."""
        if value is not None:
            self._words[place + 2] = value
        self._words[place + 4] = end_ns
        self._words[0] += 1

    def refused(self, place: int) -> None:
        """Notes that it failed without any effect."""
        self._words[place] = Kind.REFUSED

    @property
    def room(self) -> int:
        """How many more operations it takes."""
        return self.operations_max - self._count

    @property
    def progress(self) -> int:
        """Operations ended; seen by every process that has the log open."""
        return self._words[0]

    def set_progress(self, value: int) -> None:
        """For a log that is nothing but a word that several processes see."""
        self._words[0] = value

    def operations(self, part: int = 0, parts: int = 1) -> list[Operation]:
        """All that was begun on every `parts`-th slot, from `part` on."""
        found = []
        kinds = {kind.value: kind for kind in Kind}
        with memoryview(self._memory) as memory, memory[self._RECORD.size :] as records:
            for kind, slot, value, start, end in self._RECORD.iter_unpack(records):
                if not kind:
                    break
                if slot % parts == part:
                    found.append(Operation(kinds[kind], slot, value, start, end or NEVER, self.writer))
        return found

    def close(self) -> None:
        """Unmaps it."""
        self._words.release()
        self._memory.close()


class RecordedSwap:
    """A swap type, each operation noted. Its slots have the numbers `first` + offset in the log.

    `read`: slot and page to value; raises (TornPage, say) for a page that is none of the slot's. The log must have room: one record a page.
    """

    def __init__(self, swap: Swap, log: Log, first: int = 0, read: Callable[[int, bytes], int] = read_page) -> None:
        self.swap = swap
        self._log = log
        self._first = first
        self._read = read
        self._size = swap.page_size

    def store(self, offset: int, page: Any) -> None:
        """See `Swap.store`."""
        slot = self._first + offset
        at = self._log.begin(Kind.STORE, slot, self._read(slot, bytes(page)))
        try:
            self.swap.store(offset, page)
        except NurseryFull:
            self._log.refused(at)
            raise
        except SlotBusy:
            self._log.end(at)
            raise
        except SpillError as error:
            if error.stored:
                self._log.end(at)
            raise
        self._log.end(at)

    def store_many(self, offsets: Iterable[int], pages: Any) -> None:
        """See `Swap.store_many`."""
        wanted = list(offsets)
        values = [self._value(offset, pages, n) for n, offset in enumerate(wanted)]
        begun = [
            self._log.begin(Kind.STORE, self._first + offset, value)
            for offset, value in zip(wanted, values, strict=True)
        ]
        try:
            self.swap.store_many(wanted, pages)
        except GcmaError as error:
            for at in begun[: error.done]:  # of the others some may be stored
                self._log.end(at)
            raise
        for at in begun:
            self._log.end(at)

    def load(self, offset: int) -> bytes | None:
        """See `Swap.load`."""
        at = self._log.begin(Kind.LOAD, self._first + offset)
        page = self.swap.load(offset)
        end = time.monotonic_ns()
        self._log.end_at(at, end, MISS if page is None else self._read(self._first + offset, page))
        return page

    def load_into(self, offset: int, buffer: Any) -> bool:
        """See `Swap.load_into`."""
        at = self._log.begin(Kind.LOAD, self._first + offset)
        hit = self.swap.load_into(offset, buffer)
        end = time.monotonic_ns()
        self._log.end_at(at, end, self._value(offset, buffer) if hit else MISS)
        return hit

    def load_many(self, offsets: Iterable[int], out: Any) -> list[bool]:
        """See `Swap.load_many`."""
        wanted = list(offsets)
        begun = [self._log.begin(Kind.LOAD, self._first + offset) for offset in wanted]
        hits = self.swap.load_many(wanted, out)
        end = time.monotonic_ns()
        for n, (at, offset, hit) in enumerate(zip(begun, wanted, hits, strict=True)):
            self._log.end_at(at, end, self._value(offset, out, n) if hit else MISS)
        return hits

    def invalidate_page(self, offset: int) -> None:
        """See `Swap.invalidate_page`."""
        at = self._log.begin(Kind.STORE, self._first + offset)
        self.swap.invalidate_page(offset)
        self._log.end(at)

    def invalidate_area(self) -> None:
        """See `Swap.invalidate_area`: to the slots that are used again afterwards it is an invalidation of each."""
        begun = [self._log.begin(Kind.STORE, self._first + offset) for offset in range(self.swap.slots)]
        self.swap.invalidate_area()
        for at in begun:
            self._log.end(at)

    def _value(self, offset: int, pages: Any, n: int = 0) -> int:
        """Of the nth page in one contiguous buffer."""
        with memoryview(pages) as view, view.cast("B") as flat:
            page = bytes(flat[n * self._size : (n + 1) * self._size])
        return self._read(self._first + offset, page)


def gather(logs: Sequence[Log]) -> list[Operation]:
    """What all of them hold."""
    return [operation for log in logs for operation in log.operations()]
