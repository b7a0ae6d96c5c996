"""ArenaExecutor: what it carries and how, what becomes of the memory, and that it is a ProcessPoolExecutor in all else."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gcma_shm
from gcma_shm._core import address_of
from gcma_shm.clients.default import default_client
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.executor import ArenaExecutor
from gcma_shm.clients.handles import clients

from .client import held
from .gates import held_up
from .processes import WAIT_S, eventually

Array = npt.NDArray[np.float64]
THRESHOLD = 4096
LARGE = 100_000  # floats


@pytest.fixture
def pool(client: EmbeddedClient) -> Iterator[ArenaExecutor]:
    with ArenaExecutor(2, multiprocessing.get_context("forkserver"), client=client, threshold=THRESHOLD) as executor:
        yield executor


# --- what workers do


def twice(array: Array) -> Array:
    return array * 2


def echo(value: Any) -> Any:
    return value


def in_arena(memory: Any) -> bool:
    return any(
        client.mapped and client.locate(address_of(memory), memoryview(memory).nbytes) is not None for client in clients
    )


def looked_at(array: Array) -> tuple[bool, bool, float]:
    return in_arena(array), array.flags.writeable, float(array.sum())


def kinds(*values: Any, **named: Any) -> list[str]:
    return [type(value).__name__ for value in (*values, *named.values())]


def fill(array: Array, value: float) -> None:
    array[:] = value


def fail(array: Array) -> None:
    raise LookupError(f"planted, {array.size}")


def die(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def make_and_die(size: int) -> Array:
    """The process ends a moment after its result is on its way."""
    return np.full(size, 7.0)


def lengths(*blobs: bytes | bytearray) -> list[int]:
    return [len(blob) for blob in blobs]


def upper(blob: bytes) -> bytes:
    return blob.upper()


def middle(array: Array) -> tuple[Array, Array]:
    return array[10:20_010], array


def carry(array: Array) -> None:
    raise Carrying(array)


class Carrying(Exception):
    def __init__(self, array: Array) -> None:
        super().__init__(array)


def in_turn(array: Array) -> float:
    """Has a pool of its own."""
    with ArenaExecutor(1, multiprocessing.get_context("spawn"), threshold=THRESHOLD) as inner:
        return float(inner.submit(twice, array).result().sum())


def pid(_: object = None) -> int:
    return os.getpid()


def unpicklable() -> Callable[[], None]:
    return lambda: None


def explode() -> None:
    raise ZeroDivisionError("planted in unpickling")


class Explosive:
    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return explode, ()


def started(value: int) -> None:
    os.environ["GCMA_TEST_STARTED"] = str(value)


def look_started() -> str:
    return os.environ["GCMA_TEST_STARTED"]


def refuse_to_start() -> None:
    raise LookupError("planted")


# --- what it carries


def test_an_array_there_and_back(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    array = np.arange(LARGE, dtype=float)
    result = pool.submit(twice, array).result()
    assert np.array_equal(result, array * 2)
    assert result.flags.writeable
    assert in_arena(result)
    result[0] = 1.0
    whole = -(-result.nbytes // 4096) * 4096
    assert eventually(lambda: held(client) == whole), (
        "the worker has told that it needs the argument no more, some time"
    )
    del result
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_a_worker_sees_the_memory_itself_and_may_not_write(pool: ArenaExecutor) -> None:
    array = np.ones(LARGE)
    assert pool.submit(looked_at, array).result() == (True, False, LARGE)
    assert pool.copied == array.nbytes
    with pytest.raises(ValueError, match="read-only"):
        pool.submit(fill, array, 3.0).result()
    assert array[0] == 1.0


def test_results_on_an_arguments_memory(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    array = np.arange(float(LARGE))
    part, whole = pool.submit(middle, array).result()
    assert in_arena(part)
    assert in_arena(whole)
    assert not part.flags.writeable
    array[:] = 0
    assert np.array_equal(part, np.arange(10.0, 20_010.0))
    assert held(client) == -(-array.nbytes // 4096) * 4096  # there is one copy still
    del whole
    assert client.stats() is not None
    assert held(client) > 0
    del part
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_results_of_many_parts(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    value = (b"x" * LARGE, {"list": [bytearray(b"y" * LARGE), np.ones(LARGE)]}, "text" * LARGE)
    got = pool.submit(echo, value).result()
    np.testing.assert_equal(got, value)
    del got
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_tables_and_frames(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"a": np.arange(LARGE), "b": np.ones(LARGE), "c": ["x", "yy"] * (LARGE // 2)})
    got = pool.submit(echo, frame).result()
    pandas.testing.assert_frame_equal(got, frame)
    assert in_arena(got["b"].to_numpy())
    table = arrow.table({"a": np.arange(LARGE), "t": ["x", "yy"] * (LARGE // 2)})
    futures = [pool.submit(echo, table) for _ in range(4)]
    assert all(future.result() == table for future in futures)
    received = futures[0].result()
    assert in_arena(received["a"].chunk(0).buffers()[1])
    assert pool.fallbacks == 0
    del got, received, futures
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_exceptions_that_carry_arrays(pool: ArenaExecutor) -> None:
    array = np.arange(float(LARGE))
    error = pool.submit(carry, array).exception()
    assert isinstance(error, Carrying)
    assert np.array_equal(error.args[0], array)
    assert "carry" in str(error.__cause__)


def test_small_ones_do_not_go_there(pool: ArenaExecutor) -> None:
    array = np.ones(THRESHOLD // 8 - 50)  # its pickle is smaller than the threshold as well
    assert pool.submit(looked_at, array).result() == (False, True, array.size)
    assert pool.copied == 0


@pytest.mark.parametrize(
    "value",
    [
        b"x" * LARGE,
        bytearray(b"y" * LARGE),
        {"deep": [np.arange(LARGE), "text"]},
        np.asfortranarray(np.arange(float(LARGE)).reshape(100, -1)),
        np.arange(float(LARGE))[::2],
        np.zeros((0, 5)),
        None,
        3.5,
        "text" * LARGE,
    ],
    ids=["bytes", "bytearray", "nested", "fortran", "strided", "empty", "none", "float", "text"],
)
def test_values_of_many_kinds(pool: ArenaExecutor, value: object) -> None:
    got = pool.submit(echo, value).result()
    assert type(got) is type(value)
    np.testing.assert_equal(got, value)


def test_bytes_are_bytes_in_the_worker(pool: ArenaExecutor) -> None:
    large = b"x" * LARGE
    assert pool.submit(kinds, large, bytearray(large), other=large).result() == ["bytes", "bytearray", "bytes"]
    assert pool.copied == 2 * LARGE  # one copy of the same bytes, one of the bytearray


def test_to_many_tasks_it_travels_once(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    array = np.ones(LARGE)
    with held_up(pool, 2):
        futures = [pool.submit(looked_at, array) for _ in range(20)]
    assert {future.result()[2] for future in futures} == {LARGE}
    assert pool.copied == array.nbytes  # whatever was under way when: all of them were submitted
    del futures
    with held_up(pool, 2):
        found = pool.map(looked_at, [array] * 30, chunksize=7)
    assert {one[2] for one in found} == {LARGE}
    assert pool.copied == 2 * array.nbytes
    with held_up(pool, 2):
        found = pool.map(looked_at, [array[: LARGE // 2], array[LARGE // 2 :]] * 5)
    assert sum(one[2] for one in found) == 5 * LARGE
    assert pool.copied == 3 * array.nbytes
    assert eventually(lambda: held(client) == 0)


def test_a_copy_waits_for_a_task_that_comes_much_later(client: EmbeddedClient) -> None:
    """The pool packs but a few tasks ahead: between these two there is none that has it."""
    with ArenaExecutor(1, multiprocessing.get_context("forkserver"), client=client, threshold=THRESHOLD) as pool:
        array = np.ones(LARGE)
        with held_up(pool):
            others: list[Future[Any]] = [pool.submit(looked_at, array), *(pool.submit(pid) for _ in range(20))]
            last = pool.submit(looked_at, array)
        assert last.result()[2] == LARGE
        assert pool.copied == array.nbytes
        wait(others)
    assert eventually(lambda: held(client) == 0)


@pytest.mark.parametrize("chunksize", [1, 4])
def test_bytes_in_a_map_travel_once(pool: ArenaExecutor, client: EmbeddedClient, chunksize: int) -> None:
    blob, both = b"x" * LARGE, bytearray(b"y" * LARGE)
    with held_up(pool, 2):
        found = pool.map(lengths, [blob] * 12, [both] * 12, chunksize=chunksize)
    assert list(found) == [[LARGE, LARGE]] * 12
    assert pool.copied == 2 * LARGE
    assert list(pool.map(upper, [blob[:-1]] * 3, chunksize=3)) == [b"X" * (LARGE - 1)] * 3
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_what_is_shared_is_given_to_one_task_after_another_without_a_copy(
    pool: ArenaExecutor, client: EmbeddedClient
) -> None:
    array = np.ones(LARGE)
    shared: dict[str, Any] = pool.share({"array": array, "text": "t"})
    assert in_arena(shared["array"])
    assert not shared["array"].flags.writeable
    array[:] = 5  # no longer the same
    for _ in range(3):
        assert pool.submit(looked_at, shared["array"]).result() == (True, False, LARGE)
    assert pool.submit(looked_at, shared["array"][5:]).result() == (True, False, LARGE - 5)
    assert pool.copied == array.nbytes
    assert held(client) > 0
    del shared
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_what_was_changed_after_a_task_is_seen_by_the_next(pool: ArenaExecutor) -> None:
    array = np.ones(LARGE)
    for n in range(5):
        array[:] = n
        assert pool.submit(looked_at, array).result()[2] == n * LARGE


def test_a_task_is_over_before_anybody_hears_of_it(pool: ArenaExecutor) -> None:
    """What it was given may be changed as soon as that, and another task is given a new copy."""
    array, after = np.ones(LARGE), list[Future[tuple[bool, bool, float]]]()

    def change(_: Future[Any]) -> None:
        array[:] = 5
        after.append(pool.submit(looked_at, array))

    pool.submit(looked_at, array).add_done_callback(change)
    assert eventually(lambda: bool(after))
    assert after[0].result()[2] == 5 * LARGE


def test_a_task_that_ends_while_it_is_packed_keeps_nothing(
    pool: ArenaExecutor, client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a pool that breaks just then. (This one has not, so its worker comes for the array, and too late.)"""
    pack, submitted, ended, futures = pool._packer.pack, threading.Event(), threading.Event(), list[Any]()

    def pack_and_end(what: Any, large: Any) -> Any:
        packed = pack(what, large)
        if large:
            assert submitted.wait(WAIT_S)
            futures[0].given.end()
            ended.set()
        return packed

    monkeypatch.setattr(pool._packer, "pack", pack_and_end)
    with held_up(pool, 2):
        futures.append(pool.submit(looked_at, np.ones(LARGE)))
        submitted.set()
        assert ended.wait(WAIT_S)
        assert eventually(lambda: client.stats() is not None and held(client) == 0), "before a worker comes for it"
    assert isinstance(futures[0].exception(), gcma_shm.StaleHandle)
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_an_array_that_was_built_in_the_arena_is_passed_as_it_is(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(8 * LARGE)
    array = buffer.numpy(LARGE, "float64")
    part = array[100:]
    array[:] = 1
    assert pool.submit(looked_at, part).result() == (True, True, LARGE - 100)
    pool.submit(fill, part, 5.0).result()
    assert array[99] == 1
    assert set(part) == {5.0}
    assert pool.copied == 0
    assert pool.submit(echo, part).result()[0] == 5.0
    del array, part
    assert eventually(lambda: buffer.exports == 0)
    buffer.free()
    assert eventually(lambda: held(client) == 0)


def test_an_array_on_a_claimed_reservation_too(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    reservation = client.reserve(8 * LARGE)
    array = reservation.claim().numpy(LARGE, "float64")
    array[:] = 2
    assert pool.submit(looked_at, array).result() == (True, True, 2 * LARGE)
    assert pool.copied == 0


def test_without_room_it_goes_through_the_pipe_and_says_so(
    pool: ArenaExecutor, client: EmbeddedClient, caplog: pytest.LogCaptureFixture
) -> None:
    guest = client.alloc_contig(client.areas()[0].largest_free)
    array = np.arange(LARGE, dtype=float)
    with caplog.at_level(logging.WARNING):
        results = [pool.submit(twice, array).result() for _ in range(2)]
    assert all(np.array_equal(result, array * 2) for result in results)
    assert pool.fallbacks == 4  # two arguments, two results
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "through the pipe" in caplog.text
    guest.free()
    assert pool.submit(looked_at, array).result()[0]
    assert pool.fallbacks == 4  # two arguments, two results


# --- what becomes of the memory


def test_a_worker_that_is_killed_keeps_nothing(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    array = np.ones(LARGE)
    with pytest.raises(BrokenProcessPool):
        pool.submit(die, array).result()
    assert eventually(lambda: held(client) == 0)


def test_failed_cancelled_and_forgotten_tasks_keep_nothing(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    array = np.ones(LARGE)
    with pytest.raises(LookupError, match=f"planted, {LARGE}"):
        pool.submit(fail, array).result()
    done: list[None] = []
    for _ in range(5):
        pool.submit(twice, array).add_done_callback(lambda _: done.append(None))
    assert eventually(lambda: len(done) == 5)
    with held_up(pool, 2):
        futures = [pool.submit(twice, array + n) for n in range(20)]
        cancelled = [future.cancel() for future in futures]
    assert any(cancelled)
    wait(futures)
    with pytest.raises(CancelledError):
        futures[cancelled.index(True)].result()
    del futures
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_results_outlive_their_worker(client: EmbeddedClient) -> None:
    with ArenaExecutor(1, multiprocessing.get_context("spawn"), client=client, max_tasks_per_child=1) as pool:
        pids = {pool.submit(pid).result() for _ in range(2)}
        result = pool.submit(make_and_die, LARGE).result()
    assert len(pids) == 2
    assert set(result) == {7.0}
    assert in_arena(result)


# --- a ProcessPoolExecutor in all else


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_ways_to_start(client: EmbeddedClient, method: str) -> None:
    context = multiprocessing.get_context(method)
    with ArenaExecutor(2, context, started, (42,), client=client, threshold=THRESHOLD) as pool:
        assert pool.submit(look_started).result() == "42"
        assert pool.submit(looked_at, np.ones(LARGE)).result() == (True, False, LARGE)
        assert list(pool.map(abs, range(-10, 0), chunksize=3)) == list(range(10, 0, -1))
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(pid)


def test_futures_are_futures(pool: ArenaExecutor) -> None:
    futures = [pool.submit(twice, np.full(LARGE, float(n))) for n in range(6)]
    seen: list[float] = []
    futures[0].add_done_callback(lambda future: seen.append(float(future.result()[0])))
    assert sorted(float(future.result()[0]) for future in as_completed(futures)) == [0, 2, 4, 6, 8, 10]
    assert eventually(lambda: seen == [0.0])
    assert all(future.exception() is None and future.done() for future in futures)
    with held_up(pool, 2), pytest.raises(TimeoutError):
        pool.submit(pid).result(timeout=0.001)
    done, pending = wait(futures)
    assert (len(done), pending) == (6, set())
    assert not futures[0].cancel()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_small_tasks_are_the_standard_librarys(client: EmbeddedClient, method: str) -> None:
    """... and whatever they come to, the pool goes on."""
    with ArenaExecutor(1, multiprocessing.get_context(method), client=client) as pool:
        future = pool.submit(abs, -3)
        assert (hasattr(future, "given"), future.result()) == (False, 3)
        assert list(pool.map(pow, range(250), range(250), chunksize=100)) == [n**n for n in range(250)]
        large = pool.submit(make_and_die, 100_000)  # not that here
        assert not hasattr(large, "given")
        result = large.result()
        assert (result.sum(), in_arena(result), result.flags.writeable) == (700_000.0, True, True)
        assert held(client) == result.nbytes + -result.nbytes % 4096
        del large, result
        assert eventually(lambda: held(client) == 0)
        assert pool.submit(Explosive).exception().args == ("planted in unpickling",)  # type: ignore[union-attr]
        assert isinstance(pool.submit(unpicklable).exception(), (AttributeError, pickle.PicklingError))
        assert isinstance(pool.submit(divmod, 1, 0).exception(), ZeroDivisionError)
        assert isinstance(pool.submit(lambda: 1).exception(), (AttributeError, pickle.PicklingError))
        assert pool.submit(abs, -4).result() == 4
        assert pool.fallbacks == 0


def test_results_of_small_tasks_that_find_no_room_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with gcma_shm.embedded("4M") as client, ArenaExecutor(1, client=client) as pool:
        room = client.alloc_contig(client.areas()[0].largest_free)
        assert pool.submit(make_and_die, 100_000).result().sum() == 700_000.0
        assert pool.fallbacks == 1
        assert "result" in caplog.text
        room.free()


def test_from_several_threads(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    array, found = np.ones(LARGE), []

    def use(n: int) -> None:
        result, seen = pool.submit(twice, np.full(LARGE, float(n))), pool.submit(looked_at, array)
        found.append((float(result.result()[0]), seen.result()[2]))

    threads = [threading.Thread(target=use, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(2.0 * n, float(LARGE)) for n in range(8)]
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_a_pool_in_a_pool(client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCMA_ENDPOINT", client.endpoint)
    with ArenaExecutor(1, multiprocessing.get_context("spawn"), client=client, threshold=THRESHOLD) as outer:
        assert outer.submit(in_turn, np.ones(LARGE)).result() == 2 * LARGE
    assert eventually(lambda: client.stats() is not None and held(client) == 0)


def test_a_pool_cannot_be_pickled(pool: ArenaExecutor) -> None:
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(pool)
    with pytest.raises(TypeError, match="pickle"):
        pool.submit(echo, pool).result()
    with pytest.raises(TypeError, match="memoryview"):
        pool.submit(echo, memoryview(b"x" * LARGE)).result()


def test_what_cannot_be_pickled(pool: ArenaExecutor) -> None:
    with pytest.raises(Exception, match=r"pickle|local object"):
        pool.submit(echo, lambda: None).result()
    with pytest.raises(Exception, match=r"pickle|local object"):  # Python 3.13 does not say what for
        pool.submit(unpicklable).result()
    # In the standard library's pool this ends the worker, and with it the pool.
    with pytest.raises(ZeroDivisionError, match="planted"):
        pool.submit(echo, Explosive()).result()
    assert isinstance(pool.submit(Explosive).exception(), ZeroDivisionError)
    assert pool.submit(echo, 1).result() == 1


def test_an_initializer_that_fails_breaks_the_pool(client: EmbeddedClient) -> None:
    with (
        ArenaExecutor(1, multiprocessing.get_context("spawn"), refuse_to_start, client=client) as pool,
        pytest.raises(BrokenProcessPool),
    ):
        pool.submit(pid).result()


def test_shutdown_cancels_what_has_not_begun(client: EmbeddedClient) -> None:
    pool = ArenaExecutor(1, multiprocessing.get_context("spawn"), client=client, threshold=THRESHOLD)
    with held_up(pool) as gate:
        futures = [pool.submit(twice, np.ones(LARGE)) for _ in range(10)]
        assert eventually(gate.tasks[0].running)
        gate.shut_down(futures[-1])
    assert gate.tasks[0].result() > 0, "what had begun was done"
    assert sum(future.cancelled() for future in futures) >= 6
    del futures
    assert eventually(lambda: held(client) == 0)


def test_misuse(client: EmbeddedClient) -> None:
    with pytest.raises(ValueError, match="threshold"):
        ArenaExecutor(client=client, threshold=0)
    with pytest.raises(ValueError, match="max_workers"):
        ArenaExecutor(0, client=client)
    with gcma_shm.connect(client.endpoint, mapped=False) as other, pytest.raises(ValueError, match="maps the arena"):
        ArenaExecutor(client=other)


def test_without_a_client_it_has_the_processes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCMA_SIZE", "32M")
    mine = default_client()
    try:
        assert default_client() is mine
        assert os.environ["GCMA_ENDPOINT"] == mine.endpoint
        with ArenaExecutor(1, multiprocessing.get_context("spawn"), threshold=THRESHOLD) as pool:
            assert pool.submit(looked_at, np.ones(LARGE)).result() == (True, False, LARGE)
    finally:
        mine.close()
        monkeypatch.delenv("GCMA_ENDPOINT", raising=False)
    again = default_client()
    assert again is not mine
    again.close()
    monkeypatch.setenv("GCMA_ENDPOINT", "ipc:///tmp/gcma-nobody-is-here")
    with pytest.raises(gcma_shm.BrokerUnavailable):
        default_client()
