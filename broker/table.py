"""The table of buffers and reservations in the arena: what a broker that takes over would find.

Written by the control thread alone. An entry's state is written last, and before its range is taken: every range that may be
taken is found.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.broker.room import Place
from gcma_shm.errors import QuotaExceeded
from gcma_shm.layout import INDEX_BITS, KIND_BITS


@dataclass
class HandOver:
    """A handle that holds an allocation until somebody attaches with it. `claim`: a generation; 0: not of a claim."""

    deadline: float  # time.monotonic()
    claim: int
    giver: int  # the client that is charged with it meanwhile; 0: it is gone


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
        self._plane.write(at + layout.ALLOCATION_STATE_AT, generation << KIND_BITS | kind)
        return Allocation(index, generation, kind, place, name)

    def leave(self, allocation: Allocation) -> None:
        """The entry is free for another."""
        at = self._geometry.allocation_at(allocation.index)
        self._plane.write(at + layout.ALLOCATION_STATE_AT, allocation.generation << KIND_BITS)
        self._free.append(allocation.index)

    def write_holder(self, allocation: Allocation, client: int) -> None:
        """Writes the word of the entry's holders that `client` has a bit in."""
        word = client // 64
        bits = sum(1 << holder % 64 for holder in allocation.known_to() if holder // 64 == word)
        self._plane.write(self._geometry.holders_at + allocation.index * self._geometry.holder_bytes + 8 * word, bits)

    def write_deadline(self, allocation: Allocation) -> None:
        """Until when it may be held by handles alone, in nanoseconds of CLOCK_MONOTONIC."""
        latest = max((one.deadline for one in allocation.handed_over.values()), default=0.0)
        at = self._geometry.allocation_at(allocation.index) + layout.ALLOCATION_DEADLINE_AT
        self._plane.write(at, int(latest * 1e9))

    def _write_name(self, at: int, name: str) -> None:
        name_bytes = name.encode().ljust(layout.NAME_BYTES, b"\0")
        for word in range(0, layout.NAME_BYTES, 8):
            self._plane.write(at + word, int.from_bytes(name_bytes[word : word + 8], "little"))
