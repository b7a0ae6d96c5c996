"""The values of a `SwapMapping`: what is in the slots behind its buckets. Knows no keys' places and no locks.

A value is stored data first, its list pages last to first, its head in the end: whoever finds the head finds the rest. What is read may be
given up meanwhile; whether it was is for the caller to find out, who looks at the bucket again.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Sequence

from gcma_shm.clients import mapping_pages as pages
from gcma_shm.clients.mapping_pages import RUNS_INLINE, Entry, Head, Run, Shape
from gcma_shm.clients.swap import Swap
from gcma_shm.errors import QuotaExceeded, SpillCorrupt


class Values:
    """The values in one swap type. Whoever takes, writes or gives back has the mapping's turn."""

    def __init__(self, swap: Swap, shape: Shape) -> None:
        self._swap = swap
        self._shape = shape
        self._next = shape.first  # where the search for free slots goes on

    def head(self, entry: Entry) -> Head | None:
        """The head page that an entry names; None: it is not there any more, or damaged."""
        page = self._swap.load(entry.slot)
        head = None if page is None else pages.read_head(page, self._shape)
        return head if head is not None and head.tag == entry.tag else None

    def read(self, head: Head) -> bytes | None:
        """A value; None: it is not there any more, or damaged."""
        value: bytes | bytearray = bytes(head.inline)
        if len(value) < head.length:
            found = self._runs(head)
            if found is None:
                return None
            value = bytearray(len(value) + self._shape.pages_beside(head) * self._shape.page_size)
            value[: len(head.inline)] = head.inline
            with memoryview(value)[len(head.inline) :] as rest:
                if not all(self._swap.load_many(_each(found[0]), rest)):
                    return None
            del value[head.length :]
        return bytes(value) if zlib.crc32(value) == head.crc else None

    def _runs(self, head: Head) -> tuple[list[Run], list[int]] | None:
        """Where the rest of a value is, and its list pages; None: not any more."""
        runs, more = list(head.runs), head.more
        lists: list[int] = []
        while more:
            page = self._swap.load(more) if more < self._shape.slots else None
            found = None if page is None else pages.read_list(page, head.tag, self._shape)
            if found is None or len(lists) > self._shape.slots:
                return None
            lists.append(more)
            runs += found[0]
            more = found[1]
        if sum(count for _, count in runs) != self._shape.pages_beside(head) or any(
            first + count > self._shape.slots for first, count in runs
        ):
            return None
        return runs, lists

    def slots_of(self, entry: Entry) -> list[int]:
        """All slots of a value; of one that cannot be read those that can be told, the others are collected one day."""
        try:
            head = self.head(entry)
            found = None if head is None else self._runs(head)
        except SpillCorrupt:
            found = None
        runs, lists = ([], []) if found is None else found
        return [entry.slot, *lists, *_each(runs)]

    def write(self, name: bytes, hash_: int, tag: int, view: memoryview, slots: Sequence[int]) -> Entry:
        """Stores a value in some of these slots; the others stay free. Raises what `Swap.store` raises."""
        shape = self._shape
        inline = shape.inline(name, len(view))
        count = shape.pages_for(len(view) - inline)
        data, spare = slots[:count], list(slots[count:])
        whole = (len(view) - inline) // shape.page_size
        self._swap.store_many(data[:whole], view[inline : inline + whole * shape.page_size])
        if whole < count:
            self._swap.store(data[whole], bytes(view[inline + whole * shape.page_size :]).ljust(shape.page_size, b"\0"))
        runs, more = pages.runs_of(data), 0
        listed = runs[RUNS_INLINE:]
        for start in reversed(range(0, len(listed), shape.runs_per_list)):
            page = pages.list_page(tag, listed[start : start + shape.runs_per_list], more, shape)
            more = spare.pop()
            self._swap.store(more, page)
        head = spare.pop()
        self._swap.store(head, pages.head_page(tag, name, view, runs[:RUNS_INLINE], more, shape))
        return Entry(hash_, head, tag)

    def take(self, count: int, collect: Callable[[], int]) -> list[int]:
        """So many free slots, from where the last search ended; `collect` frees what nobody has. They are free until they are stored
        to: no other writer is about. Raises QuotaExceeded.
        """
        for last in (False, True):
            lap = itertools.chain(range(self._next, self._shape.slots), range(self._shape.first, self._next))
            slots = list(itertools.islice((n for n in lap if n not in self._swap), count))
            if len(slots) == count:
                self._next = slots[-1] + 1
                return slots
            if last or not collect():
                break
        raise QuotaExceeded(
            f"a value of {count} slots: the type has {len(slots)} of its {self._shape.slots} left; remove some"
        )

    def give_back(self, slots: Iterable[int]) -> None:
        """Frees slots."""
        for slot in slots:
            self._swap.invalidate_page(slot)

    def keep_only(self, entries: Iterable[Entry]) -> int:
        """Frees all slots but those of these values. Returns how many."""
        used = {slot for entry in entries for slot in self.slots_of(entry)}
        lost = [n for n in range(self._shape.first, self._shape.slots) if n in self._swap and n not in used]
        self.give_back(lost)
        return len(lost)


def _each(runs: Iterable[Run]) -> Iterable[int]:
    return itertools.chain.from_iterable(range(first, first + count) for first, count in runs)
