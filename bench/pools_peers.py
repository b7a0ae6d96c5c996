"""Python's own pools in `pools.py`: ProcessPoolExecutor, SharedMemory by hand on it, loky, joblib."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pools_work as work
from pools_job import CHUNK, CHUNKS, EXCHANGE, FAN_OUT, SMALL, Array, Contender, Given, NotHere

PICKLE = "ProcessPoolExecutor"
PER_CALL = "SharedMemory per call"
KEPT = "SharedMemory kept, in place"
LOKY = "loky"
JOBLIB = "joblib, memmapping"
JOBLIB_KEPT = "joblib, own memmaps in place"
IDLE_S = 600  # loky's workers leave when they have had nothing to do for so long


def standard(given: Given, context: BaseContext, stack: ExitStack) -> dict[str, list[Contender]]:
    """ProcessPoolExecutor, and SharedMemory on it."""
    resource_tracker.ensure_running()  # one for all: workers forked later use it
    pool = stack.enter_context(ProcessPoolExecutor(given.workers, context))
    list(pool.map(work.small, range(given.workers)))
    found = by_submit(PICKLE, pool, given)
    found[CHUNKS] = [Contender(PICKLE, lambda: list(pool.map(work.small, range(given.small), chunksize=CHUNK)))]
    for name, more in (*_per_call(pool, given).items(), *_kept(pool, given, stack).items()):
        found.setdefault(name, []).extend(more)
    return found


def loky(given: Given, stack: ExitStack) -> dict[str, list[Contender]]:
    """Its executor that is used again and again. Raises NotHere."""
    try:
        from loky import get_reusable_executor
    except ImportError:
        raise NotHere("no loky: pip install 'gcma-shm[bench]'") from None
    pool = get_reusable_executor(max_workers=given.workers, timeout=IDLE_S)
    stack.callback(pool.shutdown, wait=True, kill_workers=True)
    list(pool.map(work.small, range(given.workers)))
    return by_submit(LOKY, pool, given)


def by_submit(name: str, pool: Executor, given: Given) -> dict[str, list[Contender]]:
    """What any executor does with `submit`. (What takes ten seconds to pickle an array to a hundred tasks need not show it twice.)"""

    def fan() -> list[float]:
        futures = [pool.submit(work.part_of, given.array, index, given.tasks) for index in range(given.tasks)]
        return [future.result() for future in futures]

    def small() -> list[int]:
        futures = [pool.submit(work.small, number) for number in range(given.small)]
        return [future.result() for future in futures]

    return {
        EXCHANGE: [Contender(name, lambda: pool.submit(work.double, given.array).result())],
        FAN_OUT: [Contender(name, fan)],
        SMALL: [Contender(name, small)],
    }


def _per_call(pool: Executor, given: Given) -> dict[str, list[Contender]]:
    """New objects each time: for an array that is anywhere, and a result that nobody has made room for."""
    count, nbytes = given.array.size, given.array.nbytes
    made: list[SharedMemory] = []

    def create() -> SharedMemory:
        made.append(SharedMemory(create=True, size=nbytes))
        return made[-1]

    def exchange() -> Array:
        source, target = create(), create()
        work.seen(source, count)[:] = given.array
        pool.submit(work.shared_double, source.name, target.name, count).result()
        return work.seen(target, count)

    def fan(parts: list[tuple[int, int]]) -> list[float]:
        source = create()
        work.seen(source, count)[:] = given.array
        futures = [pool.submit(work.shared_part, source.name, count, *part) for part in parts]
        return [future.result() for future in futures]

    def drop() -> None:
        while made:
            shared = made.pop()
            shared.close()
            shared.unlink()

    return {
        EXCHANGE: [Contender(PER_CALL, exchange, drop)],
        **{job: [Contender(PER_CALL, lambda parts=parts: fan(parts), drop)] for job, parts in given.fans().items()},  # type: ignore[misc]
    }


def _kept(pool: Executor, given: Given, stack: ExitStack) -> dict[str, list[Contender]]:
    """Two objects for the whole run, open on both sides; arrays are in them already, and the result is written there."""
    count = given.array.size
    source, target = (SharedMemory(create=True, size=given.array.nbytes) for _ in range(2))
    arrays = [work.seen(source, count), work.seen(target, count)]
    arrays[0][:], arrays[1][:] = given.array, 0.0

    def exchange() -> Array:
        pool.submit(work.kept_double, source.name, target.name, count).result()
        return arrays[1]

    def fan(parts: list[tuple[int, int]]) -> list[float]:
        futures = [pool.submit(work.kept_part, source.name, count, *part) for part in parts]
        return [future.result() for future in futures]

    def prepare() -> None:
        arrays[1][:] = -1.0

    def end() -> None:
        arrays.clear()
        for shared in (source, target):
            shared.close()
            shared.unlink()

    stack.callback(end)
    return {
        EXCHANGE: [Contender(KEPT, exchange, prepare=prepare)],
        **{job: [Contender(KEPT, lambda parts=parts: fan(parts))] for job, parts in given.fans().items()},  # type: ignore[misc]
    }


def joblib(given: Given, directory: Path, stack: ExitStack) -> dict[str, list[Contender]]:
    """`Parallel`, which hands over large arrays as memory maps of files in /dev/shm; and the same with memory maps of one's own, for the
    result, too, as its manual advises. Raises NotHere.
    """
    try:
        from joblib import Parallel, delayed
        from joblib.externals.loky import get_reusable_executor
    except ImportError:
        raise NotHere("no joblib: pip install 'gcma-shm[bench]'") from None
    stack.callback(lambda: get_reusable_executor().shutdown(wait=True, kill_workers=True))
    arrays = [
        np.memmap(directory / name, np.float64, "w+", shape=given.array.shape) for name in ("joblib-in", "joblib-out")
    ]
    arrays[0][:], arrays[1][:] = given.array, 0.0
    stack.callback(arrays.clear)

    def parallel(tasks: Iterable[Any]) -> list[Any]:
        with Parallel(
            n_jobs=given.workers
        ) as pool:  # a new one each time has the same workers, and a folder of its own
            return list(pool(tasks))

    def exchange() -> Array:
        found: Array = parallel([delayed(work.double)(given.array)])[0]
        return found

    def in_place() -> Array:
        parallel([delayed(work.double_into)(arrays[0], arrays[1])])
        return arrays[1]

    def prepare() -> None:
        arrays[1][:] = -1.0

    def fan(array: Array, parts: list[tuple[int, int]]) -> list[float]:
        return parallel(delayed(work.part_of)(array, *part) for part in parts)

    def small() -> list[int]:
        return parallel(delayed(work.small)(number) for number in range(given.small))

    small()  # its workers have started
    return {
        EXCHANGE: [Contender(JOBLIB, exchange), Contender(JOBLIB_KEPT, in_place, prepare=prepare)],
        **{
            job: [
                Contender(JOBLIB, lambda parts=parts: fan(given.array, parts)),  # type: ignore[misc]
                Contender(JOBLIB_KEPT, lambda parts=parts: fan(arrays[0], parts)),  # type: ignore[misc]
            ]
            for job, parts in given.fans().items()
        },
        CHUNKS: [Contender(JOBLIB, small)],
    }
