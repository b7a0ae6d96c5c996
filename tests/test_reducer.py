"""multiprocessing's own queues, pipes and pools with Buffers and arrays on them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gcma_shm
from gcma_shm.clients import reducer
from gcma_shm.clients.embedded import EmbeddedClient

from .client import held
from .processes import eventually

Array = npt.NDArray[Any]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    registered: dict[type, Any] = vars(ForkingPickler)["_extra_reducers"]
    before = dict(registered)
    reducer.register()
    yield
    registered.clear()
    registered.update(before)


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


def dumps(what: Any) -> bytes:
    return bytes(ForkingPickler.dumps(what))


def test_views_of_buffers(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(80_000)
    for view in (
        buffer.view,
        buffer.view[100:200],
        buffer.view[8:].cast("d"),
        buffer.view[:80_000].cast("i", (100, 200)),
        buffer.view[:5].toreadonly(),
    ):
        got = ForkingPickler.loads(dumps(view))
        assert (got.format, got.shape, got.readonly, got.nbytes) == (
            view.format,
            view.shape,
            view.readonly,
            view.nbytes,
        )
        assert got == view
    got[4:5].tolist()
    buffer.view[4] = 77
    assert got[4] == 77, "another memory"
    for view in (memoryview(b"elsewhere"), buffer.view[::2]):
        with pytest.raises(TypeError, match="memoryview"):
            ForkingPickler.dumps(view)
    del got, view
    buffer.free()
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_arrays_of_all_kinds(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(80_000)
    kinds = [
        np.dtype([("a", "i4"), ("b", "f8", 3)]),
        np.dtype("datetime64[s]"),
        np.dtype("S10"),
        np.dtype("U7"),
        np.dtype(">i2"),
    ]
    for kind in kinds:
        array = buffer.numpy(100, kind)
        array[0] = np.zeros(1, kind)[0]
        got = ForkingPickler.loads(dumps(array))
        assert got.dtype == kind
        assert got.tobytes() == array.tobytes()
        got.view("u1")[:] = 65
        assert array.view("u1")[7] == 65, "another memory"
    array = buffer.numpy(100, "f8")
    array.flags.writeable = False
    assert not ForkingPickler.loads(dumps(array)).flags.writeable
    record = buffer.numpy(100, kinds[0]).view(np.recarray)
    copy = ForkingPickler.loads(dumps(record))  # a subclass knows itself how it is pickled
    assert type(copy) is type(record)
    assert copy.tobytes() == record.tobytes()
    copy.b[:] = 1
    assert copy.tobytes() != record.tobytes()


def test_what_is_sent_twice_and_received_twice(client: EmbeddedClient) -> None:
    array = client.alloc_contig(8000).numpy(1000, "f8")
    array[:] = 5
    first, second = dumps(array[:10]), dumps(array[5:])
    del array
    got = [ForkingPickler.loads(first), ForkingPickler.loads(second), ForkingPickler.loads(first)]
    got[0][5] = 8
    assert got[1][0] == got[2][5] == 8
    got.clear()
    assert eventually(lambda: client.stats() is not None and held(client) == 0)
    for sent in (first, second):
        with pytest.raises(gcma_shm.StaleHandle):
            ForkingPickler.loads(sent)


def test_a_claimed_reservations_buffer(client: EmbeddedClient) -> None:
    reservation = client.reserve(80_000)
    array = reservation.claim().numpy(10_000, "f8")
    array[:] = 3
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(add_one, (array,)) == 40_000
        pool.close()
        pool.join()
    assert set(array) == {4.0}


def send_and_die(queue: Any, endpoint: str) -> None:
    """Nobody holds what was sent but its handle."""
    reducer.register(after_end=30)
    array = gcma_shm.connect(endpoint).alloc_contig(80_000).numpy(10_000, "f8")
    array[:] = 6
    queue.put(array)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_sender_that_dies_has_sent_all_the_same(client: EmbeddedClient, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=send_and_die, args=(queue, client.endpoint))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    got = queue.get()
    assert set(got) == {6.0}
    queue.close()
    del got
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def send_and_end(pipe: Any, endpoint: str) -> None:
    reducer.register(timeout=3600, after_end=0.05)
    with gcma_shm.connect(endpoint) as client:
        pipe.send(client.alloc_contig(80_000))
        pipe.recv()


def test_what_nobody_receives_is_held_while_its_sender_lives_and_not_for_long_after(client: EmbeddedClient) -> None:
    context: Any = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=send_and_end, args=(theirs, client.endpoint))
    process.start()
    assert ours.poll(60)
    assert held(client) > 0
    ours.send(None)
    process.join(60)
    assert process.exitcode == 0
    assert eventually(lambda: client.stats() is not None and held(client) == 0)
    with pytest.raises(gcma_shm.StaleHandle):
        ours.recv()
    ours.close()
    theirs.close()


def test_through_a_manager(client: EmbeddedClient) -> None:
    """Its process receives, keeps, and sends: it needs the reducer too, or sends copies."""
    for method, is_shared in (("fork", True), ("spawn", False)):
        array = client.alloc_contig(80_000).numpy(10_000, "f8")
        array[:] = 1
        with multiprocessing.get_context(method).Manager() as manager:
            kept = manager.dict()
            kept["array"] = array
            array[0] = 9
            got = kept["array"]
            assert got[0] == 9, "the manager holds the very memory"
            got[1] = 8
            assert (array[1] == 8) == is_shared
            del got, kept
        del array
        assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_misuse() -> None:
    for wrong in ({"timeout": -1}, {"after_end": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            reducer.register(**wrong)
    with pytest.raises(TypeError, match="timeout"):
        reducer.register(timeout="1")  # type: ignore[arg-type]


def test_plain_pickle_is_as_before(client: EmbeddedClient) -> None:
    array = client.alloc_contig(4096).numpy(4096)
    array[:] = 1
    assert len(ForkingPickler.dumps(array)) < 1000
    copy = ForkingPickler.loads(ForkingPickler.dumps(np.ones(1000)))
    assert (copy == 1).all()
