"""Ways to place contiguous ranges, for `fragmentation.py`: the broker's own, best fit, first fit, and a binary buddy. All work on `range(count)`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

from gcma_shm._core import Plane
from gcma_shm.areas import Area
from gcma_shm.broker.extents import Extents
from gcma_shm.broker.room import AreaRoom, Part, Place, Wanted

BLOCK = 64  # pages of which the broker counts together how many hold cache
LENT_AFTER = 200  # operations


class Policy(ABC):
    """Free ranges of an area, and where the next buffer goes."""

    @abstractmethod
    def take(self, count: int) -> int | None:
        """Takes `count` in a row; where they begin, None: nothing fits."""

    @abstractmethod
    def give(self, start: int, count: int) -> None:
        """Gives back what `take` gave."""

    @property
    @abstractmethod
    def largest(self) -> int:
        """The largest request that would be granted now."""


class BestFit(Policy):
    """The smallest free range that has them, of equal ones the lowest: the broker's extents, whatever the cache holds."""

    def __init__(self, count: int) -> None:
        self._free = Extents(0, count)

    def take(self, count: int) -> int | None:
        at = self._free.choose(count)
        if at is not None:
            self._free.take(at, count)
        return at

    def give(self, start: int, count: int) -> None:
        self._free.give(start, count)

    @property
    def largest(self) -> int:
        return self._free.largest


class Cache:
    """Stands in for the broker's plane: which pages the cache has. A block is lent again some operations after it was given back."""

    def __init__(self, count: int) -> None:
        self._given_at = [0] * (count // BLOCK + 1)
        self.now = 0

    def give(self, start: int, count: int) -> None:
        """A buffer ends there."""
        self.now += 1
        for block in range(start // BLOCK, (start + count - 1) // BLOCK + 1):
            self._given_at[block] = self.now

    def lent_near(self, first: int, pages: int) -> int:
        """About how many pages of the range hold cache."""
        # Of two ends or ranges the one whose blocks were given back later: by its two outermost blocks, in place of the plane's loop
        # in C over all of them, whose time would be Python's here.
        blocks = (first // BLOCK, (first + pages - 1) // BLOCK)
        return sum(BLOCK for block in blocks if self.now - self._given_at[block] > LENT_AFTER)


class Ours(Policy):
    """What the broker does: best fit, and of ranges that fit about equally well, and of their ends, what costs the cache least."""

    def __init__(self, count: int) -> None:
        self._cache = Cache(count)
        self._area = AreaRoom(cast(Plane, self._cache), Area("area", 0, count))
        self._area.parts.append(Part(0, 0, count, 0))
        self._places: dict[int, Place] = {}

    def take(self, count: int) -> int | None:
        place = next(self._area.places(Wanted((self._area,), count)), None)
        if place is None:
            return None
        self._area.take(place)
        self._places[place.first] = place
        return place.first

    def give(self, start: int, count: int) -> None:
        self._area.give(self._places.pop(start))
        self._cache.give(start, count)

    @property
    def largest(self) -> int:
        return self._area.largest


class FirstFit(Policy):
    """The lowest free range that has them.

    A tree of maxima over the places: its leaf `i` is the length of the free range that begins at `i`, 0 when none does. So the lowest that
    fits is found on one way down, however many ranges there are.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._leaves = 1 << (count - 1).bit_length()
        self._tree = [0] * (2 * self._leaves)
        self._begin_of: dict[int, int] = {}  # of the free range that ends there
        self._add(0, count)

    def take(self, count: int) -> int | None:
        tree = self._tree
        if tree[1] < count:
            return None
        node = 1
        while node < self._leaves:
            node *= 2
            if tree[node] < count:
                node += 1
        start, size = node - self._leaves, tree[node]
        self._remove(start, size)
        if size > count:
            self._add(start + count, size - count)
        return start

    def give(self, start: int, count: int) -> None:
        end = start + count
        if end < self._count and (after := self._tree[self._leaves + end]):
            self._remove(end, after)
            end += after
        before = self._begin_of.get(start)
        if before is not None:
            self._remove(before, start - before)
            start = before
        self._add(start, end - start)

    @property
    def largest(self) -> int:
        return self._tree[1]

    def _add(self, start: int, size: int) -> None:
        self._begin_of[start + size] = start
        self._set(start, size)

    def _remove(self, start: int, size: int) -> None:
        del self._begin_of[start + size]
        self._set(start, 0)

    def _set(self, start: int, size: int) -> None:
        tree, node = self._tree, self._leaves + start
        tree[node] = size
        while node > 1:
            most = max(tree[node], tree[node ^ 1])
            node >>= 1
            if tree[node] == most:
                return
            tree[node] = most


class Buddy(Policy):
    """Blocks of powers of two; of each order the one that became free last, as in Linux. What a request does not fill of its block is lost."""

    def __init__(self, count: int) -> None:
        self._top = count.bit_length() - 1
        if count != 1 << self._top:
            raise ValueError(f"a buddy of {count}: expected a power of two")
        self._free: list[dict[int, None]] = [{} for _ in range(self._top + 1)]
        self._free[self._top][0] = None

    def take(self, count: int) -> int | None:
        order = wanted = (count - 1).bit_length()
        while order <= self._top and not self._free[order]:
            order += 1
        if order > self._top:
            return None
        start, _ = self._free[order].popitem()
        while order > wanted:
            order -= 1
            self._free[order][start + (1 << order)] = None
        return start

    def give(self, start: int, count: int) -> None:
        order = (count - 1).bit_length()
        while order < self._top and (other := start ^ (1 << order)) in self._free[order]:
            del self._free[order][other]
            start = min(start, other)
            order += 1
        self._free[order][start] = None

    @property
    def largest(self) -> int:
        return next((1 << order for order in range(self._top, -1, -1) if self._free[order]), 0)


POLICIES: dict[str, type[Ours] | type[BestFit] | type[FirstFit] | type[Buddy]] = {
    "ours": Ours,
    "best fit": BestFit,
    "first fit": FirstFit,
    "buddy": Buddy,
}
