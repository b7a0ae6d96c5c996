"""What a process does under stress: a worker's loop of operations on slots, each one recorded and each page proved.

Never decides whether a history is right; a page that is not whole is told at once, as its finder may be killed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from gcma_shm.clients.client import Client
from gcma_shm.clients.history import Log, RecordedSwap
from gcma_shm.clients.proof import TornPage, make_page, value_id
from gcma_shm.clients.stress_plan import BATCH_MAX, TYPE_STEP, TYPES, Plan
from gcma_shm.errors import (
    BrokerUnavailable,
    Closed,
    GcmaError,
    NoSuchType,
    NurseryFull,
    SlotBusy,
    SpillCorrupt,
    SpillError,
)

EXPECTED = (
    NurseryFull,
    SlotBusy,
    BrokerUnavailable,
    SpillError,
)  # bounds that a stopped process, or a full disk, may use up

ASK_AGAIN = 200  # operations on other types, before a broker that did not answer is asked for a type again


@dataclass
class Report:
    """What one worker says in the end."""

    operations: int = 0
    torn: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


class Worker:
    """One process's loop of operations. `tell`: is given what is wrong, the moment that it is found."""

    def __init__(
        self, client: Client, plan: Plan, log: Log, seed: int | str, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        self._client = client
        self._plan = plan
        self._log = log
        self._tell = tell
        self._rng = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
        self._swaps: list[RecordedSwap | None] = [None] * plan.types
        self._asked: list[int] = [-ASK_AGAIN] * plan.types  # operations done when the broker was last asked for it
        self._sequence = 0
        self._page = bytearray(plan.page_size)
        self.report = Report()

    def run(self, operations: int, stop: Callable[[], bool] = lambda: False) -> Report:
        """Does so many, or fewer when told to stop, the log is full or a page was torn."""
        share = self._plan.store_share
        steps: list[tuple[Callable[[RecordedSwap, int], None], float]] = [
            (self._store, share * 0.75),
            (self._store_many, share * 0.1),
            (self._store_zeros, share * 0.15),
            (self._load, (0.95 - share) * 0.6),
            (self._load_into, (0.95 - share) * 0.3),
            (self._load_many, (0.95 - share) * 0.1),
            (self._invalidate, 0.045),
            (self._sync, 0.005),
        ]
        done, weights = zip(*steps, strict=True)
        while (
            self.report.operations < operations and self._log.room > BATCH_MAX and not self.report.torn and not stop()
        ):
            (step,) = self._rng.choices(done, weights)
            self._do(step)
            self.report.operations += 1
        return self.report

    def _do(self, step: Callable[[RecordedSwap, int], None]) -> None:
        type_ = self._rng.randrange(self._plan.types)
        if self._swaps[type_] is None and self.report.operations - self._asked[type_] < ASK_AGAIN:
            return
        offset = self._rng.randrange(self._plan.hot if self._rng.random() < 0.5 else self._plan.wide)
        try:
            step(self._swap(type_), offset)
        except SpillCorrupt:
            raise
        except EXPECTED as error:
            self.report.refused[type(error).__name__] += 1
        except TornPage as torn:
            self.report.torn.append(str(torn))
            self._tell(f"a page that is not whole: {torn}")
        except (Closed, NoSuchType) as error:
            if type_ not in self._plan.mortal:
                raise
            self.report.refused[type(error).__name__] += 1
            self._swaps[type_], self._asked[type_] = None, -ASK_AGAIN  # whoever comes first declares it anew

    def _swap(self, type_: int) -> RecordedSwap:
        found = self._swaps[type_]
        if found is None:
            self._asked[type_] = self.report.operations
            swap = self._client.swap(type_, self._plan.wide, TYPES[type_])
            found = self._swaps[type_] = RecordedSwap(swap, self._log, type_ * TYPE_STEP)
        return found

    def _make_page(self, swap: RecordedSwap, offset: int) -> bytes:
        self._sequence += 1
        slot = swap.swap.type * TYPE_STEP + offset
        return make_page(slot, value_id(self._log.writer, self._sequence), self._plan.page_size)

    def _store(self, swap: RecordedSwap, offset: int) -> None:
        # In one buffer that is used again and again, as callers do: whatever a failed store left under way must not see the next page.
        self._page[:] = self._make_page(swap, offset)
        swap.store(offset, self._page)

    def _store_zeros(self, swap: RecordedSwap, offset: int) -> None:
        swap.store(offset, bytes(self._plan.page_size))

    def _store_many(self, swap: RecordedSwap, first: int) -> None:
        count = self._rng.randint(1, BATCH_MAX)
        step = self._rng.choice((1, 1, 0))  # 0: the same slot again and again, of which the last wins
        count = min(count, self._plan.wide - first) if step else count
        offsets = [first + step * n for n in range(count)]
        swap.store_many(offsets, b"".join(self._make_page(swap, offset) for offset in offsets))

    def _load(self, swap: RecordedSwap, offset: int) -> None:
        swap.load(offset)

    def _load_into(self, swap: RecordedSwap, offset: int) -> None:
        swap.load_into(offset, bytearray(self._plan.page_size))

    def _load_many(self, swap: RecordedSwap, first: int) -> None:
        count = min(self._rng.randint(1, BATCH_MAX), self._plan.wide - first)
        swap.load_many(range(first, first + count), bytearray(count * self._plan.page_size))

    def _invalidate(self, swap: RecordedSwap, offset: int) -> None:
        swap.invalidate_page(offset)

    def _sync(self, swap: RecordedSwap, _offset: int) -> None:
        swap.swap.sync(self._plan.timeout_s)


def read_all(client: Client, plan: Plan, log: Log) -> list[str]:
    """Loads each slot once more, now that nobody writes: what was acknowledged and not overwritten must be there. Returns what is wrong."""
    wrong = []
    for type_ in range(plan.types):
        swap = RecordedSwap(client.swap(type_, plan.wide, TYPES[type_]), log, type_ * TYPE_STEP)
        for offset in range(plan.wide):
            try:
                swap.load(offset)
            except (TornPage, GcmaError) as error:
                wrong.append(f"slot {offset} of type {type_} at the end: {type(error).__name__}: {error}")
    return wrong
