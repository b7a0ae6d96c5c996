"""multiprocessing's own queues, pipes and pools with Buffers and arrays on them."""

from __future__ import annotations

import multiprocessing
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gcma_shm
from gcma_shm.clients import reducer
from gcma_shm.clients.embedded import EmbeddedClient

from .processes import eventually

Array = npt.NDArray[Any]


@pytest.fixture(autouse=True)
def _registered() -> None:
    reducer.register()


def held(client: gcma_shm.Client) -> int:
    return sum(area.held for area in client.areas())


def answer(received: Any, replies: Any) -> None:
    """Adds one to each array that comes, in place, and sends it back; frees a Buffer."""
    reducer.register()
    while (what := received.get()) is not None:
        if isinstance(what, gcma_shm.Buffer):
            replies.put(bytes(what.view[:5]))
            what.free()
        else:
            np.add(what, 1, out=what)
            replies.put(what)


def add_one(array: Array) -> float:
    array += 1
    return float(array.sum())


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_through_queues_and_back(client: EmbeddedClient, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    there, back = context.Queue(), context.Queue()
    worker = context.Process(target=answer, args=(there, back))
    worker.start()
    try:
        array = client.alloc_contig(80_000).numpy(10_000, "int64")
        array[:] = np.arange(10_000)
        there.put(array)
        got = back.get(timeout=60)
        assert got is not array
        assert np.array_equal(array, np.arange(1, 10_001))  # the worker wrote into the very memory
        got[0] = -5
        assert array[0] == -5
        there.put(client.alloc_contig(4096, zero=True))  # nobody else holds it on its way
        assert back.get(timeout=60) == bytes(5)
        there.put(np.zeros(3))  # not in the arena: pickled as ever
        assert list(back.get(timeout=60)) == [1.0, 1.0, 1.0]
        del array, got
    finally:
        there.put(None)
        worker.join(60)
        for queue in (there, back):
            queue.close()
            queue.join_thread()
    assert worker.exitcode == 0
    assert eventually(lambda: held(client) == 0)


def test_a_pool_works_on_the_memory_itself(client: EmbeddedClient) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        whole = client.alloc_contig(800_000).numpy((10, 10_000), "float64")
        whole[:] = 0
        assert pool.map(add_one, list(whole)) == [10_000.0] * 10
        assert set(whole.ravel()) == {1.0}
        pool.close()
        pool.join()


@pytest.mark.parametrize(
    "part",
    [
        lambda a: a,
        lambda a: a[3:7, ::2],
        lambda a: a[::-1, ::-3],
        lambda a: a.T,
        lambda a: a[5],
        lambda a: a[2, 3:4],
        lambda a: a.view("i4"),
        lambda a: a[0, :0],
        lambda a: np.broadcast_to(a[0], (4, 20)),
    ],
    ids=["whole", "steps", "backwards", "transposed", "row", "one", "ints", "empty", "broadcast"],
)
def test_parts_of_all_shapes(client: EmbeddedClient, part: Any) -> None:
    whole = client.alloc_contig(10 * 20 * 8).numpy((10, 20), "float64")
    whole[:] = np.arange(200.0).reshape(10, 20)
    sent = part(whole)
    got = ForkingPickler.loads(ForkingPickler.dumps(sent))
    np.testing.assert_array_equal(got, sent)
    assert (got.dtype, got.strides if got.size else (), got.flags.writeable) == (
        sent.dtype,
        sent.strides if sent.size else (),
        sent.flags.writeable or not sent.size,
    )
    if got.size and got.flags.writeable:
        got[...] = 7
        assert (sent == 7).all()


def test_what_comes_too_late(client: EmbeddedClient) -> None:
    reducer.register(timeout=0.0)
    sent = ForkingPickler.dumps(client.alloc_contig(4096))
    assert eventually(lambda: held(client) == 0)
    with pytest.raises(gcma_shm.StaleHandle):
        ForkingPickler.loads(sent)


def test_plain_pickle_is_as_before(client: EmbeddedClient) -> None:
    array = client.alloc_contig(4096).numpy(4096)
    array[:] = 1
    assert len(ForkingPickler.dumps(array)) < 1000
    copy = ForkingPickler.loads(ForkingPickler.dumps(np.ones(1000)))
    assert (copy == 1).all()
