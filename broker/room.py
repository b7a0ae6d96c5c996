"""The room in one area: its parts, what is free in them, and where a request goes.

Runs on the control thread alone. An area is one part, or several when it was grown: a part is a range of pages with an entry
in the arena's table. Buffers and reservations are both called guests here; the cache is never in their way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import chain

from sortedcontainers import SortedDict

from gcma_shm._core import Plane
from gcma_shm.areas import DRAINED, LENT, SHARE_WHOLE, Area
from gcma_shm.broker.extents import Extents

EQUAL_FITS = 4  # free ranges that fit about equally well, of which the cache decides
EQUAL_SHARE = 8  # a range that is larger by no more than this part fits about equally well
LOOK_MAX = 256  # guests that one look at the line considers


class Part:
    """A range of pages of one area."""

    def __init__(self, index: int, first: int, pages: int, base: int) -> None:
        self.index = index  # in the arena's table
        self.base = base  # offset of its first page in the area
        self.extents = Extents(first, pages, first - base)
        self.guests: SortedDict[int, int] = SortedDict()  # first page -> pages

    @property
    def first(self) -> int:
        """Its first page."""
        return self.extents.first

    @property
    def pages(self) -> int:
        """How many it has."""
        return self.extents.count

    @property
    def end(self) -> int:
        """The page behind its last."""
        return self.extents.first + self.extents.count


@dataclass(frozen=True)
class Place:
    """A free range that was chosen for a guest."""

    area: AreaRoom
    part: Part
    first: int
    pages: int

    @property
    def offset(self) -> int:
        """Pages from the area's start."""
        return self.first - self.part.extents.origin


@dataclass(frozen=True)
class Wanted:
    """What a request asks for, in pages: `areas` in question, `offset` in the one area, `align` of the offset."""

    areas: tuple[AreaRoom, ...]
    pages: int
    offset: int | None = None
    align: int = 1


class AreaRoom:
    """One area."""

    def __init__(self, plane: Plane, described: Area) -> None:
        self._plane = plane
        self.name = described.name
        self.described = described
        self.parts: list[Part] = []

    @property
    def drained(self) -> bool:
        """Whether it is out of service."""
        return bool(self.described.state & DRAINED)

    @property
    def lends(self) -> bool:
        """Whether the cache may use what no buffer holds."""
        return bool(self.described.policy & LENT) and not self.drained

    @property
    def pages(self) -> int:
        """All of it."""
        return sum(part.pages for part in self.parts)

    @property
    def free(self) -> int:
        """Pages that no guest has."""
        return sum(part.extents.free for part in self.parts)

    @property
    def limit(self) -> int:
        """How many pages guests may have together, by its share."""
        return self.pages * self.described.share // SHARE_WHOLE

    @property
    def allowance(self) -> int:
        """How many more pages guests may have by its share; whether they are in a row is another question."""
        if self.drained:
            return 0
        return max(self.limit - (self.pages - self.free), 0)

    @property
    def largest(self) -> int:
        """The largest range that a guest could have."""
        return min(max((part.extents.largest for part in self.parts), default=0), self.allowance)

    def could_ever(self, wanted: Wanted) -> bool:
        """Whether it would fit if no guest were here."""
        if wanted.pages > self.limit:
            return False
        align = max(wanted.align, self.described.alignment)
        for part in self.parts:
            origin = part.extents.origin
            first = origin + wanted.offset if wanted.offset is not None else part.first + (origin - part.first) % align
            if part.first <= first and first + wanted.pages <= part.end:
                return True
        return False

    def take(self, place: Place) -> None:
        """The place is a guest's."""
        place.part.extents.take(place.first, place.pages)
        place.part.guests[place.first] = place.pages

    def give(self, place: Place) -> None:
        """It is free again."""
        place.part.extents.give(place.first, place.pages)
        del place.part.guests[place.first]

    def offer(self, part: Part, first: int, pages: int, owner: int = 0) -> None:
        """Pages that no buffer holds: lent to the cache, or kept from it."""
        if self.lends:
            self._plane.give(part.index, first, pages, owner)
        else:
            self._plane.take(part.index, first, pages, owner)

    def places(self, wanted: Wanted, passing: bool = False) -> Iterator[Place]:
        """Where it could go in this area, the best first. `passing`: out of the way of another, so also at the area's very end."""
        align = max(wanted.align, self.described.alignment)
        if wanted.pages > self.allowance:
            return
        if wanted.offset is not None:
            for part in self.parts:
                first = part.extents.origin + wanted.offset
                if part.first <= first < part.end and part.extents.is_free(first, wanted.pages):
                    yield Place(self, part, first, wanted.pages)
            return
        yield from self._by_cost(wanted.pages, align, passing)

    def _by_cost(self, pages: int, align: int, passing: bool) -> Iterator[Place]:
        """Best fit; of ranges that fit about equally well, and of their two ends, first what costs the cache least.

        The range at an area's end is taken from below: buffers grow from one end, and the cache fills from the other.
        """
        fits = self._fits(pages, align)
        equal: list[tuple[int, int, int, int]] = []
        worse: tuple[int, int, int, int] | None = None
        for fit in fits:
            if len(equal) == EQUAL_FITS or (equal and fit[0] > equal[0][0] + equal[0][0] // EQUAL_SHARE):
                worse = fit
                break
            equal.append(fit)
        places = [place for fit in equal for place in self._ends(fit, pages, align, passing)]
        if len(places) > 1:
            places.sort(key=lambda place: self._cost(place.first, pages))  # of equal ones the better fit
        yield from places
        if worse is not None:
            for fit in chain((worse,), fits):
                yield from self._ends(fit, pages, align, passing)

    def _fits(self, pages: int, align: int) -> Iterator[tuple[int, int, int, int]]:
        """Free ranges with room, best fit first: size, where the room begins, the range's start, and its part."""
        found = [self._fits_in(index, pages, align) for index in range(len(self.parts))]
        return found[0] if len(found) == 1 else merge(*found)

    def _fits_in(self, index: int, pages: int, align: int) -> Iterator[tuple[int, int, int, int]]:
        for at, start, size in self.parts[index].extents.fitting(pages, align):
            yield size, at, start, index

    def _ends(self, fit: tuple[int, int, int, int], pages: int, align: int, passing: bool) -> Iterator[Place]:
        """The range's lower end, and its upper one if that is another and not the area's."""
        size, at, start, index = fit
        part = self.parts[index]
        yield Place(self, part, at, pages)
        highest = at + (start + size - pages - at) // align * align
        if highest != at and (passing or start + size < part.end):
            yield Place(self, part, highest, pages)

    def _cost(self, first: int, pages: int) -> int:
        return self._plane.lent_near(first, pages) if self.lends else 0


def delays(waiting: Wanted, place: Place) -> bool:
    """Whether a guest at `place` could make `waiting`, which fits nowhere yet, wait longer than it would without.

    `waiting` is served once all guests in some window of its size have gone. It is not delayed when for each window that
    touches the place there is another one that does not, and that needs none but the same guests to go: then whoever goes
    first, it is served at the same moment.
    """
    if place.area not in waiting.areas:
        return False
    if place.area.described.share != SHARE_WHOLE and place.pages + waiting.pages > place.area.allowance:
        return True  # what the guest has of the share, the waiting one may lack
    part, begin, end = place.part, place.first, place.first + place.pages
    origin, align = part.extents.origin, max(waiting.align, place.area.described.alignment)
    if waiting.offset is not None:
        first = origin + waiting.offset
        return first < end and begin < first + waiting.pages

    def aligned(page: int) -> int:
        return page + (origin - page) % align

    # Windows by the range that is theirs once their own guests have gone: it begins where the guest before ends. The
    # leftmost window of each such range is the one with the least room to its right.
    starts = [part.first]
    for first in part.guests.irange(maximum=begin, reverse=True):
        starts.append(first + part.guests[first])
        if starts[-1] <= begin - waiting.pages or len(starts) > LOOK_MAX:
            break
    if len(starts) > LOOK_MAX:
        return True  # too many to tell in a moment
    for start in starts:
        window = max(aligned(start), aligned(begin - waiting.pages + 1))
        if window >= end or window + waiting.pages > part.end:
            continue
        index = part.guests.bisect_left(window + waiting.pages)
        stop = part.guests.peekitem(index)[0] if index < len(part.guests) else part.end
        if aligned(start) + waiting.pages > begin and aligned(end) + waiting.pages > stop:
            return True
    return False
