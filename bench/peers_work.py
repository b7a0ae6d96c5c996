"""A worker process of `peers.py`: all contenders as one process sees them, filled, proved and timed as the parent says."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from _common import clock_cost_ns, readings_ns, singles_ns
from peers_blackboard import Blackboard
from peers_clients import Pylibmc, Pymemcache, Redis
from peers_local import DiskCache, File, Lmdb, MappedFile
from peers_ours import Messages, Ours
from peers_plasma import Plasma
from peers_ways import LOAD, LOAD_MANY, OPERATIONS, STORE, STORE_MANY, NotHere, Place, Store, Way, Which

STORES: dict[str, Callable[[Place, ExitStack], Store]] = {
    "ours": Ours,
    "messages": Messages,
    "lmdb": Lmdb,
    "redis": Redis,
    "pylibmc": Pylibmc,
    "pymemcache": Pymemcache,
    "diskcache": DiskCache,
    "file": File,
    "mmap": MappedFile,
    "iceoryx2": Blackboard,
    "plasma": Plasma,
}
SERVER_OF = {
    "ours": "broker",
    "messages": "broker",
    "redis": "redis",
    "pylibmc": "memcached",
    "pymemcache": "memcached",
    "plasma": "plasma",
}
OPTIONAL = ("plasma",)  # only when asked for
SAME = {"messages": "ours", "pymemcache": "pylibmc"}  # another way to the very pages of that one
PROVED = 32  # pages of each way, or two batches


@dataclass(frozen=True)
class Block:
    """What one process did in its turn."""

    pages: int
    wall_ns: float  # of all
    batch_ns: float  # a page, the median of batches: a while in which another process had the processor is not in it
    cpu_ns: float


class Worker:
    """One process. Its answers go through a pipe."""

    def __init__(self, index: int, stack: ExitStack, place: Place, wanted: list[str]) -> None:
        self._place = place = replace(place, index=index)
        self._rng = np.random.default_rng([place.seed, index])
        self._clock_ns = clock_cost_ns()
        self._stores: dict[str, Store] = {}
        self._missing: dict[str, str] = {}
        for name in wanted:
            try:
                self._stores[name] = STORES[name](place, stack)
            except NotHere as reason:
                self._missing[name] = str(reason)
        self._ways: dict[tuple[str, str], Way] = {
            (operation, way): found
            for operation in OPERATIONS
            for store in self._stores.values()
            for way, found in store.ways.get(operation, {}).items()
        }

    def act(self, verb: str, *arguments: Any) -> Any:
        """Does what the parent asks."""
        action: Callable[..., Any] = getattr(self, verb)
        return action(*arguments)

    def contenders(self) -> tuple[dict[str, list[tuple[str, str]]], dict[str, str]]:
        """By operation, each way's name and its store's; and the stores that are not here, with the reason."""
        ways = {
            operation: [(way, name) for name, store in self._stores.items() for way in store.ways.get(operation, {})]
            for operation in OPERATIONS
        }
        return ways, self._missing

    def fill(self) -> None:
        """Every page of every store, stamped with its number."""
        for n in range(self._place.pages):
            page = self._place.stamped(n)
            for name, store in self._stores.items():
                if SAME.get(name) not in self._stores:
                    store.put(n, page)

    def prove_loads(self) -> int:
        """Every way to load gives the stamped pages, whole; how many were looked at. Raises AssertionError."""
        proved = 0
        for (operation, name), way in self._ways.items():
            if operation in (LOAD, LOAD_MANY):
                assert way.see is not None
                for which in self._batches(self._size(operation), PROVED):
                    seen = way.see(way.prepare(which))
                    assert seen == [self._place.stamped(n) for n in which.tolist()], f"{name} gives wrong bytes"
                    proved += which.size
        return proved

    def prove_stores(self) -> int:
        """After every way to store, what was stored is there, and a neighbour is as it was; puts the stamps back."""
        proved = 0
        for store in self._stores.values():
            for operation in (STORE, STORE_MANY):
                for named, way in store.ways.get(operation, {}).items():
                    for which in self._batches(self._size(operation), PROVED):
                        proved += self._prove_store(named, store, way, which)
        return proved

    def _prove_store(self, name: str, store: Store, way: Way, which: Which) -> int:
        through = "through" in name  # another type of ours: its pages are proved by who reads them
        read = store.get_through if through else store.get  # type: ignore[attr-defined]
        neighbour = next(n for n in range(self._place.pages) if n not in which)
        before = read(neighbour)
        way.run(way.prepare(which))
        for n in which.tolist():
            assert read(n) == self._place.page, f"{name} did not store page {n}"
            store.put(n, self._place.stamped(n))
        assert read(neighbour) == before, f"{name} changed another page"
        return int(which.size)

    def prove_whole(self) -> int:
        """After all the timing: every page is one that was stored, none is half of one and half of another; how many were looked at."""
        stores = {name: store for name, store in self._stores.items() if SAME.get(name) not in self._stores}
        for name, store in stores.items():
            for n in range(self._place.pages):
                found = store.get(n)
                assert found in (self._place.page, self._place.stamped(n)), f"{name} has a torn page at {n}"
        return len(stores) * self._place.pages

    def settle(self) -> None:
        """Ours has its pages in memory."""
        ours = self._stores.get("ours")
        if isinstance(ours, Ours):
            ours.settle()

    def sync(self) -> float:
        """Nanoseconds until what ours stored behind is in the file."""
        start = time.perf_counter_ns()
        ours = self._stores["ours"]
        assert isinstance(ours, Ours)
        ours.sync()
        return float(time.perf_counter_ns() - start)

    def block(self, operation: str, name: str, pages: int) -> Block:
        """At least so many pages, in one go."""
        way = self._ways[operation, name]
        size = self._place.batch
        prepared = [way.prepare(which) for which in self._batches(size, pages)]
        cpu_ns = time.process_time_ns()
        times = readings_ns(way.run, prepared)
        cpu_ns = time.process_time_ns() - cpu_ns
        return Block(
            len(prepared) * size, float(times[-1] - times[0]), float(np.median(np.diff(times))) / size, float(cpu_ns)
        )

    def singles(self, operation: str, name: str, calls: int) -> list[float]:
        """Nanoseconds of calls timed one by one: of a page, or of a batch."""
        way = self._ways[operation, name]
        if not way.single:
            return []
        size = self._size(operation)
        prepared = [way.prepare(which) for which in self._batches(size, calls * size)]
        return singles_ns(way.run, prepared, self._clock_ns)

    def _size(self, operation: str) -> int:
        return self._place.batch if operation in (LOAD_MANY, STORE_MANY) else 1

    def _batches(self, size: int, pages: int) -> list[Which]:
        """Random numbers for that many pages, rounded up to batches; in a batch no number comes twice."""
        each = self._place.pages // size
        count = -(-pages // size)
        laps = [
            self._rng.permutation(self._place.pages)[: each * size].reshape(each, size)
            for _ in range(-(-count // each))
        ]
        found: list[Which] = list(np.concatenate(laps)[:count])
        return found


def make_worker(index: int, stack: ExitStack, place: Place, wanted: list[str]) -> Callable[..., Any]:
    """For `crew`."""
    return Worker(index, stack, place, wanted).act
