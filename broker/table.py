"""The table of buffers and reservations in the arena: what a broker that takes over would find.

Written by the control thread alone. An entry's state is written last, and before its range is taken: every range that may be
taken is found.
"""

from __future__ import annotations

import math
import secrets
import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.broker.areas import Areas
from gcma_shm.broker.room import Place
from gcma_shm.errors import ArenaError, QuotaExceeded
from gcma_shm.layout import INDEX_BITS, KIND_BITS

_KIND = (1 << KIND_BITS) - 1
_NAME = struct.Struct(f"<{layout.NAME_BYTES // 8}Q")


@dataclass
class HandOver:
    """A handle that holds an allocation until somebody attaches with it. `claim`: a generation; 0: not of a claim."""

    deadline: float  # time.monotonic()
    claim: int
    giver: int  # the client that is charged with it meanwhile; 0: it is gone
    after_end_s: float = math.inf  # of the giver: it holds no longer than that without him
    unattended: float = math.inf  # the deadline, had the giver gone at once

    def outlive_giver(self, now: float) -> None:
        """The giver has gone, and is charged no longer."""
        self.giver = layout.NOBODY
        self.deadline = min(self.deadline, now + self.after_end_s)


@dataclass(eq=False)
class Allocation:
    """A buffer or a reservation. `holders` are client numbers; `claimers` those that share the claim of `claim_generation`."""

    index: int
    generation: int
    kind: int
    place: Place
    name: str | None
    holders: set[int] = field(default_factory=set)
    claimers: set[int] = field(default_factory=set)
    claim_generation: int = 0
    handed_over: dict[int, HandOver] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """What clients call it; never used again for another."""
        return self.generation << INDEX_BITS | self.index

    @property
    def owner(self) -> int:
        """What the lives of its pages say."""
        return self.index + 1

    @property
    def is_reservation(self) -> bool:
        """Whether it is lent until it is claimed."""
        return self.kind == layout.RESERVATION

    @property
    def is_held(self) -> bool:
        """Whether anybody, or a handle under way, has it."""
        return bool(self.holders or self.claimers or self.handed_over)

    def is_known_to(self, client: int) -> bool:
        """Whether the client holds it, shares its claim, or has handed it over to somebody who has not come for it yet."""
        return (
            client in self.holders
            or client in self.claimers
            or any(one.giver == client for one in self.handed_over.values())
        )

    def known_to(self) -> set[int]:
        """All such clients."""
        return self.holders | self.claimers | {one.giver for one in self.handed_over.values() if one.giver}


class Table:
    """The entries of one arena."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._geometry = plane.geometry
        self._free = list(range(self._geometry.allocations_max - 1, -1, -1))
        self._used = 0

    def check_room(self) -> None:
        """Raises QuotaExceeded when all entries are in use."""
        if not self._free:
            raise QuotaExceeded(
                f"the arena's table of {self._geometry.allocations_max} buffers is full; free some, or make them larger"
            )

    def enter(self, kind: int, place: Place, client: int, request: int, name: str | None) -> Allocation:
        """A new entry; its claim word goes on counting from whatever the entry was before, and says that nobody has claimed it."""
        index = self._free.pop()
        if index >= self._used:
            self._used = index + 1
            self._plane.entries_used(self._used)
        at = self._geometry.allocation_at(index)
        generation = (self._plane.read(at + layout.ALLOCATION_STATE_AT) >> KIND_BITS) + 1
        claim = self._plane.read(at + layout.ALLOCATION_CLAIM_AT) >> layout.CLAIM_GENERATION_SHIFT
        for offset, value in (
            (layout.ALLOCATION_FIRST_AT, place.first),
            (layout.ALLOCATION_PAGES_AT, place.pages),
            (layout.ALLOCATION_AREA_AT, place.part.index),
            (layout.ALLOCATION_CLIENT_AT, client),
            (layout.ALLOCATION_REQUEST_AT, request),
            (layout.ALLOCATION_CLAIM_AT, claim + 1 << layout.CLAIM_GENERATION_SHIFT),
            (layout.ALLOCATION_DEADLINE_AT, 0),
            (layout.ALLOCATION_LENT_AT, 0),
        ):
            self._plane.write(at + offset, value)
        if name is not None or self._plane.read(at + layout.ALLOCATION_NAME_AT):
            self._write_name(at + layout.ALLOCATION_NAME_AT, name or "")
        allocation = Allocation(index, generation, kind, place, name)
        if allocation.is_reservation:
            self.write_claimers(allocation)
        self._plane.write(at + layout.ALLOCATION_STATE_AT, generation << KIND_BITS | kind)
        return allocation

    def restore(self, areas: Areas, clients: Container[int]) -> list[Allocation]:
        """The entries that another broker left in use, each with those of its holders that are among `clients`.

        Raises ArenaError when an entry contradicts the areas, or another one.
        """
        at = self._geometry.allocations_at + layout.ALLOCATION_STATE_AT
        states = self._plane.read_many(at, self._geometry.allocations_max, layout.ALLOCATION_BYTES)
        restored = [self._read(index, state, areas, clients) for index, state in enumerate(states) if state & _KIND]
        used = {allocation.index for allocation in restored}
        self._free = [index for index in self._free if index not in used]
        self._used = max(used, default=-1) + 1
        self._plane.entries_used(self._used)
        return restored

    def _read(self, index: int, state: int, areas: Areas, clients: Container[int]) -> Allocation:
        at = self._geometry.allocation_at(index)
        words = self._plane.read_many(at, layout.ALLOCATION_BYTES // 8)
        first, pages, deadline = (
            words[offset // 8]
            for offset in (layout.ALLOCATION_FIRST_AT, layout.ALLOCATION_PAGES_AT, layout.ALLOCATION_DEADLINE_AT)
        )
        # Up to the first zero: behind it may be what is left of an older name, whose removal was cut off.
        name_words = words[layout.ALLOCATION_NAME_AT // 8 :][: layout.NAME_BYTES // 8]
        name = _NAME.pack(*name_words).partition(b"\0")[0].decode(errors="replace")
        kind, place = state & _KIND, areas.place_of(first, pages)
        if kind not in (layout.BUFFER, layout.RESERVATION) or place is None:
            raise ArenaError(
                f"the arena's table of buffers is damaged: entry {index} is of kind {kind} and has pages {first} to "
                f"{first + pages}, which are in no area, or another's"
            )
        allocation = Allocation(index, state >> KIND_BITS, kind, place, name or None)
        allocation.holders = {c for c in self._clients_in(self._geometry.holders_at, index) if c in clients}
        if deadline:
            allocation.handed_over[secrets.randbits(62) + 1] = HandOver(deadline / 1e9, 0, layout.NOBODY)
        return allocation

    def _clients_in(self, table_at: int, index: int) -> Iterator[int]:
        size = self._geometry.holder_bytes
        for word, found in enumerate(self._plane.read_many(table_at + index * size, size // 8)):
            bits = found
            while bits:
                yield 64 * word + (bits & -bits).bit_length() - 1
                bits &= bits - 1

    def leave(self, allocation: Allocation) -> None:
        """The entry is free for another."""
        at = self._geometry.allocation_at(allocation.index)
        self._plane.write(at + layout.ALLOCATION_STATE_AT, allocation.generation << KIND_BITS)
        self._free.append(allocation.index)

    def write_holder(self, allocation: Allocation, client: int) -> None:
        """Writes the word of the entry's holders that `client` has a bit in."""
        self._write_bits(self._geometry.holders_at, allocation.index, allocation.holders, client)

    def write_claimers(self, allocation: Allocation) -> None:
        """Writes who shares the entry's claim; the broker's own bit stands for handles under way."""
        handles = any(one.claim == allocation.claim_generation for one in allocation.handed_over.values())
        sharing = allocation.claimers | ({layout.BROKER} if handles and allocation.claim_generation else set())
        for client in range(0, self._geometry.clients_max + 1, 64):
            self._write_bits(self._geometry.claimers_at, allocation.index, sharing, client)

    def claimers(self, allocation: Allocation, clients: Container[int]) -> set[int]:
        """Those that share its claim, as the table says, and are among `clients` or the broker."""
        found = self._clients_in(self._geometry.claimers_at, allocation.index)
        return {client for client in found if client in clients or client == layout.BROKER}

    def _write_bits(self, table_at: int, index: int, clients: set[int], client: int) -> None:
        word = client // 64
        bits = sum(1 << one % 64 for one in clients if one // 64 == word)
        self._plane.write(table_at + index * self._geometry.holder_bytes + 8 * word, bits)

    def write_deadline(self, allocation: Allocation) -> None:
        """Until when it may be held by handles alone, in nanoseconds of CLOCK_MONOTONIC. A broker that takes over knows no givers, so
        those that end with theirs count as if he had gone at once.
        """
        latest = max((min(one.deadline, one.unattended) for one in allocation.handed_over.values()), default=0.0)
        at = self._geometry.allocation_at(allocation.index) + layout.ALLOCATION_DEADLINE_AT
        self._plane.write(at, int(latest * 1e9))

    def _write_name(self, at: int, name: str) -> None:
        name_bytes = name.encode().ljust(layout.NAME_BYTES, b"\0")
        for word in range(0, layout.NAME_BYTES, 8):
            self._plane.write(at + word, int.from_bytes(name_bytes[word : word + 8], "little"))
