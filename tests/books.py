"""Buffers and reservations as the broker keeps them, for tests of a real arena without a broker around it."""

from __future__ import annotations

import os
from collections.abc import Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.broker.allocations import Allocations
from gcma_shm.broker.areas import Areas
from gcma_shm.broker.table import Allocation
from gcma_shm.errors import StaleHandle
from gcma_shm.layout import BUFFER, RESERVATION

if TYPE_CHECKING:
    from tests.conftest import Bare

PAGE = 4096
CLIENTS = range(2, 7)


def allocations_of(bare: Bare, quota: int | None = None) -> Allocations:
    areas = Areas(bare.plane, bare.arena.areas, memoryview(bare.arena.memory))
    return Allocations(bare.plane, areas, quota)


def client_plane(bare: Bare, number: int) -> Plane:
    """The arena as that client sees it."""
    return Plane(bare.arena.memory, bare.arena.geometry, number, os.fsencode(bare.spill_dir))


def allocate(
    allocations: Allocations,
    client: int,
    nbytes: int,
    area: str | None = None,
    offset: int | None = None,
    align: int | None = None,
    kind: int = BUFFER,
    name: str | None = None,
) -> Allocation:
    """As the line does it when nobody waits in it."""
    wanted = allocations.wanted(nbytes, area, offset, align)
    allocations.check(client, wanted, name)
    place = allocations.areas.find(wanted)
    if place is None:
        raise allocations.exhausted(wanted)
    made = allocations.settle(client, 1, place, kind, name)
    allocations._check()
    return made


def reserve(
    allocations: Allocations, client: int, nbytes: int, area: str | None = None, name: str | None = None
) -> Allocation:
    return allocate(allocations, client, nbytes, area, kind=RESERVATION, name=name)


@dataclass
class Clock:
    """The time, as the broker reads it."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class Worker:
    """A client that claims."""

    bare: Bare
    number: int
    plane: Plane = field(init=False)

    def __post_init__(self) -> None:
        self.plane = client_plane(self.bare, self.number)

    def try_claim(self, reservation: Allocation) -> tuple[bool, int]:
        """Whether it is ours now, and the claim word that is in place. Raises StaleHandle."""
        place, state = reservation.place, reservation.generation << layout.KIND_BITS | RESERVATION
        word, span = self.plane.claim(reservation.index, state, place.first, place.pages)
        if not word:
            raise StaleHandle
        assert span is None or span.nbytes == place.pages * PAGE
        return span is not None, word

    def claim(self, reservation: Allocation) -> int:
        """The claim's word; 0: another has it. Raises StaleHandle."""
        made, word = self.try_claim(reservation)
        assert not made or word & 0xFFFF == self.number
        return word if made else 0

    def lend(self, reservation: Allocation, word: int) -> bool:
        return self.plane.unclaim(reservation.index, word, reservation.place.first, reservation.place.pages)


def claim_word(bare: Bare, reservation: Allocation) -> int:
    return bare.plane.read(bare.arena.geometry.allocation_at(reservation.index) + layout.ALLOCATION_CLAIM_AT)


def fork(
    bare: Bare, allocations: Allocations, parent: int, child: int, but_for: Container[int] = (), inherited: bool = True
) -> None:
    """What a client does before it forks, its claims aside; and, unless the broker is late, what that does of it."""
    g = bare.arena.geometry
    claims = bare.plane.read(g.client_at(parent) + layout.CLIENT_CLAIMS_AT)
    bare.plane.write(g.client_at(child) + layout.CLIENT_INHERITED_AT, claims)
    if inherited:
        allocations.inherit(parent, child, but_for)
        allocations._check()


def states(bare: Bare, allocation: Allocation) -> set[tuple[int, int]]:
    """State and owner of each of its pages."""
    g, place = bare.arena.geometry, allocation.place
    lives = (bare.plane.read(g.life_at + 8 * page) for page in range(place.first, place.first + place.pages))
    return {(life >> 62, life >> 46 & 0xFFFF) for life in lives}
