"""Slots as atomic registers: pages that prove what they are, a log of operations that survives SIGKILL, and the check of a history.

The check is promise 3 of the design: a load returns a value that was the slot's at some moment between its start and its end, whole. It is
sound (what it reports is wrong for certain) and not complete: it looks at what is *definitely* older, by the times of the operations alone.
"""

from __future__ import annotations

import bisect
import itertools
import mmap
import struct
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from hashlib import blake2b
from pathlib import Path

MISS = 0  # the value of a slot that holds nothing
ZEROS = 1  # a page of zeros: the one page that several stores share
UNIQUE = 1 << 32  # from here on: writer << 32 | sequence, stored once
NEVER = (
    1 << 64
) - 1  # the end of an operation that failed or whose process was killed: it may have happened, also later

LINE_BYTES = 64
_HEAD = struct.Struct("<8sQQ")
_MAGIC = b"register"


class TornPage(Exception):
    """A page that is not one whole page of its slot."""


def value_id(writer: int, sequence: int) -> int:
    """The value of a writer's page; writers count from 1."""
    assert writer >= 1
    assert 0 <= sequence < UNIQUE
    return writer << 32 | sequence


def _line(slot: int, value: int) -> bytes:
    head = _HEAD.pack(_MAGIC, slot, value)
    return head + blake2b(head, digest_size=LINE_BYTES - len(head)).digest()


def make_page(slot: int, value: int, size: int) -> bytes:
    """The page that stands for `value` in `slot`: each of its lines says so, with a digest, so that no mix of two looks whole."""
    return bytes(size) if value == ZEROS else _line(slot, value) * (size // LINE_BYTES)


def read_page(slot: int, page: bytes) -> int:
    """The value of a whole page of `slot`. Raises TornPage, saying which lines are whose."""
    first = page[:LINE_BYTES]
    if not any(first):
        if not any(page):
            return ZEROS
    else:
        magic, found, value = _HEAD.unpack_from(first)
        assert isinstance(value, int)
        if (
            magic == _MAGIC
            and found == slot
            and first == _line(slot, value)
            and page == first * (len(page) // LINE_BYTES)
        ):
            return value
    raise TornPage(f"slot {slot}: {describe(page)}")


def describe(page: bytes) -> str:
    """Runs of equal lines in a page that should have been one run."""
    lines = [page[at : at + LINE_BYTES] for at in range(0, len(page), LINE_BYTES)]
    runs = []
    at = 0
    for line, equal in itertools.groupby(lines):
        count = len(list(equal))
        magic, slot, value = _HEAD.unpack_from(line)
        whole = magic == _MAGIC and line == _line(slot, value)
        what = (
            f"slot {slot} value {value >> 32}.{value & 0xFFFFFFFF}"
            if whole
            else "zeros"
            if not any(line)
            else f"{line[:24]!r}"
        )
        runs.append(f"lines {at}-{at + count - 1}: {what}")
        at += count
    return "; ".join(runs[:8]) + (f"; and {len(runs) - 8} more" if len(runs) > 8 else "")


class Kind(IntEnum):
    """What an operation was. 0 is no operation: the end of a log."""

    LOAD = 1
    STORE = 2  # an invalidation stores MISS
    REFUSED = 3  # a store that said that nothing has changed


@dataclass(frozen=True, slots=True)
class Operation:
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
        if value is not None:
            self._words[place + 2] = value
        self._words[place + 4] = time.monotonic_ns()
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

    def operations(self) -> list[Operation]:
        """All that was begun."""
        found = []
        for place in range(5, 5 * (1 + self.operations_max), 5):
            kind, slot, value, start, end = self._words[place : place + 5]
            if not kind:
                break
            found.append(Operation(Kind(kind), slot, value, start, end or NEVER, self.writer))
        return found

    def close(self) -> None:
        """Unmaps it."""
        self._words.release()
        self._memory.close()


def check(operations: Iterable[Operation]) -> list[str]:
    """What is wrong with a history in which all slots were empty at first; nothing: no load is known to be wrong."""
    slots: defaultdict[int, list[Operation]] = defaultdict(list)
    for operation in operations:
        slots[operation.slot].append(operation)
    return [wrong for _, history in sorted(slots.items()) for wrong in _check_slot(history)]


def _check_slot(history: list[Operation]) -> list[str]:
    loads = [o for o in history if o.kind is Kind.LOAD and o.end_ns != NEVER]
    stores: defaultdict[int, list[Operation]] = defaultdict(list)
    for store in (o for o in history if o.kind is Kind.STORE):
        stores[store.value].append(store)
    stores[MISS].append(Operation(Kind.STORE, history[0].slot, MISS, -1, -1))  # at first every slot is empty
    assert all(len(stores[value]) == 1 for value in stores if value >= UNIQUE), "values are to be stored once"
    for load in loads:
        # A store that was seen took effect before the load that saw it ended, whatever became of its process: loads are witnesses, too.
        if load.value >= UNIQUE and load.value in stores:
            (store,) = stores[load.value]
            stores[load.value] = [replace(store, end_ns=min(store.end_ns, load.end_ns))]

    # By end: the latest start of a store that had ended by then. What ended before that start is definitely overwritten.
    ended = sorted((o for same in stores.values() for o in same if o.end_ns != NEVER), key=lambda o: o.end_ns)
    ends = [o.end_ns for o in ended]
    latest = list(itertools.accumulate((o.start_ns for o in ended), max))
    starts: dict[
        int, tuple[list[int], list[int]]
    ] = {}  # value -> starts in order, and the latest end of those up to there
    for value, same in stores.items():
        same.sort(key=lambda o: o.start_ns)
        starts[value] = [o.start_ns for o in same], list(itertools.accumulate((o.end_ns for o in same), max))

    wrong = []
    for load in loads:
        begun, until = starts.get(load.value, ([], []))
        candidates = bisect.bisect_right(begun, load.end_ns)
        over = bisect.bisect_left(ends, load.start_ns)
        if not begun:
            wrong.append(f"{load}: never stored there")
        elif not candidates:
            wrong.append(f"{load}: stored only afterwards, from {begun[0]}")
        elif over and until[candidates - 1] < latest[over - 1]:
            by = max(ended[:over], key=lambda o: o.start_ns)
            wrong.append(f"{load}: that store had ended at {until[candidates - 1]}, and was overwritten by {by}")
    return wrong
