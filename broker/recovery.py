"""What a broker does with an arena that a killed one left, before it serves: sessions, types, buffers, reservations and cache are
found in the tables, what was under way is finished or rolled back, and everything else stays in place.

A broker may be killed at any instruction, this one too: each step leaves the tables such that the next broker may begin again.
Clients go on all the while, without a broker. The order matters, and is told here; docs/data-plane.md has the steps by name.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.broker.allocations import Allocations
from gcma_shm.broker.registry import TypeRegistry
from gcma_shm.broker.sessions import Client, Sessions
from gcma_shm.sizes import counted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What a new broker found. `gone`: clients that died while there was none; `burying`: numbers of those that the old broker was
    about to bury.
    """

    gone: list[Client]
    burying: list[int]
    seconds: float


def forget_announcements(plane: Plane) -> None:
    """The dead broker's copy of a page never goes on, nor its sweep. Before the new one signs: from then on a claimer waits for a
    copy that is announced.
    """
    plane.write(layout.FILLING_AT, 0)  # @recover.filling
    plane.write(layout.TAKING_AT, 0)


def recover(plane: Plane, registry: TypeRegistry, allocations: Allocations, sessions: Sessions) -> Found:
    """Raises ArenaError when the tables contradict themselves: nothing has been changed then that a dead broker could not have
    left.
    """
    begun = time.monotonic()
    burying = sessions.restore()
    known = {*sessions.clients, *burying}
    restored = allocations.restore(known)
    # Now that all that can be refused has been read: the broker's own grants and claims of places in the files, which are in the
    # name of the number that this one has as well.
    plane.bury([layout.BROKER])  # @recover.claims
    registry.restore()
    # Before the dead are buried: a child that the old broker had not taken in yet holds what its parent holds.
    gone = sessions.adopt_forked(look_anyway=True)
    _put_right_what_is_free(plane, allocations)
    for allocation in restored:
        allocations.put_right(allocation, known | sessions.clients.keys())
    found = Found(gone, burying, time.monotonic() - begun)
    log.info(
        "took over %s (%d dead), %s, %s in %.1f ms",
        counted(len(sessions.clients), "client"), len(gone) + len(burying),
        counted(len(restored), "buffer or reservation", "buffers and reservations"), counted(len(registry), "type"),
        found.seconds * 1000,
    )  # fmt: skip
    return found


def _put_right_what_is_free(plane: Plane, allocations: Allocations) -> None:
    """The pages that no buffer and no reservation has, and the areas' gauges, to which the others are added."""
    for area in allocations.areas.by_name.values():
        for part in area.parts:
            at = plane.geometry.area_at(part.index)
            plane.write(at + layout.AREA_LENT_AT, 0)
            plane.write(at + layout.AREA_HELD_AT, 0)
            for first, pages in part.extents.ranges():
                plane.put_right(part.index, first, pages, area.lends)
