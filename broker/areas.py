"""The areas of an arena: found by name, chosen for a request, drained, resumed, grown and shrunk.

Runs on the control thread alone. Pages of no area are spare: nobody's, until an area grows.

Invariants: parts of areas do not overlap; a page of a part is free, or one guest's; the parts' pages that nobody may fill (no
cache in this area, or it is drained, or they are a buffer's) are in the state BUFFER, so that the reclaim thread leaves them alone
whatever it has read before.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.areas import DRAINED, Area
from gcma_shm.broker.extents import Extents
from gcma_shm.broker.room import AreaRoom, Part, Place, Wanted, delays
from gcma_shm.errors import ArenaError, ArenaExhausted, NoSuchArea
from gcma_shm.sizes import format_size

PASSING_MAX = 4  # places that are tried for a request that would pass another


class Areas:
    """All areas of one arena. `fresh`: nobody has used it; else what lies in them is put right by `recovery`."""

    def __init__(self, plane: Plane, described: list[Area], memory: memoryview, fresh: bool = True) -> None:
        self._plane = plane
        self._memory = memory
        self._geometry = plane.geometry
        self._spare = Extents(self._geometry.nursery_pages, self._geometry.pages - self._geometry.nursery_pages)
        self._entries = list(range(layout.AREAS_MAX - 1, -1, -1))
        self.by_name: dict[str, AreaRoom] = {}
        for area in sorted(described, key=lambda area: area.base):
            if area.name not in self.by_name:
                self.by_name[area.name] = AreaRoom(plane, area)
            self._entries.remove(area.index)
            room = self.by_name[area.name]
            if area.base != room.pages:
                raise ArenaError(
                    f"the arena's table of areas is damaged: a part of {area.name!r} begins at page {area.base} of it, "
                    f"expected {room.pages}"
                )
            part = self._enter_part(room, area.index, area.first, area.pages)
            if fresh and not room.lends:
                room.offer(part, area.first, area.pages)

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

    def place_of(self, first: int, pages: int) -> Place | None:
        """That range, taken for a guest; None: it is in no area, or not free."""
        for area in self.by_name.values():
            for part in area.parts:
                if part.first <= first < part.end and pages and part.extents.is_free(first, pages):
                    place = Place(area, part, first, pages)
                    area.take(place)
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
        part = self._enter_part(area, self._entries.pop(), first, pages)
        if not area.lends:
            area.offer(part, first, pages)
        return part

    def _enter_part(self, area: AreaRoom, index: int, first: int, pages: int) -> Part:
        part = Part(index, first, pages, area.pages)
        self._spare.take(first, pages)
        area.parts.append(part)
        self._write_part(area, part)
        return part

    def _write_part(self, area: AreaRoom, part: Part) -> None:
        """In the arena, and for the reclaim thread."""
        described = replace(area.described, first=part.first, pages=part.pages, base=part.base, index=part.index)
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
