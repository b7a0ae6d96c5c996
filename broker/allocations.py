"""Contiguous buffers: which ranges they have, who holds them, and the table of them in the arena.

Runs on the control thread alone. Only buffers can be in a buffer's way: cache does not count, and no client is asked.
Invariants: the ranges of buffers do not overlap; an entry of the table is in use exactly as long as its buffer has a
holder.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.broker.extents import Extents
from gcma_shm.errors import ArenaExhausted, NoSuchArea, NoSuchBuffer, QuotaExceeded
from gcma_shm.layout import Area
from gcma_shm.sizes import format_size

_KIND_BITS = 8
_BUFFER = 1
_INDEX_BITS = 16  # of a buffer's number; above it the entry's generation
assert 1 << _INDEX_BITS >= 65536, "layout.plan makes at most 65536 entries"


@dataclass
class Allocation:
    """A buffer. `first` is a page number of the arena, `holders` are client numbers."""

    index: int
    generation: int
    area: int
    first: int
    pages: int
    holders: set[int] = field(default_factory=set)

    @property
    def number(self) -> int:
        """What clients call it; never used again for another."""
        return self.generation << _INDEX_BITS | self.index


class Allocations:
    """The buffers of one arena."""

    def __init__(self, plane: Plane, areas: list[Area]) -> None:
        self._plane = plane
        self._geometry = plane.geometry
        self._areas = areas
        self._area_index = {area.name: index for index, area in enumerate(areas)}
        self._extents = [Extents(area.first, area.pages) for area in areas]
        self._free_entries = list(range(self._geometry.allocations_max - 1, -1, -1))
        self._by_number: dict[int, Allocation] = {}
        self._held: defaultdict[int, set[int]] = defaultdict(set)  # client -> buffer numbers

    def allocate(
        self,
        client: int,
        request: int,
        nbytes: int,
        area: str | None = None,
        offset: int | None = None,
        align: int | None = None,
    ) -> Allocation:
        """A buffer of `nbytes`, rounded up to pages, held by `client`; its cache is dropped on the spot.

        `offset`: exactly that many pages from the area's start. `align`: of that offset, in bytes, a power of two.
        Without `area`: the one where the range fits best. Raises ArenaExhausted, NoSuchArea, ValueError, QuotaExceeded.
        """
        page_size = self._geometry.page_size
        pages = -(-nbytes // page_size)
        align_pages = self._align_pages(align)
        candidates = self._candidates(area)
        if offset is not None:
            chosen = self._exactly(candidates, offset, pages, align_pages)
        else:
            chosen = self._best(candidates, pages, align_pages)
        if chosen is None:
            raise self._exhausted(candidates, pages * page_size, offset)
        if not self._free_entries:
            raise QuotaExceeded(
                f"the arena's table of {self._geometry.allocations_max} buffers is full; free some, or make them larger"
            )
        index, first = chosen
        self._extents[index].take(first, pages)
        allocation = self._enter(index, first, pages, client, request)
        self._plane.take(index, first, pages)
        self._hold(allocation, client)
        return allocation

    def free(self, client: int, number: int) -> None:
        """`client` holds the buffer no longer; the last holder's free gives the memory back. Raises NoSuchBuffer."""
        allocation = self._by_number.get(number)
        if allocation is None or client not in allocation.holders:
            raise NoSuchBuffer(f"buffer {number} is not held by this client: freed before, or never allocated by it")
        allocation.holders.discard(client)
        self._held[client].discard(number)
        self._write_holder(allocation, client)
        if not allocation.holders:
            self._release(allocation)

    def drop(self, client: int, keep: Iterable[int] = ()) -> int:
        """Frees what `client` holds, but for `keep`; returns how many buffers that were."""
        dropped = self._held[client] - set(keep)
        for number in dropped:
            self.free(client, number)
        if not self._held[client]:
            del self._held[client]
        return len(dropped)

    def inherit(self, parent: int, child: int) -> None:
        """A forked child holds what its parent holds."""
        for number in self._held.get(parent, ()):
            self._hold(self._by_number[number], child)

    def areas(self) -> list[dict[str, int | str]]:
        """Each area's name, and in bytes: size, held by buffers, lent to cache, free, largest range that no buffer
        holds.
        """
        page_size = self._geometry.page_size
        infos: list[dict[str, int | str]] = []
        for index, (area, extents) in enumerate(zip(self._areas, self._extents, strict=True)):
            lent = self._plane.read(self._geometry.area_at(index) + layout.AREA_LENT_AT)
            held = area.pages - extents.free
            counts = {
                "size": area.pages,
                "held": held,
                "lent": lent,
                "free": area.pages - held - lent,
                "largest_free": extents.largest,
            }
            infos.append({"name": area.name} | {name: pages * page_size for name, pages in counts.items()})
        return infos

    def place(self, allocation: Allocation) -> dict[str, int | str]:
        """Where a buffer is, as a client is told."""
        area = self._areas[allocation.area]
        return {
            "buffer": allocation.number,
            "area": area.name,
            "offset": allocation.first - area.first,
            "first": allocation.first,
            "nbytes": allocation.pages * self._geometry.page_size,
        }

    def _align_pages(self, align: int | None) -> int:
        if align is None:
            return 1
        if align & (align - 1):
            raise ValueError(f"align {align}: expected a power of two, in bytes")
        return max(align // self._geometry.page_size, 1)

    def _candidates(self, area: str | None) -> list[int]:
        if area is None:
            return list(range(len(self._areas)))
        if area not in self._area_index:
            raise NoSuchArea(f"no area {area!r}: this arena has {', '.join(self._area_index)}")
        return [self._area_index[area]]

    def _exactly(self, candidates: list[int], offset: int, pages: int, align_pages: int) -> tuple[int, int] | None:
        if len(candidates) > 1:
            raise ValueError("offset= without area=: an offset is counted from the start of one area; say which")
        area = self._areas[candidates[0]]
        if offset % align_pages:
            raise ValueError(f"offset {offset} pages is not a multiple of align, {align_pages} pages")
        if offset + pages > area.pages:
            raise ValueError(f"offset {offset} + {pages} pages: area {area.name!r} has {area.pages} pages")
        extents = self._extents[candidates[0]]
        first = area.first + offset
        return (candidates[0], first) if extents.is_free(first, pages) else None

    def _best(self, candidates: list[int], pages: int, align_pages: int) -> tuple[int, int] | None:
        fits = []
        for index in candidates:
            first = self._extents[index].choose(pages, align_pages)
            if first is not None:
                fits.append((self._extents[index].largest, index, first))
        if not fits:
            return None
        _, index, first = min(fits)  # the area whose largest range is spared for others
        return index, first

    def _exhausted(self, candidates: list[int], requested: int, offset: int | None) -> ArenaExhausted:
        page_size = self._geometry.page_size
        largest = max(self._extents[index].largest for index in candidates) * page_size
        holders: defaultdict[int, int] = defaultdict(int)
        for allocation in self._by_number.values():
            if allocation.area in candidates:
                for client in allocation.holders:
                    holders[client] += allocation.pages * page_size
        names = ", ".join(self._areas[index].name for index in candidates)
        where = (
            f"no free range of {format_size(requested)}"
            if offset is None
            else f"{format_size(requested)} at page {offset} are not free"
        )
        return ArenaExhausted(
            f"{where} in {names}: the largest is {format_size(largest)}; buffers of {len(holders)} clients hold the rest. Free some, or "
            "make the area larger",
            requested,
            largest,
            dict(holders),
        )

    def _enter(self, area: int, first: int, pages: int, client: int, request: int) -> Allocation:
        """Writes the table's entry before the range is taken, its state last: a restarted broker finds every range
        that may be taken.
        """
        index = self._free_entries.pop()
        at = self._geometry.allocation_at(index)
        generation = (self._plane.read(at + layout.ALLOCATION_STATE_AT) >> _KIND_BITS) + 1
        for offset, value in (
            (layout.ALLOCATION_FIRST_AT, first),
            (layout.ALLOCATION_PAGES_AT, pages),
            (layout.ALLOCATION_AREA_AT, area),
            (layout.ALLOCATION_CLIENT_AT, client),
            (layout.ALLOCATION_REQUEST_AT, request),
            (layout.ALLOCATION_CLAIM_AT, 0),
            (layout.ALLOCATION_DEADLINE_AT, 0),
            (layout.ALLOCATION_STATE_AT, generation << _KIND_BITS | _BUFFER),
        ):
            self._plane.write(at + offset, value)
        allocation = Allocation(index, generation, area, first, pages)
        self._by_number[allocation.number] = allocation
        return allocation

    def _release(self, allocation: Allocation) -> None:
        self._plane.give(allocation.area, allocation.first, allocation.pages)
        self._extents[allocation.area].give(allocation.first, allocation.pages)
        at = self._geometry.allocation_at(allocation.index)
        self._plane.write(at + layout.ALLOCATION_STATE_AT, allocation.generation << _KIND_BITS)
        del self._by_number[allocation.number]
        self._free_entries.append(allocation.index)

    def _hold(self, allocation: Allocation, client: int) -> None:
        allocation.holders.add(client)
        self._held[client].add(allocation.number)
        self._write_holder(allocation, client)

    def _write_holder(self, allocation: Allocation, client: int) -> None:
        """Writes the word of the entry's holders that `client` has a bit in."""
        word = client // 64
        bits = sum(1 << holder % 64 for holder in allocation.holders if holder // 64 == word)
        self._plane.write(self._geometry.holders_at + allocation.index * self._geometry.holder_bytes + 8 * word, bits)

    def _check(self) -> None:
        """Raises AssertionError when an invariant is broken."""
        taken = [0] * len(self._areas)
        last = -1
        for allocation in sorted(self._by_number.values(), key=lambda a: a.first):
            area = self._areas[allocation.area]
            assert allocation.first > last, "buffers overlap"
            last = allocation.first + allocation.pages - 1
            assert area.first <= allocation.first, "a buffer outside its area"
            assert last < area.first + area.pages, "a buffer outside its area"
            assert allocation.holders, "a buffer without a holder"
            assert all(allocation.number in self._held[client] for client in allocation.holders), (
                "a holder that does not know"
            )
            taken[allocation.area] += allocation.pages
        for index, (area, extents) in enumerate(zip(self._areas, self._extents, strict=True)):
            extents._check()
            assert area.pages - extents.free == taken[index], "free extents and buffers do not add up"
            held = self._plane.read(self._geometry.area_at(index) + layout.AREA_HELD_AT)
            assert held == taken[index], "the arena's own count differs"
