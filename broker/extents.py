"""Free ranges of whole numbers, for the pages of an area and for the slot table.

Pure. Invariants: free ranges do not overlap and do not touch (touching ones are one), and both orders hold the same
ranges. Choosing, taking and giving back cost O(log n) in the number of free ranges.
"""

from __future__ import annotations

from collections.abc import Iterator

from sortedcontainers import SortedDict, SortedList

LOOK_MAX = 16  # ranges that are large enough but for their alignment, looked at before surely large ones


class Extents:
    """The free ranges of `range(first, first + count)`; `origin`: what alignment is counted from, by default the first."""

    def __init__(self, first: int, count: int, origin: int | None = None) -> None:
        self.first = first
        self.origin = first if origin is None else origin
        self.count = count
        self.free = count
        self._by_start = SortedDict({first: count} if count else {})
        self._by_size = SortedList([(count, first)] if count else [])

    @property
    def largest(self) -> int:
        """Length of the largest free range; 0: none is free."""
        return self._by_size[-1][0] if self._by_size else 0

    def choose(self, count: int, align: int = 1) -> int | None:
        """Where `count` in a row would fit best: the smallest free range that has them, of equal ones the lowest.

        `align`: the place is a multiple of it, counted from `origin`. None: nothing is large enough.
        """
        return next((at for at, _, _ in self.fitting(count, align)), None)

    def fitting(self, count: int, align: int = 1) -> Iterator[tuple[int, int, int]]:
        """The free ranges that have room for `count` in a row, best fit first: where the room begins, and the range's start
        and size.

        A range of `count + align - 1` always has room. Smaller ones may; a few of them are looked at first, and all of them
        when no larger one is left, so that the first answer costs O(log n) unless memory is nearly out.
        """
        looked = 0
        large = count + align - 1
        skipped = False
        for size, start in self._by_size.irange((count, self.first), (large, self.first), inclusive=(True, False)):
            if looked == LOOK_MAX and self.largest >= large:
                skipped = True
                break
            looked += 1
            at = self._aligned(start, align)
            if at + count <= start + size:
                yield at, start, size
        for size, start in self._by_size.irange((large, self.first)):
            yield self._aligned(start, align), start, size
        if skipped:
            for size, start in self._by_size.islice(self._by_size.bisect_left((count, self.first)) + looked):
                if size >= large:
                    return
                at = self._aligned(start, align)
                if at + count <= start + size:
                    yield at, start, size

    def _aligned(self, start: int, align: int) -> int:
        return start + (self.origin - start) % align

    def ranges(self) -> list[tuple[int, int]]:
        """The free ranges, start and size, in order."""
        return list(self._by_start.items())

    def run_at(self, start: int) -> int:
        """How many are free from `start` on."""
        begin, size = self._around(start)
        return max(begin + size - start, 0)

    def grow(self, count: int) -> None:
        """`count` more at the end, free."""
        self.count += count
        self.give(self.first + self.count - count, count)

    def cut(self, count: int) -> None:
        """The last `count` are gone. Raises ValueError, and changes nothing, when some of them are not free."""
        self.take(self.first + self.count - count, count)
        self.count -= count

    @property
    def free_at_end(self) -> int:
        """Length of the free range that reaches to the end; 0: there is none."""
        begin, size = self._around(self.first + self.count - 1)
        return size if size and begin + size == self.first + self.count else 0

    def is_free(self, start: int, count: int) -> bool:
        """Whether all of that range is free."""
        begin, size = self._around(start)
        return start + count <= begin + size

    def take(self, start: int, count: int) -> None:
        """Takes exactly that range. Raises ValueError, and changes nothing, when some of it is not free."""
        begin, size = self._around(start)
        if count < 1 or start + count > begin + size:
            raise ValueError(f"the range {start} to {start + count} is not free")
        self._remove(begin, size)
        if begin < start:
            self._add(begin, start - begin)
        if start + count < begin + size:
            self._add(start + count, begin + size - start - count)
        self.free -= count

    def give(self, start: int, count: int) -> None:
        """Gives a taken range back. Raises ValueError, and changes nothing, when some of it is free or outside."""
        end = start + count
        index = self._by_start.bisect_right(start)
        before = self._by_start.peekitem(index - 1) if index else None
        after = self._by_start.peekitem(index) if index < len(self._by_start) else None
        if (
            count < 1
            or start < self.first
            or end > self.first + self.count
            or (before and before[0] + before[1] > start)
            or (after and after[0] < end)
        ):
            raise ValueError(f"the range {start} to {end} is not taken")
        self.free += count
        if before and before[0] + before[1] == start:
            self._remove(*before)
            start = before[0]
        if after and after[0] == end:
            self._remove(*after)
            end += after[1]
        self._add(start, end - start)

    def _around(self, start: int) -> tuple[int, int]:
        """The free range that begins at or before `start`; an empty one when there is none."""
        index = self._by_start.bisect_right(start) - 1
        return self._by_start.peekitem(index) if index >= 0 else (start, 0)

    def _add(self, start: int, size: int) -> None:
        self._by_start[start] = size
        self._by_size.add((size, start))

    def _remove(self, start: int, size: int) -> None:
        del self._by_start[start]
        self._by_size.remove((size, start))

    def _check(self) -> None:
        """Raises AssertionError when an invariant is broken."""
        ranges = list(self._by_start.items())
        assert sorted((size, start) for start, size in ranges) == list(self._by_size), "the orders differ"
        assert sum(size for _, size in ranges) == self.free, "the sum is wrong"
        end = self.first - 1
        for start, size in ranges:
            assert size >= 1, "an empty range"
            assert start > end, "ranges overlap or touch"
            end = start + size
        assert end <= self.first + self.count, "a range outside"
