"""What N workers take that hold one array, by the kernel's account of their pages (`smaps_rollup`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import pools_work as work
from pools_job import Array, Given

import gcma_shm
from gcma_shm.clients.executor import ArenaExecutor

OURS, IN_ARENA, PICKLE = "ours, an array anywhere", "ours, built in the arena", "ProcessPoolExecutor"


@dataclass(frozen=True)
class Grown:
    """Bytes that came with the array: `private` to the workers, and `all`: in proportion (PSS), of workers, parent and broker."""

    private: int
    all: int


def measure(given: Given, numbers: Sequence[int], arena: int, context: BaseContext) -> dict[str, dict[int, Grown]]:
    """By contender and number of workers. Each worker reads all of the array and holds it."""
    found: dict[str, dict[int, Grown]] = {OURS: {}, IN_ARENA: {}, PICKLE: {}}
    for number in numbers:
        with gcma_shm.embedded(arena) as client:
            work.client = client
            for name in (OURS, IN_ARENA):
                make = _ours(client, number, context)
                pids = [os.getpid(), client.broker_pid]
                array = given.array if name == OURS else _built(client, given.array)
                found[name][number] = _grown(make, number, array, pids)
                del array
        found[PICKLE][number] = _grown(_standard(number, context), number, given.array, [os.getpid()])
    return found


def _ours(client: Any, number: int, context: BaseContext) -> Callable[[], ProcessPoolExecutor]:
    initargs = (context.Barrier(number), client.endpoint)
    return lambda: ArenaExecutor(number, context, work.meet, initargs, client=client)


def _standard(number: int, context: BaseContext) -> Callable[[], ProcessPoolExecutor]:
    initargs = (context.Barrier(number), None)
    return lambda: ProcessPoolExecutor(number, context, work.meet, initargs)


def _built(client: Any, what: Array) -> Array:
    array: Array = client.alloc_contig(what.nbytes).numpy(what.shape, np.float64)
    array[:] = what
    return array


def _grown(make: Callable[[], ProcessPoolExecutor], number: int, array: Array, others: list[int]) -> Grown:
    with make() as pool:
        _hold(pool, number, None)
        workers = list(pool._processes)
        assert len(workers) == number, f"{len(workers)} workers, expected {number}"
        private, everything = _private(workers), _in_proportion(workers + others)
        totals = _hold(pool, number, array)
        assert np.allclose(totals, array.sum()), "a worker has read something else"
        return Grown(_private(workers) - private, _in_proportion(workers + others) - everything)


def _hold(pool: ProcessPoolExecutor, number: int, array: Array | None) -> list[float]:
    return [future.result() for future in [pool.submit(work.hold, array) for _ in range(number)]]


def _private(pids: Sequence[int]) -> int:
    return sum(_pages(pid, "Private_Clean", "Private_Dirty") for pid in pids)


def _in_proportion(pids: Sequence[int]) -> int:
    return sum(_pages(pid, "Pss") for pid in pids)


def _pages(pid: int, *kinds: str) -> int:
    """Bytes."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    return sum(int(words[1]) << 10 for words in lines if words[0].rstrip(":") in kinds)
