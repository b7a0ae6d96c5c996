"""Free ranges of whole numbers, for the pages of an area and for the slot table.

Pure. Invariants: free ranges do not overlap and do not touch (touching ones are one), and both orders hold the same
ranges. Choosing, taking and giving back cost O(log n) in the number of free ranges.
"""

from __future__ import annotations

from sortedcontainers import SortedDict, SortedList


class Extents:
    """The free ranges of `range(first, first + count)`."""

    def __init__(self, first: int, count: int) -> None:
        self.first = first
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

        `align`: the place is a multiple of it, counted from the first. None: nothing is large enough.
        """
        for size, start in self._by_size.irange((count, self.first)):
            at: int = start + (self.first - start) % align
            if at + count <= start + size:
                return at
        return None

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
