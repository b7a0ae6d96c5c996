"""Our own calls as contenders of `pages.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from pages_job import Contender, Fresh, Plain, Setup, Which, as_offsets

import gcma_shm

THROUGH, BEHIND, FIRST = 0, 1, 2  # swap types; from FIRST on one of each worker's
SYNC_S = 60.0
SWEEP_S = 0.02  # that the broker gets to make room, before a block that is to find pages at hand


class FreshType(Fresh):
    """`Fresh` with a swap type, whose life ends and begins."""

    def __init__(self, client: gcma_shm.Client, type_: int, slots: int) -> None:
        super().__init__(slots, self._begin)
        self._client, self._type, self._slots = client, type_, slots
        self.swap = client.swap(type_, slots)

    def _begin(self) -> None:
        self.swap.invalidate_area()
        self.swap = self._client.swap(self._type, self._slots)


def swap_of(client: gcma_shm.Client, setup: Setup, type_: int) -> gcma_shm.Swap:
    """The type that all workers share."""
    return client.swap(type_, setup.pages, write="behind" if type_ == BEHIND else "through")


def loads(swap: gcma_shm.Swap, setup: Setup, out: bytearray, many: bytearray) -> dict[str, Contender]:
    """From what is in memory."""
    out_many = memoryview(many)[: setup.batch * setup.page_size]

    def load(offsets: list[int], load: Callable[[int], bytes | None] = swap.load) -> None:
        for offset in offsets:
            load(offset)

    def load_into(offsets: list[int], load_into: Callable[[int, bytearray], bool] = swap.load_into) -> None:
        for offset in offsets:
            load_into(offset, out)

    def load_many(offsets: list[int]) -> None:
        swap.load_many(offsets, out_many)

    return {
        "load": Plain(as_offsets, load),
        "load_into": Plain(as_offsets, load_into),
        "load_many": Plain(as_offsets, load_many, single=False),
    }


def stores(client: gcma_shm.Client, setup: Setup, page: bytes, pages: bytes, index: int) -> dict[str, Contender]:
    """Written through and behind, one by one and in batches."""
    through, behind = (swap_of(client, setup, type_) for type_ in (THROUGH, BEHIND))
    fresh = FreshType(client, FIRST + index, setup.pages)
    source = memoryview(pages)[: setup.batch * setup.page_size]

    def one_by_one(swap: gcma_shm.Swap) -> Plain:
        def run(offsets: list[int], store: Callable[[int, bytes], None] = swap.store) -> None:
            for offset in offsets:
                store(offset, page)

        return Plain(as_offsets, run)

    def in_batches(swap: gcma_shm.Swap) -> Plain:
        return Plain(as_offsets, lambda offsets: swap.store_many(offsets, source), single=False)

    def first(offsets: list[int]) -> None:
        store = fresh.swap.store
        for offset in offsets:
            store(offset, page)

    def at_hand(_pages: int) -> None:
        behind.sync(timeout=SYNC_S)
        time.sleep(SWEEP_S)

    def fresh_offsets(which: Which) -> list[int]:
        return list(fresh.next(which.size).tolist())

    return {
        "store through": one_by_one(through),
        "store through, first": Plain(fresh_offsets, first, renew=fresh.renew),
        "store_many through": in_batches(through),
        "store behind": one_by_one(behind),
        "store_many behind": in_batches(behind),
        "store behind, page at hand": replace(one_by_one(behind), renew=at_hand),
    }
