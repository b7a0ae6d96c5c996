"""The areas of an arena: where they are, what is free in them, and where a request goes.

Runs on the control thread alone. An area is one part, or several when it was grown: a part is a range of pages with an entry
in the arena's table. Pages of no part are spare: nobody's, until an area grows. Buffers and reservations are both called
guests here; the cache is never in their way.

Invariants: parts do not overlap; a page of a part is free, or one guest's; the parts' pages that nobody may fill (no cache in
this area, or it is drained, or they are a buffer's) are in the state BUFFER, so that the reclaim thread leaves them alone
whatever it has read before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from sortedcontainers import SortedDict

from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.areas import DRAINED, LENT, SHARE_WHOLE, Area
from gcma_shm.broker.extents import Extents
from gcma_shm.errors import ArenaError, ArenaExhausted, NoSuchArea
from gcma_shm.sizes import format_size

EQUAL_FITS = 8  # free ranges that fit about equally well, of which the cache decides
LOOK_MAX = 256  # guests that one look at the line considers
PASSING_MAX = 4  # places that are tried for a request that would pass another
EQUAL_SHARE = 8  # a range that is larger by no more than this part fits about equally well


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
        found: list[tuple[int, int, Place]] = []  # size of the range, cost
        for part in self.parts:
            for at, start, size in islice(part.extents.fitting(pages, align), EQUAL_FITS):
                ends = {at}
                if passing or start + size < part.end:
                    ends.add(at + (start + size - pages - at) // align * align)
                found.extend((size, self._cost(end, pages), Place(self, part, end, pages)) for end in ends)
        if not found:
            return
        limit = min(size for size, _, _ in found)
        limit += limit // EQUAL_SHARE
        found.sort(key=lambda one: (one[0] > limit, one[0] if one[0] > limit else 0, one[1], one[0], one[2].first))
        yield from (place for _, _, place in found)

    def _cost(self, first: int, pages: int) -> int:
        return self._plane.lent_near(first, pages) if self.lends else 0


class Areas:
    """All areas of one arena."""

    def __init__(self, plane: Plane, described: list[Area], memory: memoryview) -> None:
        self._plane = plane
        self._memory = memory
        self._geometry = plane.geometry
        self._spare = Extents(self._geometry.nursery_pages, self._geometry.pages - self._geometry.nursery_pages)
        self._entries = list(range(layout.AREAS_MAX - 1, -1, -1))
        self.by_name: dict[str, AreaRoom] = {}
        for area in described:
            self.by_name[area.name] = AreaRoom(plane, area)
            self._add_part(self.by_name[area.name], area.first, area.pages)

    def of(self, name: str | None) -> tuple[AreaRoom, ...]:
        """That area, or all. Raises NoSuchArea."""
        if name is None:
            return tuple(self.by_name.values())
        if name not in self.by_name:
            raise NoSuchArea(f"no area {name!r}: this arena has {', '.join(self.by_name)}")
        return (self.by_name[name],)

    def find(self, wanted: Wanted) -> Place | None:
        """The best place: in the area where the range fits best, so that the largest one is spared for others."""
        for area in sorted(wanted.areas, key=lambda area: area.largest):
            place = next(area.places(wanted), None)
            if place is not None:
                return place
        return None

    def find_passing(self, wanted: Wanted, first_in_line: Wanted) -> Place | None:
        """A place that can not delay who is first in line."""
        for area in sorted(wanted.areas, key=lambda area: area.largest):
            for place in islice(area.places(wanted, passing=True), PASSING_MAX):
                if not delays(first_in_line, place):
                    return place
        return None

    def drain(self, name: str) -> None:
        """Takes an area out of service: no new guests, no cache. Who holds something there is not disturbed."""
        (area,) = self.of(name)
        self._describe(area, replace(area.described, state=area.described.state | DRAINED))
        self._offer_free(area)

    def resume(self, name: str) -> None:
        """Puts a drained area back into service."""
        (area,) = self.of(name)
        self._describe(area, replace(area.described, state=area.described.state & ~DRAINED))
        self._offer_free(area)

    def resize(self, name: str, pages: int) -> None:
        """Grows an area by spare pages of the arena, or shrinks it at its end, whose pages become spare.

        Raises ArenaExhausted when a guest, or too few spare pages, are in the way; then nothing has changed.
        """
        (area,) = self.of(name)
        if pages < 1:
            raise ValueError(
                f"area {name!r} of {pages} pages: expected at least one; drain it to take it out of service"
            )
        if pages < area.pages:
            self._shrink(area, area.pages - pages)
        elif pages > area.pages:
            self._grow(area, pages - area.pages)

    @property
    def spare(self) -> int:
        """Pages of the arena that are in no area."""
        return self._spare.free

    def _shrink(self, area: AreaRoom, wanted: int) -> None:
        ends: list[tuple[Part, int]] = []
        left = wanted
        for part in reversed(area.parts):
            count = min(left, part.extents.free_at_end)
            if count:
                ends.append((part, count))
            left -= count
            if not left or count < part.pages:
                break
        if left:
            size = self._geometry.page_size
            raise ArenaExhausted(
                f"area {area.name!r} cannot be shrunk to {format_size((area.pages - wanted) * size)}: a buffer or reservation is in "
                f"the way; {format_size((area.pages - wanted + left) * size)} is the least just now",
                wanted * size,
                (wanted - left) * size,
            )
        for part, count in ends:
            self._plane.take(
                part.index, part.end - count, count
            )  # nobody's from now on, whatever the reclaim thread does
            part.extents.cut(count)
            self._spare.give(part.end, count)
            self._write_part(area, part)
            if not part.pages:
                area.parts.remove(part)
                self._entries.append(part.index)

    def _grow(self, area: AreaRoom, wanted: int) -> None:
        last, left = area.parts[-1], wanted
        at_end = min(self._spare.run_at(last.end), wanted)
        left -= at_end
        base, new_parts = area.pages + at_end, []
        for first, size in sorted(self._spare.ranges(), key=lambda one: -one[1]):
            if not left:
                break
            # Not what continues the last part, and as far on as the offsets in it are aligned like those of the other parts.
            start = first + at_end if first == last.end else first
            start += (base - start - self._geometry.pages_at // self._geometry.page_size) % area.described.alignment
            count = min(first + size - start, left)
            if count > 0:
                new_parts.append((start, count))
                base += count
                left -= count
        if left:
            size = self._geometry.page_size
            raise ArenaExhausted(
                f"area {area.name!r} cannot grow by {format_size(wanted * size)}: {format_size(self._spare.free * size)} of the arena "
                "are in no area, and not all of that may be aligned as this one needs it; shrink another one first",
                wanted * size,
                (wanted - left) * size,
            )
        if len(new_parts) > len(self._entries):
            raise ArenaError(
                f"area {area.name!r} would have too many parts: an arena has {layout.AREAS_MAX} for all areas"
            )
        if at_end:
            self._spare.take(last.end, at_end)
            last.extents.grow(at_end)
            self._write_part(area, last)
            area.offer(last, last.end - at_end, at_end)
        for start, count in new_parts:
            part = self._add_part(area, start, count)
            if area.lends:
                area.offer(part, start, count)

    def _add_part(self, area: AreaRoom, first: int, pages: int) -> Part:
        part = Part(self._entries.pop(), first, pages, area.pages)
        self._spare.take(first, pages)
        area.parts.append(part)
        self._write_part(area, part)
        if not area.lends:
            area.offer(part, first, pages)
        return part

    def _write_part(self, area: AreaRoom, part: Part) -> None:
        """In the arena, and for the reclaim thread."""
        described = replace(area.described, first=part.first, pages=part.pages)
        layout.write_area(self._memory, self._geometry, part.index, described)
        self._plane.set_area(part.index, part.first, part.pages)

    def _describe(self, area: AreaRoom, described: Area) -> None:
        area.described = described
        for part in area.parts:
            self._write_part(area, part)

    def _offer_free(self, area: AreaRoom) -> None:
        for part in area.parts:
            for first, pages in part.extents.ranges():
                area.offer(part, first, pages)

    def _check(self) -> None:
        """Raises AssertionError when an invariant is broken."""
        seen: list[tuple[int, int]] = []
        for area in self.by_name.values():
            base = 0
            for part in area.parts:
                part.extents._check()
                assert part.base == base, "offsets with gaps"
                base += part.pages
                ranges = sorted([*part.extents.ranges(), *part.guests.items()])
                assert sum(pages for _, pages in ranges) == part.pages, "pages that are nobody's, or two's"
                at = part.first
                for first, pages in ranges:
                    assert first == at, "a gap, or an overlap"
                    at += pages
                seen.append((part.first, part.pages))
        self._spare._check()
        seen = sorted([*seen, *self._spare.ranges()])
        at = self._geometry.nursery_pages
        for first, pages in seen:
            assert first == at, "parts and spare pages do not fit together"
            at += pages
        assert at == self._geometry.pages, "pages behind the last"


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
