"""A worker process of `pages.py`: it has all contenders, and runs the one that it is told to."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from _common import clock_cost_ns, readings_ns, singles_ns
from pages_floor import copies, files, map_memory
from pages_job import PUT_BATCH, Contender, Setup
from pages_lmdb import lmdbs, open_lmdb
from pages_ours import BEHIND, SYNC_S, THROUGH, loads, stores, swap_of

import gcma_shm

FILL_PASSES = 8


@dataclass
class Block:
    """What one contender took in its turn, in one process: nanoseconds a page."""

    batches: list[float]
    whole: float  # the loop over all batches
    cpu: float  # of this process


class Worker:
    """All contenders of one process."""

    def __init__(self, index: int, stack: ExitStack, setup: Setup) -> None:
        self._setup = setup
        self._rng = np.random.default_rng([setup.seed, index])
        self._clock_ns = clock_cost_ns()
        self._page = np.random.default_rng(setup.seed).integers(1, 256, setup.page_size, np.uint8).tobytes()
        pages = self._page * (PUT_BATCH if setup.page_size <= 1 << 16 else setup.batch)
        # C has their addresses. One output for all who copy one page at a time: how it lies to the page, modulo 4096, is worth up to 15 %.
        self._source, self._out, self._many = bytearray(self._page), bytearray(setup.page_size), bytearray(len(pages))
        self._memory = map_memory(setup)
        self._client = stack.enter_context(gcma_shm.connect(setup.endpoint, mapped=True, prefault=True))
        env = stack.enter_context(open_lmdb(setup))
        self._contenders: dict[str, Contender] = {
            **copies(setup, self._page, self._memory, self._source, self._out),
            **files(setup, self._page, self._memory, self._source, self._out, stack, index),
            **lmdbs(env, self._page),
            **loads(swap_of(self._client, setup, THROUGH), setup, self._out, self._many),
            **stores(self._client, setup, self._page, pages, index),
        }

    def act(self, verb: str, *arguments: Any) -> Any:
        """Does what the parent asks: `block`, `singles`, `sync` or `fill`."""
        action: Callable[..., Any] = getattr(self, verb)
        return action(*arguments)

    def block(self, name: str, batches: int, warm: int) -> Block:
        """So many batches, after `warm` others that are not counted: what a contender finds in the caches is its own steady state, not
        what the one before it has left there.
        """
        contender, size = self._contenders[name], self._setup.batch
        contender.renew((batches + warm) * size)
        which = self._rng.integers(0, self._setup.pages, (batches + warm, size))
        prepared = [contender.prepare(one) for one in which]
        for one in prepared[:warm]:
            contender.run(one)
        cpu = time.process_time_ns()
        times = readings_ns(contender.run, prepared[warm:])
        cpu = time.process_time_ns() - cpu
        pages = batches * size
        return Block((np.diff(times) / size).tolist(), (times[-1] - times[0]) / pages, cpu / pages)

    def singles(self, name: str, count: int) -> list[float]:
        """Nanoseconds of single calls."""
        contender = self._contenders[name]
        if not contender.single:
            return []
        contender.renew(count)
        prepared = [contender.prepare(which) for which in self._rng.integers(0, self._setup.pages, (count, 1))]
        return singles_ns(contender.run, prepared, self._clock_ns)

    def sync(self) -> float:
        """Nanoseconds until what was written behind is in the file."""
        start = time.perf_counter_ns()
        swap_of(self._client, self._setup, BEHIND).sync(timeout=SYNC_S)
        return float(time.perf_counter_ns() - start)

    def fill(self, type_: int) -> None:
        """Sees to it that the working set is stored and, as far as the arena takes it, in memory: a load brings back what was evicted."""
        swap = swap_of(self._client, self._setup, type_)
        for n in range(self._setup.pages):
            if n not in swap:
                swap.store(n, self._page)
        for _ in range(FILL_PASSES):
            before = self._spill_hits()
            for n in range(self._setup.pages):
                swap.load(n)
            if self._spill_hits() == before:
                return
            time.sleep(0.2)  # the broker's sweep makes room for what comes back

    def _spill_hits(self) -> int:
        return int(self._client.stats()["clients"][str(self._client.number)]["hits_spill"])


def make_worker(index: int, stack: ExitStack, setup: Setup) -> Callable[..., Any]:
    """A worker process's ear."""
    return Worker(index, stack, setup).act
