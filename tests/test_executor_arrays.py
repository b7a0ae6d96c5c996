"""ArenaExecutor with its usual threshold: tasks that are plainly small but for arrays, and what a worker keeps from one task to the next."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool, _CallItem, _ExceptionWithTraceback, _ResultItem
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gcma_shm
from gcma_shm.clients import executor_worker
from gcma_shm.clients.calls import Call
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.executor import ArenaExecutor
from gcma_shm.clients.packers import Sharing

from .client import held
from .gates import held_up
from .processes import WAIT_S, eventually

Array = npt.NDArray[Any]
LARGE = 100_000  # floats
NBYTES = -(-8 * LARGE // 4096) * 4096


@pytest.fixture
def pool(client: EmbeddedClient) -> Iterator[ArenaExecutor]:
    with ArenaExecutor(1, multiprocessing.get_context("forkserver"), client=client) as executor:
        assert executor.submit(abs, -1).result() == 1
        yield executor


@pytest.fixture
def no_parcels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks need none."""

    def refuse(*_: object) -> None:
        raise AssertionError("a parcel")

    monkeypatch.setattr(Sharing, "pack", refuse)


def asked(client: gcma_shm.Client, operation: str) -> int:
    found: int = client.stats()["broker"]["requests"].get(operation, 0)
    return found


def built(client: gcma_shm.Client, value: float = 1.0) -> Array:
    array = client.alloc_contig(8 * LARGE).numpy(LARGE, "float64")
    array[:] = value
    return array


# --- what workers do

remembered: list[Any] = []


def described(*arrays: Any) -> list[Any]:
    return [
        (type(one), one.dtype.str, one.shape, one.strides, one.flags.writeable, one.flags.aligned, one.tobytes()[:64], one.sum().item())
        if isinstance(one, np.ndarray)
        else one
        for one in arrays
    ]  # fmt: skip


def fill(array: Array, value: float) -> None:
    array[:] = value


def total(array: Array, *_: object) -> float:
    return float(array.sum())


def before_the_next(array: Array, *_: object) -> float:
    """Ends when the next task is there, so that the worker knows whether that is given the same."""
    assert eventually(_tasks()._is_waiting)
    return float(array.sum())


def _tasks() -> executor_worker.Tasks:
    """In a worker: the queue that its tasks come from."""
    frame = sys._getframe(1)  # not this one, whose variables would refer to itself, and with it to the task's
    while "call_queue" not in frame.f_locals:
        assert frame.f_back is not None
        frame = frame.f_back
    queue: executor_worker.Tasks = frame.f_locals["call_queue"]
    return queue


def fail(array: Array) -> None:
    raise LookupError(f"planted, {array.size}")


def remember(array: Array) -> None:
    remembered.append(array)


def recall() -> float:
    return float(remembered[-1].sum())


def forget() -> None:
    remembered.clear()


def part(array: Array) -> Any:
    return array[:50_000]


def unsent(array: Array) -> Any:
    return lambda: array


def die(_: Array) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def explode() -> None:
    raise ZeroDivisionError("planted in unpickling")


class Explosive:
    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return explode, ()


# --- arrays that are told by where they lie


@pytest.mark.usefixtures("no_parcels")
def test_arrays_are_what_they_were(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    numbers = np.arange(LARGE)
    arrays: list[Array] = [
        numbers.astype(float), numbers.astype(">i8").reshape(100, -1), np.asfortranarray(numbers.astype("c16").reshape(100, 10, -1)),
        np.ones(LARGE * 8, bool), np.full(LARGE * 2, -1, "i4").reshape(-1, 1), numbers.astype(float)[7:],
    ]  # fmt: skip
    for array in arrays:
        array.flags.writeable = False  # as they are to the worker
    assert pool.submit(described, 1, *arrays, "text").result() == described(1, *arrays, "text")
    assert pool.copied == sum(array.nbytes for array in arrays)
    inside = built(client).reshape(100, -1)
    parts = [inside, inside[10:], inside.T, inside[50:].view("i8")]
    assert pool.submit(described, *parts).result() == described(*parts), "writable"
    inside.flags.writeable = False
    assert pool.submit(described, inside).result() == described(inside), "read-only"
    both = (parts[1], arrays[0], (1, 2), None)
    assert pool.submit(described, *both).result() == described(*both)
    assert pool.submit(fill, parts[1], 5.0).result() is None
    assert set(parts[1].ravel()) == {5.0}
    with pytest.raises(ValueError, match="read-only"):
        pool.submit(fill, arrays[0].copy(), 3.0).result()
    assert pool.fallbacks == 0


def test_others_travel_as_ever(pool: ArenaExecutor) -> None:
    numbers = np.arange(LARGE)
    arrays: list[Any] = [
        numbers[::2], np.ma.masked_greater(numbers, 5), numbers.astype("datetime64[s]").astype("i8"), np.ones(3),
        np.ones(LARGE, np.dtype("f8", metadata={"unit": "m"})),
    ]  # fmt: skip
    got = pool.submit(described, *arrays).result()
    assert [one[:3] for one in got] == [one[:3] for one in described(*arrays)]
    assert [one[-1] for one in got] == [one[-1] for one in described(*arrays)]
    assert pool.submit(total, array=numbers).result() == numbers.sum()
    assert pool.submit(total, numbers, [np.ones(2)]).result() == numbers.sum()


@pytest.mark.usefixtures("no_parcels")
def test_one_array_to_many_tasks_is_copied_once_and_to_the_next_ones_anew(
    pool: ArenaExecutor, client: EmbeddedClient
) -> None:
    array = np.ones(LARGE)
    with held_up(pool):
        futures = [pool.submit(total, array, n) for n in range(20)]
    assert {future.result() for future in futures} == {LARGE}
    assert pool.copied == array.nbytes
    for n in range(5):
        array[:] = n
        assert pool.submit(total, array).result() == n * LARGE
    assert pool.copied == 6 * array.nbytes
    del futures
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_without_room_it_goes_through_the_pipe(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    array, inside = np.ones(LARGE), built(client)
    guest = client.alloc_contig(client.areas()[0].largest_free)
    assert pool.submit(total, array, 1).result() == LARGE
    assert pool.fallbacks == 1
    assert pool.submit(described, inside, array).result() == described(inside, array)
    assert pool.fallbacks == 2
    guest.free()
    assert pool.submit(total, array, 1).result() == LARGE
    assert pool.fallbacks == 2


def test_an_array_that_is_resized_before_it_is_copied(pool: ArenaExecutor) -> None:
    with held_up(pool):
        others = [pool.submit(abs, -n) for n in range(4)]  # so that it is not pickled yet
        array = np.ones(LARGE)
        task = pool.submit(total, array, 1)
        array.resize(4 * LARGE, refcheck=False)
    assert task.result() == LARGE
    assert [one.result() for one in others] == [*range(4)]


def test_an_array_in_the_place_of_a_freed_buffer(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    freed = client.alloc_contig(8 * LARGE)
    freed.free()
    array = built(client, 3.0)
    assert freed.offset == 0
    assert pool.submit(total, array).result() == 3 * LARGE
    assert pool.submit(total, array=array).result() == 3 * LARGE


# --- what a worker keeps


def test_what_one_task_was_given_is_given_back_before_its_result_is_sent(
    pool: ArenaExecutor, client: EmbeddedClient
) -> None:
    """... so that who waits for the result may have the room for the next."""
    room = client.areas()[0].largest_free // 4096 * 4096
    for n in range(5):
        array = client.alloc_contig(room, timeout=WAIT_S).numpy(LARGE, "float64")
        array[:] = n
        assert pool.submit(total, array).result() == n * LARGE
        del array
    assert client.areas()[0].largest_free == room or eventually(lambda: client.areas()[0].largest_free == room)


def test_what_the_next_task_is_given_too_is_asked_for_once(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    first, second = built(client, 1.0), built(client, 2.0)
    pool.submit(total, first).result()
    before = asked(client, "attach")
    futures: list[Future[Any]] = [pool.submit(before_the_next, first)]
    futures += [pool.submit(before_the_next, first, second) for _ in range(4)]
    futures += [pool.submit(total, first, second)]
    assert [future.result() for future in futures] == [LARGE] * 6
    assert asked(client, "attach") == before + 2
    futures = [pool.submit(before_the_next, one) for one in (first, second, first, first)]
    futures += [pool.submit(total, second)]
    assert [future.result() for future in futures] == [n * LARGE for n in (1, 2, 1, 1, 2)]
    assert asked(client, "attach") == before + 2 + 4, "what the next task is not given was given back"
    del futures
    first = second = np.ones(1)
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_a_forked_worker_uses_what_it_has(client: EmbeddedClient) -> None:
    array = built(client)
    with ArenaExecutor(1, multiprocessing.get_context("fork"), client=client) as pool:
        assert pool.submit(total, array).result() == LARGE
        before = asked(client, "attach")
        assert [pool.submit(total, array).result() for _ in range(5)] == [LARGE] * 5
        assert asked(client, "attach") == before


def test_what_a_task_remembers_is_its_own(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    array = built(client, 4.0)
    futures: list[Future[Any]] = [pool.submit(before_the_next, array), pool.submit(remember, array)]
    futures += [pool.submit(total, np.ones(LARGE)) for _ in range(3)]
    del array
    [future.result() for future in futures]
    del futures
    assert pool.submit(recall).result() == 4 * LARGE
    assert eventually(lambda: client.stats() is not None and held(client) == NBYTES)
    pool.submit(forget).result()
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_a_result_on_what_was_given(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    array = built(client, 2.0)
    futures: list[Future[Any]] = [pool.submit(before_the_next, array), *(pool.submit(part, array) for _ in range(4))]
    results = [future.result() for future in futures]
    del array, futures
    assert [result.sum() for result in results[1:]] == [100_000.0] * 4
    assert held(client) == NBYTES
    del results
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_tasks_that_fail_before_others(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    array = built(client)
    with held_up(pool):
        futures: list[Future[Any]] = [pool.submit(before_the_next, array), pool.submit(fail, array)]
        futures += [pool.submit(unsent, array), pool.submit(total, array)]
        futures += [pool.submit(described, Explosive(), array), pool.submit(total, array)]
    assert isinstance(futures[1].exception(), LookupError)
    assert "local object" in str(futures[2].exception())  # which every Python says of a lambda that it cannot pickle
    assert futures[3].result() == LARGE
    assert isinstance(futures[4].exception(), ZeroDivisionError)
    assert futures[5].result() == LARGE
    del array, futures
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_a_next_task_that_cannot_be_loaded_breaks_the_pool_as_ever(client: EmbeddedClient) -> None:
    """... and not the result of the one before."""
    array = built(client)
    with ArenaExecutor(1, multiprocessing.get_context("spawn"), client=client) as pool:
        late = client.alloc_contig(8 * LARGE).numpy(LARGE, "float64")
        late[:] = 2
        good = pool.submit(before_the_next, late)
        after = pool.submit(total, array, late)
        assert good.result() == 2 * LARGE
        assert after.result() == LARGE
        good = pool.submit(before_the_next, late)
        lost = pool.submit(nowhere, late)
        assert good.result() == 2 * LARGE
        with pytest.raises(BrokenProcessPool):
            lost.result()
    del array, late, good, after, lost
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def nowhere(array: Array) -> float:
    return float(array.sum())


if multiprocessing.parent_process() is not None:
    del nowhere  # by a worker it is not found


def test_the_last_task_of_a_worker_takes_no_other_along(
    client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(Not by a pool: Python 3.11's own hangs when more tasks are there than a worker may do, gh-115634.)"""
    context = multiprocessing.get_context("fork")
    with ArenaExecutor(1, context, client=client) as pool:
        tasks, results = pool._call_queue, pool._result_queue
        wanted, other = ("ipc:///x", b"1", 5, 0, 0), ("ipc:///x", b"1", 6, 0, 0)
        given = {wanted: memoryview(b"a"), other: memoryview(b"b")}
        monkeypatch.setattr(executor_worker, "_given", given)
        monkeypatch.setattr(executor_worker, "_threshold", 1 << 20, raising=False)
        array = (0, wanted, 0, "<f8", (LARGE,), "C", True)
        tasks.put(_CallItem(7, executor_worker.call, (total, [None], [array]), {}))
        assert eventually(lambda: not tasks.empty())
        results.put(_ResultItem(1, result=5, exit_pid=77))
        assert not tasks.empty()
        assert given == {}
        given |= {wanted: memoryview(b"a"), other: memoryview(b"b")}
        results.put(_ResultItem(2, result=6))
        assert given.keys() == {wanted}
        assert tasks.empty()
        assert tasks.get().work_id == 7
        assert [results.get().result for _ in range(2)] == [5, 6]
        results.put(_ResultItem(3, result=7))
        assert given == {}, "there is no next task"
        assert results.get().result == 7


def test_a_task_that_failed_keeps_nothing_while_its_exception_is_sent(client: EmbeddedClient) -> None:
    with ArenaExecutor(1, multiprocessing.get_context("fork"), client=client) as pool:
        results = pool._result_queue
        try:
            fail_of_another(built(client))
        except Telling as error:
            results.put(_ResultItem(1, exception=_ExceptionWithTraceback(error, error.__traceback__)))  # type: ignore[arg-type]
        got = results.get().exception
        assert got.args == (False,)
        assert "planted, 100000" in str(got.__cause__)


class Telling(Exception):
    def __init__(self, told: Any) -> None:
        super().__init__(told)
        self.told = told

    def __reduce__(self) -> tuple[Any, tuple[bool]]:
        return Telling, (self.told() is not None,)


def fail_of_another(array: Array) -> None:
    there = weakref.ref(array)
    try:
        fail(array)
    except LookupError as error:
        del array
        raise Telling(there) from error


def test_the_next_task_is_unpickled_while_others_may_take_theirs(client: EmbeddedClient) -> None:
    with ArenaExecutor(1, multiprocessing.get_context("fork"), client=client) as pool:
        tasks = pool._call_queue
        asking.append(tasks._rlock)
        try:
            tasks.put(_CallItem(7, abs, (Asking(),), {}))
            assert eventually(lambda: not tasks.empty())
            assert tasks.look_ahead().args == (True,)
            assert tasks.get().work_id == 7
        finally:
            asking.clear()


asking: list[Any] = []


class Asking:
    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _is_free, ()


def _is_free() -> bool:
    (lock,) = asking
    got: bool = lock.acquire(False)
    if got:
        lock.release()
    return got


def test_a_worker_that_is_killed_with_the_next_task_in_hand(client: EmbeddedClient) -> None:
    array = built(client)
    with ArenaExecutor(1, multiprocessing.get_context("forkserver"), client=client) as pool:
        with held_up(pool):  # or the pool may be broken before all are submitted
            futures: list[Future[Any]] = [
                pool.submit(before_the_next, array),
                pool.submit(die, array),
                pool.submit(total, array),
            ]
        assert futures[0].result() == LARGE
        for future in futures[1:]:
            assert isinstance(future.exception(), BrokenProcessPool)
    del array, futures
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_shutdown_with_a_task_in_hand(client: EmbeddedClient) -> None:
    array = built(client)
    pool = ArenaExecutor(2, multiprocessing.get_context("forkserver"), client=client)
    with held_up(pool, 2):
        futures = [pool.submit(total, array) for _ in range(12)]
        pool.shutdown(wait=False)
    assert [future.result() for future in futures] == [LARGE] * 12
    pool.shutdown()
    again = ArenaExecutor(2, multiprocessing.get_context("forkserver"), client=client)
    with held_up(again) as gate:
        futures = [again.submit(total, array) for _ in range(12)]
        assert eventually(futures[0].running)  # with a worker, or on its way there
        gate.shut_down(futures[-1])
    assert {future.result() for future in futures if not future.cancelled()} == {LARGE}
    del array, futures
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_what_a_task_cannot_have_is_asked_for_once(client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    packer = Sharing(lambda: client, 1 << 16)
    parcel, kept = packer.pack([total, [np.ones(LARGE) for _ in range(3)], {}])
    asked_for: list[set[Any]] = []

    def refuse(references: set[Any]) -> None:
        asked_for.append(references)
        raise gcma_shm.StaleHandle("planted")

    monkeypatch.setattr(executor_worker, "_seen", lambda _: None)
    monkeypatch.setattr(executor_worker, "_take", refuse)
    with pytest.raises(gcma_shm.StaleHandle, match="planted"):
        executor_worker.work(parcel)
    assert asked_for == [parcel.references]
    assert len(kept) == 3


def test_a_call_says_what_it_needs() -> None:
    sent: list[Any] = [None, 1]
    call = Call(total, sent, [(0, ("ipc:///x", b"1", 5, 0, 0), 8, "<f8", (2,), "C", True)])
    assert call.references == {("ipc:///x", b"1", 5, 0, 0)}
    memory = memoryview(np.arange(5.0).tobytes())
    fn, args, named = call.open({("ipc:///x", b"1", 5, 0, 0): memory}.__getitem__)
    assert fn(*args, **named) == 3.0
    assert sent == [None, 1], "what the worker has of the task until the result is sent keeps no memory"
