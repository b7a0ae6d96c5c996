"""Ours in `pools.py`: ArenaExecutor as it comes, with arrays that are built in the arena, and with Buffers that are kept and written in place."""

from __future__ import annotations

from contextlib import ExitStack
from multiprocessing.context import BaseContext

import numpy as np
import pools_work as work
from pools_job import CHUNK, CHUNKS, EXCHANGE, SMALL, Array, Contender, Given

import gcma_shm
from gcma_shm.clients.executor import ArenaExecutor

OURS = "ours, arrays anywhere"
BUILT = "ours, both built in the arena"
KEPT = "ours, kept Buffers in place"
LATE = "ours, the same, made after the pool started"
IN_ARENA = "ours, built in the arena"


def contenders(given: Given, arena: int, context: BaseContext, stack: ExitStack) -> dict[str, list[Contender]]:
    """By job."""
    client = stack.enter_context(gcma_shm.embedded(arena))
    work.client = client  # forked workers use it, too

    def pool() -> ArenaExecutor:
        made = ArenaExecutor(given.workers, context, work.connect, (client.endpoint,), client=client)
        list(made.map(work.small, range(given.workers)))  # its workers have started
        return stack.enter_context(made)

    def built(what: Array | None = None) -> Array:
        array: Array = client.alloc_contig(given.array.nbytes).numpy(given.array.shape, np.float64)
        array[:] = 0.0 if what is None else what
        return array

    early = pool()
    source, target = built(given.array), built()
    ours = pool()
    # Arrays go before the client closes, and after the pools.
    everything = [source, target]
    stack.callback(everything.clear)

    def in_place(by: ArenaExecutor, name: str) -> Contender:
        def run() -> Array:
            by.submit(work.double_into, everything[0], everything[1]).result()
            return everything[1]

        def prepare() -> None:
            everything[1][:] = -1.0

        return Contender(name, run, prepare=prepare)

    def fan(array: Array, parts: list[tuple[int, int]]) -> list[float]:
        futures = [ours.submit(work.part_of, array, *part) for part in parts]
        return [future.result() for future in futures]

    def small() -> list[int]:
        futures = [ours.submit(work.small, number) for number in range(given.small)]
        return [future.result() for future in futures]

    del source, target
    return {
        EXCHANGE: [
            Contender(OURS, lambda: ours.submit(work.double, given.array).result()),
            Contender(BUILT, lambda: ours.submit(work.double_built, everything[0]).result()),
            in_place(ours, KEPT),
            in_place(early, LATE),
        ],
        **{
            job: [
                Contender(OURS, lambda parts=parts: fan(given.array, parts)),  # type: ignore[misc]
                Contender(IN_ARENA, lambda parts=parts: fan(everything[0], parts)),  # type: ignore[misc]
            ]
            for job, parts in given.fans().items()
        },
        SMALL: [Contender(OURS, small)],
        CHUNKS: [Contender(OURS, lambda: list(ours.map(work.small, range(given.small), chunksize=CHUNK)))],
    }
