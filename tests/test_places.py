"""Where memory lies, whichever client holds it: also of asyncio's, whose requests a process pool cannot await."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Awaitable, Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import joblib
import numpy as np
import numpy.typing as npt
import pytest

import gcma_shm
import gcma_shm.aio
from gcma_shm.clients import reducer
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.executor import ArenaExecutor
from gcma_shm.clients.joblib import end_workers, register
from gcma_shm.clients.joblib_arrays import Returned, Room
from gcma_shm.clients.packers import Giving
from gcma_shm.clients.places import locate, locate_array

from .client import held
from .processes import eventually

Array = npt.NDArray[np.float64]
LARGE = 100_000  # floats


def add_one(array: Array) -> float:
    array += 1
    return float(array[0])


def with_array_of_asyncio(endpoint: str, use: Callable[[Array], Awaitable[None]]) -> None:
    """`use` is called in an event loop, with an array of ones on a Buffer of a client there."""

    async def run() -> None:
        async with gcma_shm.aio.connect(endpoint) as client:
            buffer = await client.alloc_contig(8 * LARGE)
            array: Array = buffer.numpy(LARGE, "float64")
            array[:] = 1
            await use(array)
            del array
            await buffer.free()

    asyncio.run(run())


def test_what_lies_nowhere(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(8192)
    array = buffer.numpy(8192)
    start = array.__array_interface__["data"][0]
    found = locate(start + 10, 8182)
    assert found is not None
    assert (found.client, found.reference, found.start) == (client, buffer.reference, 10)
    assert locate(start, 8193) is locate(start, 0) is locate(np.ones(5).__array_interface__["data"][0], 5) is None
    backwards = locate_array(array[4096:][::-2])
    assert backwards is not None
    assert backwards.start == 8191
    outside = np.lib.stride_tricks.as_strided(array[4096:], (2,), (-4097,))
    assert locate_array(outside) is None
    assert locate_array(array[:0]) is locate_array(np.ones(5)) is None


def test_a_buffer_that_was_freed_is_not_where_another_one_lies(client: EmbeddedClient) -> None:
    """It is still referred to, and was at that very place."""
    freed = [client.alloc_contig(8192) for _ in range(8)]
    for buffer in freed:
        buffer.free()
    again = client.alloc_contig(8 * 8192)
    found = locate_array(again.numpy(8 * 8192)[:100])
    assert found is not None
    assert found.reference == again.reference


def test_a_pool_is_given_an_array_of_asyncio_as_it_is(client: EmbeddedClient) -> None:
    with ArenaExecutor(1, multiprocessing.get_context("spawn"), client=client, threshold=4096) as pool:

        async def use(array: Array) -> None:
            assert await asyncio.get_running_loop().run_in_executor(pool, add_one, array) == 2
            assert array[-1] == 2
            assert pool.copied == 0

        with_array_of_asyncio(client.endpoint, use)
    assert eventually(lambda: held(client) == 0)


def test_joblib_is_given_an_array_of_asyncio_as_it_is(client: EmbeddedClient) -> None:
    register()
    with joblib.parallel_config(backend="gcma", n_jobs=2, client=client):

        async def use(array: Array) -> None:
            # One after the other: who adds to the same memory at once may overwrite what the other one has added.
            one_by_one = joblib.Parallel(pre_dispatch=1, batch_size=1)
            assert one_by_one(joblib.delayed(add_one)(array[n:]) for n in range(2)) == [2, 3]
            assert (array[0], array[-1]) == (2, 3)

        with_array_of_asyncio(client.endpoint, use)
        end_workers()
    assert eventually(lambda: held(client) == 0)


def by_reducer(array: Array) -> Callable[[], Any]:
    reducer.register()
    sent = ForkingPickler.dumps(array)
    return lambda: ForkingPickler.loads(sent)


def by_giving(array: Array) -> Callable[[], Any]:
    packer = Giving(lambda: pytest.fail("it is there"), 4096, 60.0)
    return packer.pack(array)[0].open


def by_joblib(array: Array) -> Callable[[], Any]:
    packer = Returned(Room(lambda: pytest.fail("it is there")), 4096, pytest.fail)
    sent, _ = packer.dumps(array)
    return lambda: joblib.externals.loky.backend.reduction.loads(sent)


@pytest.mark.parametrize("way", [by_reducer, by_giving, by_joblib])
def test_an_array_of_asyncio_is_given_away(
    way: Callable[[Array], Callable[[], Any]], client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is received outlives the client; and holds nothing beside it."""
    registered: dict[type, Any] = vars(ForkingPickler)["_extra_reducers"]
    for kind in (gcma_shm.Buffer, memoryview, np.ndarray):
        monkeypatch.setitem(registered, kind, None)  # as they are now, afterwards
        del registered[kind]
    receivers: list[Callable[[], Any]] = []

    async def use(array: Array) -> None:
        receivers.append(way(array))
        array[0] = 5

    with_array_of_asyncio(client.endpoint, use)
    assert held(client) > 0
    received = receivers[0]()
    assert (received[0], received[-1]) == (5, 1)
    assert received.flags.writeable
    del received
    assert eventually(lambda: held(client) == 0)
