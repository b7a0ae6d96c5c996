"""Planted faults: brokers that leave something out when they take over, or do it in another order. Each is to be found by crashes.py.

To be called in a broker's own process, before anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.broker import process
from gcma_shm.broker.allocations import Allocations
from gcma_shm.broker.claims import Claims
from gcma_shm.broker.registry import TypeRegistry
from gcma_shm.broker.sessions import Sessions
from gcma_shm.broker.table import Allocation, Table
from gcma_shm.records import Record, Records
from tests.faults.crash_broker import put


class _NoClaims(Plane):
    def bury(self, numbers: Any) -> None:
        if list(numbers) != [layout.BROKER]:
            super().bury(numbers)


class _NoWords(Plane):
    def close_words(self, first: int, slots: int) -> None:
        pass


class _NoRange(Plane):
    def put_right(self, *arguments: Any) -> None:
        pass


class _NoCount(Plane):
    def count_lent(self, index: int, first: int, pages: int) -> None:
        pass


def _plane(kind: type[Plane]) -> None:
    put(process, "Plane", kind)


def _forgets_nothing() -> None:
    put(process, "forget_announcements", lambda _plane: None)


def _releases_nothing() -> None:
    put_right = Allocations.put_right

    def without(self: Allocations, allocation: Allocation, clients: Container[int]) -> None:
        if allocation.is_held:
            put_right(self, allocation, clients)

    put(Allocations, "put_right", without)


def _seizes_nothing() -> None:
    put_right = Claims.put_right

    def without(self: Claims, allocation: Allocation, clients: Container[int]) -> None:
        if not self.is_made_by(allocation, layout.BROKER):
            put_right(self, allocation, clients)

    put(Claims, "put_right", without)


def _keeps_records() -> None:
    restore, free = Sessions.restore, Records.free

    def without(self: Sessions) -> list[int]:
        put(Records, "free", lambda _self, _number: None)
        try:
            return restore(self)
        finally:
            put(Records, "free", free)

    put(Sessions, "restore", without)


def _keeps_files() -> None:
    put(TypeRegistry, "_remove_stray_files", lambda _self: None)


def _knows_no_sharers() -> None:
    put(Claims, "restore", lambda _self, _allocation, _clients: None)


def _buries_nobody() -> None:
    restore = Sessions.restore
    put(Sessions, "restore", lambda self: restore(self) and [])


def _adopts_nobody() -> None:
    put(Sessions, "adopt_forked", lambda _self, look_anyway=False: [])


def _tells_of_the_heir_first() -> None:
    adopt = Sessions._adopt

    def other_order(self: Sessions, record: Record) -> None:
        self._plane.write(self._geometry.client_at(record.number) + layout.CLIENT_INHERITS_AT, 1)
        adopt(self, record)

    put(Sessions, "_adopt", other_order)


def _knows_nothing_for_good() -> None:
    restore = Table.restore

    def without(self: Table, *arguments: Any) -> list[Allocation]:
        restored = restore(self, *arguments)
        for allocation in restored:
            allocation.holders.discard(layout.BROKER)
        return restored

    put(Table, "restore", without)


def _knows_no_keepers() -> None:
    read = Records.read
    put(Records, "read", lambda self, number: replace(read(self, number), keeps=False))


def _names_and_unlinks_in_other_orders() -> None:
    """Serves like that from the first takeover on: a keeper is written before the name, and goes after it."""

    def keep(self: Allocations, client: int, number: int, name: str, keeper_for: Callable[[], int]) -> int:
        allocation, keeper = self._held(client, number), keeper_for()
        self._hold(allocation, keeper)
        if allocation.name is None:
            self._table.write_name(allocation, name)
            allocation.name = name
            self._by_name[name] = allocation
        return keeper

    unlink, remove_name = Allocations.unlink, Table.remove_name

    def name_first(self: Allocations, name: str, keepers: Any) -> None:
        remove_name(self._table, self._by_name[name])
        unlink(self, name, keepers)

    put(Allocations, "keep", keep)
    put(Allocations, "unlink", name_first)


FAULTS: dict[str, Callable[[], None]] = {
    "filling": _forgets_nothing,
    "claims": lambda: _plane(_NoClaims),
    "words": lambda: _plane(_NoWords),
    "range": lambda: _plane(_NoRange),
    "count": lambda: _plane(_NoCount),
    "entries": _releases_nothing,
    "seize": _seizes_nothing,
    "records": _keeps_records,
    "files": _keeps_files,
    "sharers": _knows_no_sharers,
    "burying": _buries_nobody,
    "forks": _adopts_nobody,
    "heirs": _tells_of_the_heir_first,
    "for good": _knows_nothing_for_good,
    "keepers": _knows_no_keepers,
    "names": _names_and_unlinks_in_other_orders,
}
