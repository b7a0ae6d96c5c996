"""Buffers and reservations: which ranges they have, who holds them, and the table of them in the arena.

Runs on the control thread alone. Only guests can be in a guest's way: cache does not count, and no client is asked.
Invariants: the ranges of guests do not overlap; an entry of the table is in use exactly as long as somebody holds it: a
client, a claimer, or a handle under way.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable
from itertools import islice
from typing import Any

from sortedcontainers import SortedDict

from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.broker.areas import Areas
from gcma_shm.broker.claims import Claims
from gcma_shm.broker.holders import Holders
from gcma_shm.broker.room import Place, Wanted
from gcma_shm.broker.table import Allocation, HandOver, Table
from gcma_shm.errors import ArenaExhausted, BufferExists, NoSuchBuffer, QuotaExceeded, StaleHandle
from gcma_shm.layout import BUFFER
from gcma_shm.sizes import format_size

HAND_OVER_MAX_S = 86400.0  # what a handle may hold an allocation for
HAND_OVERS_MAX = 1024  # of one allocation, under way at the same time
NAMES_PAGE = 1000  # names in one answer


class Allocations:
    """The guests of one arena. `when_freed` is called when memory became free."""

    def __init__(self, plane: Plane, areas: Areas, quota: int | None = None) -> None:
        self._plane = plane
        self._geometry = plane.geometry
        self.areas = areas
        self.holders = Holders(self._geometry.page_size, quota)
        self.when_freed: Callable[[], None] = lambda: None
        self._table = Table(plane)
        self.claims = Claims(plane, self._table)
        self._by_number: dict[int, Allocation] = {}
        self._reservations: set[Allocation] = set()
        self._by_name: SortedDict[str, Allocation] = SortedDict()
        self._hand_overs: dict[int, Allocation] = {}

    # --- making them

    def wanted(
        self, nbytes: int, area: str | None = None, offset: int | None = None, align: int | None = None
    ) -> Wanted:
        """What a request asks for. `offset`: pages from the area's start; `align`: of that offset, in bytes, a power of two.

        Raises NoSuchArea, ValueError for what no area could ever have.
        """
        pages = -(-nbytes // self._geometry.page_size)
        areas = self.areas.of(area)
        if align is not None and align & (align - 1):
            raise ValueError(f"align {align}: expected a power of two, in bytes")
        align_pages = max((align or 1) // self._geometry.page_size, 1)
        largest = max(area.pages for area in areas)
        if align_pages > largest:
            raise ValueError(
                f"align {align}: expected at most the area's size, {largest * self._geometry.page_size} bytes"
            )
        if offset is not None:
            if len(areas) > 1:
                raise ValueError("offset= without area=: an offset is counted from the start of one area; say which")
            align_pages = max(align_pages, areas[0].described.alignment)
            if offset % align_pages:
                raise ValueError(f"offset {offset} pages is not a multiple of align, {align_pages} pages")
            if offset + pages > areas[0].pages:
                raise ValueError(f"offset {offset} + {pages} pages: area {areas[0].name!r} has {areas[0].pages} pages")
        return Wanted(areas, pages, offset, align_pages)

    def check(self, client: int, wanted: Wanted, name: str | None) -> None:
        """Raises BufferExists, QuotaExceeded, or ArenaExhausted for a request that no waiting would help."""
        if name is not None:
            self._refuse_name(name)
        self.holders.check_quota(client, wanted.pages)
        self._table.check_room()
        if not any(area.could_ever(wanted) for area in wanted.areas):
            raise self.exhausted(wanted)

    def settle(self, client: int, request: int, place: Place, kind: int, name: str | None) -> Allocation:
        """Makes a free place the client's. A buffer's cache is dropped on the spot; a reservation is lent again at once."""
        place.area.take(place)
        allocation = self._table.enter(kind, place, client, request, name)
        self._enter(allocation)
        part = place.part
        if kind == BUFFER:
            self._plane.take(part.index, place.first, place.pages, allocation.owner)
            self._add_held(place, place.pages)
        else:
            place.area.offer(part, place.first, place.pages, allocation.owner)
        self._hold(allocation, client)
        return allocation

    # --- holding them

    def free(self, client: int, number: int) -> None:
        """`client` holds the buffer, or reservation, no longer; the last one's free gives the memory back. Raises
        NoSuchBuffer.
        """
        allocation = self._held(client, number)
        self.claims.meet(allocation)
        self.claims.end_own(allocation, client)  # its part in a claim that others share is another matter
        allocation.holders.discard(client)
        self._let_go(allocation, client)

    def attach(self, client: int, number: int, claim: int = 0, token: int = 0) -> Allocation:
        """`client` holds it as well. `claim`: shares that claim of a reservation. `token`: of a hand-over, which ends by this.

        Raises StaleHandle, QuotaExceeded.
        """
        allocation = self._by_number.get(number)
        if allocation is None:
            raise StaleHandle(f"buffer {number} is gone: its last holder has freed it, or died")
        if token in allocation.handed_over and allocation.handed_over[token].claim != claim:
            raise StaleHandle(f"the handle of buffer {number} is of another claim")
        if not allocation.is_known_to(client):
            self.holders.check_quota(client, allocation.place.pages)
        if claim:
            self.claims.join(allocation, claim)
            self.claims.share(allocation, client)
            self.holders.add(client, allocation)
        else:
            self._hold(allocation, client)
        if token in allocation.handed_over:
            giver = allocation.handed_over[token].giver
            self._end_hand_over(allocation, token)
            self._table.write_claimers(allocation)
            self._let_go(allocation, giver)
        return allocation

    def attach_name(self, client: int, name: str) -> Allocation:
        """`client` holds what has that name. Raises NoSuchBuffer, QuotaExceeded."""
        allocation = self._by_name.get(name)
        if allocation is None:
            raise NoSuchBuffer(f"there is no buffer or reservation {name[:80]!r}")
        return self.attach(client, allocation.number)

    def keep(self, client: int, number: int, name: str, keeper_for: Callable[[], int]) -> int:
        """Gives a buffer of `client` that name, and has the keeper that is asked for hold it, until `unlink` or that one's end; BROKER:
        until `unlink` alone. Done a second time it has no effect. Returns the keeper, which is asked for last: it may have to be made.

        Raises NoSuchBuffer, BufferExists, ValueError, QuotaExceeded: the keeper holds too much.
        """
        allocation = self._held(client, number)
        if allocation.is_reservation or allocation.name not in (None, name):
            what = "is a reservation" if allocation.is_reservation else f"has the name {allocation.name!r} already"
            raise ValueError(f"buffer {number} {what}: it cannot be kept under the name {name!r}")
        if allocation.name is None:
            self._refuse_name(name)
        keeper = keeper_for()
        if keeper in allocation.holders:
            return keeper
        self.holders.check_quota(keeper, allocation.place.pages)
        # The name first: should we die in between, its holders have it as before, and nobody keeps what nobody could unlink.
        if allocation.name is None:
            self._table.write_name(allocation, name)
            allocation.name = name
            self._by_name[name] = allocation
        self._hold(allocation, keeper)
        return keeper

    def unlink(self, name: str, keepers: Collection[int], number: int | None = None) -> None:
        """Takes the name off a buffer, and ends its being kept: `keepers` and BROKER hold it no longer. Others do. `number`: only if it
        is the name of that one. Raises NoSuchBuffer.
        """
        allocation = self._by_name.get(name)
        if allocation is None or allocation.is_reservation or number not in (None, allocation.number):
            raise NoSuchBuffer(f"there is no buffer {name[:80]!r}")
        # The keepers first: should we die in between, it has its name for as long as others hold it, and not a keeper without one.
        for keeper in sorted(allocation.holders & {*keepers, layout.BROKER}):
            allocation.holders.discard(keeper)
            self._table.write_holder(allocation, keeper)
            self.holders.discard(keeper, allocation)
        self._table.remove_name(allocation)
        allocation.name = None
        del self._by_name[name]
        if not allocation.is_held:
            self._release(allocation)

    def hand_over(
        self, client: int, number: int, timeout_s: float, claim: int = 0, after_end_s: float = math.inf
    ) -> int:
        """A token that holds it until somebody attaches with it, or for `timeout_s`, and no longer than `after_end_s` after the
        client has gone. Raises NoSuchBuffer, StaleHandle, QuotaExceeded.
        """
        allocation = self._by_number.get(number)
        if allocation is None or not allocation.is_known_to(client):
            raise NoSuchBuffer(f"buffer {number} is not held by this client: freed before, or never allocated by it")
        if len(allocation.handed_over) >= HAND_OVERS_MAX:
            raise QuotaExceeded(
                f"{HAND_OVERS_MAX} handles of buffer {number} are under way; let some be attached first"
            )
        if claim:
            self.claims.join(allocation, claim)
        token = secrets.randbits(62) + 1
        now = time.monotonic()
        deadline = now + min(timeout_s, HAND_OVER_MAX_S)
        allocation.handed_over[token] = HandOver(deadline, claim, client, after_end_s, now + after_end_s)
        self._hand_overs[token] = allocation
        self._table.write_deadline(allocation)
        if claim:
            self._table.write_claimers(allocation)
        return token

    def free_claim(self, client: int, number: int, claim: int) -> None:
        """`client` gives up its part in a claim that several share; the last one's lends the range. Raises NoSuchBuffer."""
        allocation = self._by_number.get(number)
        if allocation is not None and allocation.is_reservation:
            self.claims.meet(allocation)
        if allocation is None or allocation.claim_generation != claim or client not in allocation.claimers:
            raise NoSuchBuffer(f"claim {claim} of reservation {number} is not shared by this client")
        self.claims.leave(allocation, client)
        self._let_go(allocation, client)

    def give_back(self, client: int, allocation: Allocation) -> None:
        """What was allocated for `client`, which never learnt of it."""
        if self._by_number.get(allocation.number) is allocation and client in allocation.holders:
            self.free(client, allocation.number)

    def drop(self, client: int, count: int | None = None) -> int:
        """Frees all, or `count`, of what `client`, which is gone, held or had claimed; returns how much that leaves."""
        for number in self.holders.of(client)[:count]:
            allocation = self._by_number[number]
            self.claims.end(allocation, client)
            allocation.holders.discard(client)
            for one in allocation.handed_over.values():  # they hold on, at nobody's charge
                if one.giver == client:
                    one.outlive_giver(time.monotonic())
            self._table.write_deadline(allocation)
            self._let_go(allocation, client)
        return len(self.holders.of(client))

    def reconcile(self, client: int, known: Iterable[int], known_claims: Iterable[int], made: int = 0) -> None:
        """Frees what `client` holds but does not know of: it was allocated, or attached, for a reply that it never got; or it was
        freed by a message that a broker took with it.

        A claim that it made itself, after the first `made`, is no message's matter: it may have made it a moment ago.
        """
        known_numbers, known_shares = set(known), set(known_claims)
        for number in self.holders.of(client):
            allocation = self._by_number[number]
            if allocation.is_reservation:
                self.claims.meet(allocation)
            made_later = self.claims.is_made_by(allocation, client) and self.claims.ordinal(allocation) > made
            if number not in known_shares and not made_later:
                if client in allocation.claimers:
                    self.claims.leave(allocation, client)
                elif number not in known_numbers:
                    # Of a claim that a signal interrupted, of a reservation that it has released since.
                    self.claims.end_own(allocation, client)
            if number not in known_numbers and not self.claims.has_part(allocation, client):
                allocation.holders.discard(client)
            self._let_go(allocation, client)

    def inherit(self, parent: int, child: int, but_for: Container[int] = ()) -> None:
        """A forked child holds what its parent holds, but for what that has not fetched yet; and shares the claims that its parent
        had made before the fork, all of which it marked then. Its quota is its parent's, and is not asked.
        """
        self.holders.copy_quota(parent, child)
        self._plane.write(self._quota_at(child), self._plane.read(self._quota_at(parent)))
        claims_then = self._plane.read(self._geometry.client_at(child) + layout.CLIENT_INHERITED_AT)
        for number in self.holders.of(parent):
            allocation = self._by_number[number]
            if parent in allocation.holders and number not in but_for:
                self._hold(allocation, child)
            if allocation.is_reservation:
                self.claims.meet(allocation)
                made_later = (
                    self.claims.is_made_by(allocation, parent) and self.claims.ordinal(allocation) > claims_then
                )
                if parent in allocation.claimers and not made_later:
                    self.claims.share(allocation, child)
                    self.holders.add(child, allocation)

    def set_quota(self, client: int, quota: int | None) -> None:
        """Bytes that it may hold, until it leaves; None: no bound. Kept in its record, for a broker that takes over."""
        self.holders.set_quota(client, quota)
        self._plane.write(self._quota_at(client), layout.NO_QUOTA if quota is None else quota)

    def _quota_at(self, client: int) -> int:
        return self._geometry.client_at(client) + layout.CLIENT_QUOTA_AT

    def expire(self) -> None:
        """Ends the hand-overs whose time is over."""
        now = time.monotonic()
        for token, allocation in list(self._hand_overs.items()):
            if allocation.handed_over[token].deadline <= now:
                giver = allocation.handed_over[token].giver
                self._end_hand_over(allocation, token)
                self.claims.leave(allocation, 0)
                self._let_go(allocation, giver)

    # --- after the death of another broker

    def restore(self, clients: Collection[int]) -> list[Allocation]:
        """Takes in what another broker left, with those of its holders that are among `clients`. Raises ArenaError."""
        restored = self._table.restore(self.areas, clients)
        for allocation in restored:
            self._enter(allocation)
            self._hand_overs |= dict.fromkeys(allocation.handed_over, allocation)
            if allocation.is_reservation:
                self.claims.restore(allocation, clients)
            for client in allocation.known_to():
                self.holders.add(client, allocation)
        for client in clients:
            quota = self._plane.read(self._quota_at(client))
            if quota:
                self.holders.set_quota(client, None if quota == layout.NO_QUOTA else quota)
        return restored

    def put_right(self, allocation: Allocation, clients: Container[int]) -> None:
        """Makes the pages of what was restored what its entry says; releases it when nobody holds it: its answer was never sent,
        or its release was cut off.
        """
        place = allocation.place
        if allocation.is_reservation:
            self.claims.put_right(allocation, clients)
        else:
            self._plane.put_right(place.part.index, place.first, place.pages, False, allocation.owner)
            self._add_held(place, place.pages)
        if not allocation.is_held:
            self._release(allocation)

    # --- changing areas

    def drain(self, name: str) -> None:
        """Takes an area out of service. Its reservations stay promised, and are lent no more. Raises NoSuchArea."""
        self.areas.drain(name)
        self._offer_reservations(name)

    def resume(self, name: str) -> None:
        """Puts it back into service. Raises NoSuchArea."""
        self.areas.resume(name)
        self._offer_reservations(name)
        self.when_freed()

    def resize(self, name: str, pages: int) -> None:
        """Grows or shrinks it. Raises NoSuchArea, ValueError, ArenaExhausted."""
        self.areas.resize(name, pages)
        self.when_freed()

    def _offer_reservations(self, name: str) -> None:
        """Those that nobody has claimed; the others follow the area's state when their claimers lend them."""
        for allocation in self._reservations:
            if allocation.place.area.name == name:
                self.claims.end_own(allocation, layout.NOBODY)

    # --- telling

    def describe(self) -> list[dict[str, Any]]:
        """Each area's name, state, and in bytes: size, held by buffers, reserved, lent to cache, free, largest range that
        no guest has.
        """
        size = self._geometry.page_size
        reserved, claimed, lent = Counter[str](), Counter[str](), Counter[str]()
        for allocation in self._reservations:
            name = allocation.place.area.name
            reserved[name] += allocation.place.pages
            if self.claims.is_claimed(allocation.index):
                claimed[name] += allocation.place.pages
            else:
                lent[name] += self.claims.lent(allocation.index)
        infos: list[dict[str, Any]] = []
        for area in self.areas.by_name.values():
            held = claimed[area.name] + sum(self._gauge(part.index, layout.AREA_HELD_AT) for part in area.parts)
            cached = lent[area.name] + sum(self._gauge(part.index, layout.AREA_LENT_AT) for part in area.parts)
            counts = {
                "size": area.pages,
                "held": held,
                "reserved": reserved[area.name],
                "lent": cached,
                "free": area.pages - held - cached,
                "largest_free": area.largest,
                "align": area.described.alignment,
            }
            infos.append(
                {
                    "name": area.name,
                    "cache": bool(area.described.policy),
                    "drained": area.drained,
                    "share": area.described.share,
                }
                | {name: pages * size for name, pages in counts.items()}
            )
        return infos

    def names(self, after: str = "", keepers: Collection[int] = ()) -> tuple[list[dict[str, Any]], bool]:
        """The named buffers and reservations behind that name, in order, and whether there are more. `keepers`: who of the holders
        are no clients but, like the broker, keep it.
        """
        keeping = {*keepers, layout.BROKER}
        behind = islice(self._by_name.irange(after, inclusive=(False, True)), NAMES_PAGE + 1)
        found = [self._by_name[name] for name in behind]
        page = found[:NAMES_PAGE]
        return [
            self.place(allocation)
            | {"name": allocation.name or "", "holders": len(allocation.holders - keeping)}
            | ({"kept_by": kept_by} if (kept_by := sorted(allocation.holders & keeping)) else {})
            for allocation in page
        ], len(found) > NAMES_PAGE

    def place(self, allocation: Allocation) -> dict[str, int | str | bool]:
        """Where a buffer is, as a client is told."""
        place = allocation.place
        told: dict[str, int | str | bool] = {
            "buffer": allocation.number,
            "area": place.area.name,
            "offset": place.offset,
            "first": place.first,
            "nbytes": place.pages * self._geometry.page_size,
        }
        if allocation.is_reservation:
            told["reservation"] = True
        if allocation.name is not None:
            told["name"] = allocation.name
        return told

    def exhausted(self, wanted: Wanted, in_line: int = 0) -> ArenaExhausted:
        """The error for a request that fits nowhere just now; `in_line`: how many waited before it."""
        size = self._geometry.page_size
        requested = wanted.pages * size
        largest = max((area.largest for area in wanted.areas), default=0) * size
        holders = self.holders.in_areas(area.name for area in wanted.areas)
        names = ", ".join(area.name for area in wanted.areas)
        told = f"{format_size(requested)}{f' at page {wanted.offset}' if wanted.offset is not None else ''} in {names}"
        free = f"the largest free range is {format_size(largest)} ({largest // size} pages, {wanted.pages} are wanted)"
        held = f"buffers and reservations of {len(holders)} client(s) hold {format_size(sum(holders.values()))}"
        if all(area.drained for area in wanted.areas):
            why = "drained, out of service until `gcma area resume`"
        elif not any(area.could_ever(wanted) for area in wanted.areas):
            limits = ", ".join(f"{area.name} {format_size(area.limit * size)}" for area in wanted.areas)
            why = f"more than could ever be had there: guests may have at most {limits}, each in one part of the area"
        elif in_line:
            why = f"{in_line} request(s) wait in line, and this one could delay the first; wait as well, with timeout="
        elif (
            largest < max((p.extents.largest for a in wanted.areas for p in a.parts if not a.drained), default=0) * size
        ):
            why = f"the share for buffers is used up; {held}. Free some, wait with timeout=, or make the area larger"
        else:
            why = f"{free}; {held}. Free some, wait with timeout=, or make the area larger"
        return ArenaExhausted(f"no room for {told}: {why}", requested, largest, holders)

    # --- inside

    def _held(self, client: int, number: int) -> Allocation:
        """What `client` holds under that number. Raises NoSuchBuffer."""
        allocation = self._by_number.get(number)
        if allocation is None or client not in allocation.holders:
            raise NoSuchBuffer(f"buffer {number} is not held by this client: freed before, or never allocated by it")
        return allocation

    def _refuse_name(self, name: str) -> None:
        """Raises ValueError for what is no name, BufferExists for one that is in use."""
        layout.refuse_name("buffer", name)
        if name in self._by_name:
            raise BufferExists(f"there is a buffer or reservation {name!r} already: attach to it, or take another name")

    def _enter(self, allocation: Allocation) -> None:
        self._by_number[allocation.number] = allocation
        if allocation.is_reservation:
            self._reservations.add(allocation)
        if allocation.name is not None:
            self._by_name[allocation.name] = allocation

    def _release(self, allocation: Allocation) -> None:
        place, part = allocation.place, allocation.place.part
        if allocation.is_reservation:
            self.claims.seize(allocation)  # and kept until the entry is used again
        # The entry before the lives: should we die in between, a client that takes the claim from us finds, while the entry is
        # still its reservation, that the range's pages are still its entry's, too.
        self._table.leave(allocation)
        place.area.offer(part, place.first, place.pages)
        if allocation.kind == BUFFER:
            self._add_held(place, -place.pages)
        place.area.give(place)
        del self._by_number[allocation.number]
        self._reservations.discard(allocation)
        if allocation.name is not None:
            del self._by_name[allocation.name]
        self.when_freed()

    def _end_hand_over(self, allocation: Allocation, token: int) -> None:
        del allocation.handed_over[token]
        del self._hand_overs[token]
        self._table.write_deadline(allocation)

    def _hold(self, allocation: Allocation, client: int) -> None:
        allocation.holders.add(client)
        self._table.write_holder(allocation, client)
        self.holders.add(client, allocation)

    def _let_go(self, allocation: Allocation, client: int) -> None:
        """After `client` may have ceased to be one; an allocation that nobody holds is released."""
        self._table.write_holder(allocation, client)
        if not allocation.is_known_to(client):
            self.holders.discard(client, allocation)
        if not allocation.is_held:
            self._release(allocation)

    def _gauge(self, index: int, at: int) -> int:
        return self._plane.read(self._geometry.area_at(index) + at)

    def _add_held(self, place: Place, pages: int) -> None:
        self._plane.add(self._geometry.area_at(place.part.index) + layout.AREA_HELD_AT, pages % (1 << 64))

    def _check(self) -> None:
        """Raises AssertionError when an invariant is broken."""
        self.areas._check()
        self.holders._check(self._by_number.values())
        guests: dict[int, int] = {}
        held: Counter[int] = Counter()
        for allocation in self._by_number.values():
            place = allocation.place
            guests[place.first] = place.pages
            held[place.part.index] += place.pages * (not allocation.is_reservation)
            assert place.part.guests.get(place.first) == place.pages, "an allocation that its area does not know"
            assert allocation.is_held, "an allocation that nobody holds"
            assert layout.BROKER not in allocation.holders or (allocation.name and not allocation.is_reservation), (
                "an allocation that is kept, and could not be unlinked"
            )
            assert allocation.name is None or self._by_name[allocation.name] is allocation, (
                "a name that leads elsewhere"
            )
        known = {
            first: n for area in self.areas.by_name.values() for part in area.parts for first, n in part.guests.items()
        }
        assert known == guests, "an area's guest that is no allocation"
        for area in self.areas.by_name.values():
            for part in area.parts:
                assert self._gauge(part.index, layout.AREA_HELD_AT) == held[part.index], "the arena's own count differs"
