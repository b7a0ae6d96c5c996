"""The tasks of `pools.py`, as every pool's workers do them: an array times two, the sum of a part of it, a small number."""

from __future__ import annotations

from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING, Any

import numpy as np
from pools_job import Array

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

    from gcma_shm.clients.client import Client

client: Client | None = None  # forked workers go on using their parent's
kept: dict[str, SharedMemory] = {}
held: list[Any] = []  # for as long as the worker lives
barrier: Barrier | None = None


def small(number: int) -> int:
    return number * number


def double(array: Array) -> Array:
    return array * 2.0


def double_into(array: Array, out: Array) -> None:
    np.multiply(array, 2.0, out=out)


def part_of(array: Array, index: int, count: int) -> float:
    """The sum of one of `count` parts of nearly the same size, or of all of it: `count` 1."""
    size, rest = divmod(array.size, count)
    start = index * size + min(index, rest)
    return float(array[start : start + size + (index < rest)].sum())


# --- ours


def connect(endpoint: str) -> None:
    """The initializer of our workers."""
    global client  # noqa: PLW0603 - one a process
    if client is None:
        import gcma_shm

        client = gcma_shm.connect(endpoint, mapped=True)


def double_built(array: Array) -> Array:
    """The result is built in the arena."""
    assert client is not None
    out: Array = client.alloc_contig(array.nbytes).numpy(array.shape, array.dtype)
    return np.multiply(array, 2.0, out=out)


# --- SharedMemory by hand


def seen(shared: SharedMemory, count: int) -> Array:
    """The array in it."""
    assert shared.buf is not None
    return np.frombuffer(shared.buf, np.float64, count)


def shared_double(given: str, out: str, count: int) -> None:
    """Opened for this task only."""
    source, target = SharedMemory(given), SharedMemory(out)
    double_into(seen(source, count), seen(target, count))
    source.close()
    target.close()


def shared_part(given: str, count: int, index: int, parts: int) -> float:
    """Opened for this task only."""
    source = SharedMemory(given)
    found = part_of(seen(source, count), index, parts)
    source.close()
    return found


def kept_double(given: str, out: str, count: int) -> None:
    """Opened once and kept open."""
    double_into(_kept(given, count), _kept(out, count))


def kept_part(given: str, count: int, index: int, parts: int) -> float:
    """Opened once and kept open."""
    return part_of(_kept(given, count), index, parts)


def _kept(name: str, count: int) -> Array:
    if name not in kept:
        kept[name] = SharedMemory(name)
    return seen(kept[name], count)


# --- memory


def meet(all_workers: Barrier, endpoint: str | None) -> None:
    """The initializer of workers that are to do one task each."""
    global barrier  # noqa: PLW0603 - one a process
    barrier = all_workers
    if endpoint is not None:
        connect(endpoint)


def hold(array: Array | None) -> float:
    """Reads all of it and holds it from now on; returns when all workers do."""
    assert barrier is not None
    barrier.wait()
    held.append(array)
    total = 0.0 if array is None else float(array.sum())
    barrier.wait()
    return total
