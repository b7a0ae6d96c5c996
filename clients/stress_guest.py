"""What else happens in an arena under stress: a guest that takes ranges and proves that nobody else wrote there, an operator who drains and ends.

Neither decides when; both go on through a broker that is stopped or away.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable

from gcma_shm.clients.buffer import Buffer
from gcma_shm.clients.client import Client
from gcma_shm.clients.history import Log, RecordedSwap
from gcma_shm.clients.proof import LINE_BYTES
from gcma_shm.clients.reservation import Reservation
from gcma_shm.clients.stress_plan import TYPE_STEP, TYPES, Plan
from gcma_shm.errors import ArenaExhausted, BrokerUnavailable, Closed, NoSuchType

RESERVATIONS_MAX = 3
PAUSE_S = (0.005, 0.15)  # between two acts of the operator
DRAINED_S = 0.05  # at the most

Stop = Callable[[], bool]
Count = Callable[[str], None]


def _raise(wrong: str) -> None:
    raise AssertionError(wrong)


class Guest:
    """A client that allocates and reserves over the cache, fills its buffers, and looks at them again.

    `alone`: nobody else allocates, so that each area that is in `sure` is to be had as a whole, within `patience_s`: who held it may just have died.
    """

    def __init__(
        self,
        client: Client,
        plan: Plan,
        seed: int | str,
        alone: bool = True,
        *,
        sure: frozenset[int] | None = None,
        patience_s: float = 0.0,
        kinds: frozenset[str] = frozenset({"alloc", "claim"}),
        tell: Callable[[str], None] = _raise,
        count: Count = lambda _: None,
    ) -> None:
        self._client = client
        self._plan = plan
        self._rng = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
        self._alone = alone
        self._sure = frozenset(range(len(plan.area_pages))) if sure is None else sure
        self._patience_s = patience_s
        self._kinds = kinds
        self._tell = tell
        self._count = count
        self._held: list[tuple[Buffer, bytes]] = []
        self._reservations: list[Reservation] = []
        self._filled = 0
        self.rounds = 0

    def run(self, rounds: int, stop: Stop = lambda: False) -> int:
        """Comes and goes so many times, or until told to stop; returns how many buffers it had."""
        while self.rounds < rounds and not stop():
            self.rounds += 1
            with contextlib.suppress(BrokerUnavailable):
                self._one()
        self._leave_all()
        return self._filled

    def _one(self) -> None:
        if self._held and self._rng.random() < 0.5:
            self._leave(self._rng.randrange(len(self._held)))
        elif "claim" in self._kinds and ("alloc" not in self._kinds or self._rng.random() < 0.3):
            self._claim()
        elif self._rng.random() < 0.2:
            self._leave_all()
            for area in range(len(self._plan.area_pages)):  # with nothing held every area is to be had as a whole
                self._come_to_whole(area)
        else:
            area = self._rng.randrange(len(self._plan.area_pages))
            with contextlib.suppress(ArenaExhausted):
                self._come(area, self._rng.randint(1, max(self._plan.area_pages[area] * 2 // 3, 1)))

    def _come_to_whole(self, area: int) -> None:
        try:
            sure = self._alone and area in self._sure
            self._come(area, self._plan.area_pages[area], self._patience_s if sure else 0.0)
        except ArenaExhausted as error:
            if sure:
                self._tell(f"an area that nobody but the cache uses was refused: {error}, {error.holders}")

    def _claim(self) -> None:
        """Claims a reservation of before, or makes one; which is lent for a while then."""
        if len(self._reservations) > RESERVATIONS_MAX and not any(
            buffer.offset == self._reservations[0].offset for buffer, _ in self._held
        ):
            self._reservations.pop(0).release()
        for reservation in self._reservations:
            with contextlib.suppress(ArenaExhausted):  # claimed already
                self._fill(reservation.claim(), "claims")
                return
        area = self._rng.randrange(len(self._plan.area_pages))
        with contextlib.suppress(ArenaExhausted):
            pages = self._rng.randint(1, max(self._plan.area_pages[area] // 3, 1))
            self._reservations.append(self._client.reserve(pages * self._plan.page_size, f"a{area}"))

    def _come(self, area: int, pages: int, patience_s: float = 0.0) -> None:
        nbytes = pages * self._plan.page_size
        self._fill(self._client.alloc_contig(nbytes, f"a{area}", timeout=patience_s), "allocations")

    def _fill(self, buffer: Buffer, what: str) -> None:
        self._filled += 1
        line = f"guest {os.getpid()} {self._filled}".encode().ljust(LINE_BYTES, b"g")
        with buffer.view as view:
            view[:] = line * (buffer.nbytes // LINE_BYTES)
        self._held.append((buffer, line))
        self._count(what)

    def _leave_all(self) -> None:
        while self._held:
            self._leave(0)
        while self._reservations:
            with contextlib.suppress(BrokerUnavailable):
                self._reservations.pop().release()

    def _leave(self, which: int) -> None:
        buffer, line = self._held.pop(which)
        with buffer.view as view:
            if view != line * (buffer.nbytes // LINE_BYTES):
                self._tell(f"bytes of {buffer} have changed while it was held")
        with contextlib.suppress(BrokerUnavailable):  # it is told later, or sees who holds it no more
            buffer.free()


class Operator:
    """A client that drains the last area and resumes it, and ends the types that are mortal and begins them anew."""

    def __init__(
        self, client: Client, plan: Plan, log: Log, seed: int | str, kinds: frozenset[str], count: Count
    ) -> None:
        self._client = client
        self._plan = plan
        self._log = log
        self._rng = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
        self._acts = [act for kind, act in (("drain", self._drain), ("type", self._end)) if kind in kinds]
        self._count = count

    def run(self, stop: Stop) -> None:
        """Until told to stop."""
        while self._acts and not stop():
            time.sleep(self._rng.uniform(*PAUSE_S))
            with contextlib.suppress(BrokerUnavailable):
                self._rng.choice(self._acts)()

    def _drain(self) -> None:
        area = f"a{len(self._plan.area_pages) - 1}"
        try:
            self._client.drain_area(area)
            self._count("drains")
            time.sleep(self._rng.uniform(0, DRAINED_S))
        finally:
            self._client.resume_area(area)

    def _end(self) -> None:
        type_ = self._rng.choice(sorted(self._plan.mortal))
        if self._log.room < self._plan.wide:
            return
        swap = RecordedSwap(self._client.swap(type_, self._plan.wide, TYPES[type_]), self._log, type_ * TYPE_STEP)
        with contextlib.suppress(Closed, NoSuchType):  # ended meanwhile by a request whose answer was given up
            swap.invalidate_area()
            self._count("ends")
