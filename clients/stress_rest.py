"""What must be true of an arena when everybody but one client has gone: nothing of the others is left.

Looks at what any client sees; `gcma check` looks at the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from gcma_shm import layout
from gcma_shm.clients.client import Client
from gcma_shm.clients.stress_plan import TYPES, Plan
from gcma_shm.errors import GcmaError
from gcma_shm.records import Record, Records

GRANTED = 1  # a nursery page's state, in the two highest bits of its life


class Rest:
    """The last client's look around, each part within `wait_s`: the broker sweeps, writes behind and buries at its own pace."""

    def __init__(self, client: Client, plan: Plan, wait_s: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._meanwhile = meanwhile
        self._client = client
        self._plan = plan
        self._wait_s = wait_s
        plane = client._plane
        assert plane is not None
        self._plane = plane

    def wrong(self) -> list[str]:
        """What is left, or does not come to rest."""
        wrong = []
        for type_ in range(self._plan.types):
            try:
                self._client.swap(type_, self._plan.wide, TYPES[type_]).sync(self._wait_s)
            except GcmaError as error:
                wrong.append(f"type {type_} cannot be synced: {type(error).__name__}: {error}")
        looks: tuple[tuple[str, Callable[[], object]], ...] = (
            ("clients", self._clients),
            ("memory held or promised", self._held),
            ("places in line", lambda: self._client.stats()["broker"]["in_line"]),
            ("pages granted", self._granted),
            ("places in spill files claimed", self._claimed),
        )
        deadline = time.monotonic() + self._wait_s
        for name, look in looks:
            while left := look():
                if time.monotonic() > deadline:
                    wrong.append(f"{name} left: {left}")
                    break
                self._meanwhile()
                time.sleep(0.01)
        return wrong

    def _clients(self) -> list[Record]:
        return [record for record in Records(self._plane).used() if record.number != self._client.number]

    def _held(self) -> list[str]:
        return [f"{area}" for area in self._client.areas() if area.held or area.reserved]

    def _granted(self) -> list[int]:
        g = self._plane.geometry
        return [page for page in range(g.nursery_pages) if self._plane.read(g.life_at + 8 * page) >> 62 == GRANTED]

    def _claimed(self) -> list[int]:
        g = self._plane.geometry
        sides = (self._plane.read(g.slots_at + layout.SLOT_BYTES * slot + 8) for slot in range(g.slots))
        return [slot for slot, side in enumerate(sides) if side >> 32]
