"""ArenaExecutor when something ends: workers, pools, the parent, the broker. Nothing stays held, no result is lost that was had."""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import numpy.typing as npt
import pytest

import gcma_shm
from gcma_shm.clients import executor as executor_module
from gcma_shm.clients import executor_worker
from gcma_shm.clients.correspondence import Patience
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.executor import ArenaExecutor
from gcma_shm.clients.handles import clients
from gcma_shm.clients.joblib import end_workers, register
from gcma_shm.clients.joblib_arrays import Given, Room

from .client import held
from .gates import held_up
from .processes import WAIT_S, Said, broker, eventually, forked, run_python, runs, start_python

Array = npt.NDArray[np.float64]
THRESHOLD = 4096
LARGE = 100_000  # floats
STRESS_S = float(os.environ.get("GCMA_SOAK_S", "4"))


@pytest.fixture
def pool(client: EmbeddedClient) -> Iterator[ArenaExecutor]:
    with ArenaExecutor(2, multiprocessing.get_context("forkserver"), client=client, threshold=THRESHOLD) as executor:
        yield executor


def nothing_held(client: gcma_shm.Client) -> bool:
    return eventually(lambda: client.stats() is not None and held(client) == 0)


# --- what workers do


def twice(array: Array) -> Array:
    return array * 2


def total(array: Array) -> float:
    return float(array.sum())


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def pid(_: object = None) -> int:
    return os.getpid()


def give_away_and_die(size: int) -> Array:
    """Dies when its result has been given away, and before the pool has it."""
    result = np.ones(size)
    parcel = executor_worker._results.pack(result)[0]
    assert parcel is not None
    os.kill(os.getpid(), signal.SIGKILL)
    return result


def half_pickled(size: int) -> list[object]:
    return [np.ones(size), lambda: None]


def cannot_connect() -> None:
    """As an initializer: this worker gets no client."""

    def refuse(*_: object) -> gcma_shm.Client:
        raise gcma_shm.ArenaError(1, "planted: this process may not map the arena")

    setattr(executor_worker, "client_of", refuse)  # noqa: B010 - a name that the module does not export


def fail_of_a_failure(array: Array) -> None:
    try:
        raise KeyError(f"planted, {array.size}")
    except KeyError as error:
        raise LookupError("of that") from error


def explode(array: Array, _: object) -> None:
    raise ZeroDivisionError(f"planted in unpickling, {array.size}")


class Explosive:
    def __reduce__(self) -> tuple[Any, ...]:
        return explode, (np.ones(LARGE), self.__dict__)


class Unpicklable:
    def __reduce__(self) -> tuple[Any, ...]:
        raise ZeroDivisionError("planted in pickling")


def checked(seed: int, array: Array) -> tuple[int, Array, bytes]:
    """What the stress asks for."""
    assert (array == seed).all()
    if seed % 3 == 0:
        time.sleep(0.002)
    return seed, array * 2, bytes([seed % 256]) * (array.size // 2)


# --- workers


def test_a_result_that_its_worker_could_not_send_is_freed_soon_after_it(
    client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "AFTER_END_S", 0.05)
    with ArenaExecutor(1, multiprocessing.get_context("spawn"), client=client, threshold=THRESHOLD) as pool:
        assert pool.submit(total, np.ones(LARGE)).result() == LARGE
        with pytest.raises(BrokenProcessPool):
            pool.submit(give_away_and_die, LARGE).result()
    assert nothing_held(client)


def test_a_result_of_which_a_part_cannot_be_pickled_leaves_nothing(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    with pytest.raises(Exception, match=r"pickle|local object"):  # Python 3.13 does not say what for
        pool.submit(half_pickled, LARGE).result()
    assert pool.submit(total, np.ones(LARGE)).result() == LARGE
    assert nothing_held(client)


def test_a_failed_task_leaves_nothing_in_its_worker(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    """The worker has the exception until another task fails, and with it what that one came of."""
    error = pool.submit(fail_of_a_failure, np.ones(LARGE)).exception()
    assert isinstance(error, LookupError)
    assert f"planted, {LARGE}" in str(error.__cause__)
    assert nothing_held(client)


def test_an_exception_of_unpickling_tells_where_and_keeps_nothing(pool: ArenaExecutor, client: EmbeddedClient) -> None:
    error = pool.submit(Explosive).exception()
    assert isinstance(error, ZeroDivisionError)
    assert "in explode" in str(error.__cause__)
    assert nothing_held(client)
    with pytest.raises(ZeroDivisionError, match="planted in unpickling"):
        raise error


def test_workers_that_end_after_each_task_lose_no_result(
    client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("forkserver")
    with ArenaExecutor(2, context, client=client, threshold=THRESHOLD, max_tasks_per_child=1) as pool:
        futures = [pool.submit(twice, np.full(LARGE, float(n))) for n in range(8)]
        assert [future.result()[-1] for future in futures] == [2.0 * n for n in range(8)]
    del futures
    assert nothing_held(client)


def test_a_worker_that_cannot_connect_sends_its_results_through_the_pipe(client: EmbeddedClient) -> None:
    context = multiprocessing.get_context("spawn")
    with ArenaExecutor(1, context, cannot_connect, client=client, threshold=THRESHOLD) as pool:
        assert pool.submit(np.ones, LARGE).result().sum() == LARGE
        assert pool.fallbacks == 1


def test_workers_of_a_pool_that_was_made_before_a_fork_end_with_the_child_that_uses_it(client: EmbeddedClient) -> None:
    pool = ArenaExecutor(1, multiprocessing.get_context("fork"), client=client)

    def use(said: Said) -> None:
        said.say(pool.submit(os.getpid).result())
        said.hear()

    with forked(use) as child:
        worker = child.receive()
        assert runs(worker)
        child.kill()
        assert eventually(lambda: not runs(worker))
    pool.shutdown()


def test_workers_end_with_a_parent_that_is_killed(client: EmbeddedClient) -> None:
    """The standard library's would wait for ever; and forked ones would hold their parent's buffers meanwhile."""
    for method in ("fork", "spawn", "forkserver"):
        code = f"""
import multiprocessing, os, sys
import numpy as np, gcma_shm
from gcma_shm.clients.executor import ArenaExecutor
if __name__ == "__main__":
    client = gcma_shm.connect({client.endpoint!r})
    buffer = client.alloc_contig(1 << 20)
    context = multiprocessing.get_context({method!r})
    # One that begins early would do all tasks alone, and there would be no second one.
    pool = ArenaExecutor(2, context, context.Barrier(2, timeout={WAIT_S}).wait, client=client, threshold=4096)
    futures = [pool.submit(np.ones, 100_000) for _ in range(4)]
    results = [future.result() for future in futures]
    print(*pool._processes, flush=True)
    sys.stdin.read()
"""
        parent = start_python(code)
        try:
            assert parent.stdout is not None
            workers = [int(word) for word in parent.stdout.readline().split()]
            assert len(workers) == 2
            assert held(client) >= 1 << 20
        finally:
            parent.kill()
            parent.wait(WAIT_S)
            parent.stdin.close()  # type: ignore[union-attr]
            parent.stdout.close()  # type: ignore[union-attr]
        assert eventually(functools.partial(_all_ended, workers)), method
        assert nothing_held(client)


def _all_ended(processes: list[int]) -> bool:
    return not any(runs(process) for process in processes)


# --- pools


def test_tasks_that_cannot_be_pickled_and_a_shutdown_that_cancels(client: EmbeddedClient) -> None:
    """The standard library's pool waits for ever for a task that its feeder cannot pickle after `cancel_futures`."""
    for seconds in (0.0, 0.05, 0.2):
        pool = ArenaExecutor(1, multiprocessing.get_context("forkserver"), client=client, threshold=THRESHOLD)
        futures: list[Future[Any]] = [pool.submit(nap, 0.2)]
        futures += [pool.submit(nap, Unpicklable()) for _ in range(5)]  # type: ignore[arg-type]
        futures += [pool.submit(twice, np.ones(LARGE)) for _ in range(5)]
        time.sleep(seconds)
        ended = threading.Thread(target=pool.shutdown, kwargs={"cancel_futures": True}, daemon=True)
        ended.start()
        ended.join(WAIT_S)
        assert not ended.is_alive()
        assert wait(futures, WAIT_S).not_done == set()
        del futures
    assert nothing_held(client)


@pytest.mark.parametrize("size", [0, LARGE])
def test_a_pool_that_breaks_with_cancelled_tasks_fails_all_others(client: EmbeddedClient, size: int) -> None:
    """The standard library's thread dies of a cancelled one (Python 3.11), and the others are never done."""
    threshold = (
        THRESHOLD if size else executor_module.THRESHOLD
    )  # of which small tasks go as the standard library's own
    with ArenaExecutor(1, multiprocessing.get_context("forkserver"), client=client, threshold=threshold) as pool:
        futures: list[Future[Any]] = [pool.submit(nap, 60.0)]
        futures += [pool.submit(twice, np.ones(size)) if size else pool.submit(nap, 0.0) for _ in range(10)]
        assert [future.cancel() for future in futures[-5:-1]] == [True] * 4
        (worker,) = pool._processes
        os.kill(worker, signal.SIGKILL)
        assert isinstance(futures[-1].exception(WAIT_S), BrokenProcessPool)
        assert wait(futures, WAIT_S).not_done == set()
        assert all(future.cancelled() or isinstance(future.exception(), BrokenProcessPool) for future in futures)
    del futures
    assert nothing_held(client)


@pytest.mark.skipif(not hasattr(ProcessPoolExecutor, "kill_workers"), reason="of pools since Python 3.14")
@pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
def test_a_pool_whose_workers_are_ended_cancels_or_fails_all_and_keeps_nothing(
    client: EmbeddedClient, how: str
) -> None:
    pool = ArenaExecutor(1, multiprocessing.get_context("forkserver"), client=client, threshold=THRESHOLD)
    futures: list[Future[Any]] = [pool.submit(nap, 60.0), *(pool.submit(twice, np.ones(LARGE)) for _ in range(10))]
    assert eventually(futures[0].running)
    (worker,) = pool._processes
    getattr(pool, how)()
    assert isinstance(futures[0].exception(WAIT_S), BrokenProcessPool)
    assert wait(futures, WAIT_S).not_done == set()
    assert futures[-1].cancelled()
    assert all(future.cancelled() or isinstance(future.exception(), BrokenProcessPool) for future in futures)
    assert eventually(lambda: not runs(worker))
    del futures
    assert nothing_held(client)


def test_a_pool_that_was_shut_down_keeps_no_results(client: EmbeddedClient) -> None:
    pool = ArenaExecutor(1, multiprocessing.get_context("forkserver"), client=client, threshold=THRESHOLD)
    first = pool.submit(twice, np.ones(LARGE))
    with held_up(pool) as gate:
        futures = [pool.submit(twice, np.ones(LARGE)) for _ in range(10)]
        assert first.result()[0] == 2
        gate.shut_down(futures[-1])
    assert any(future.cancelled() for future in futures)
    del first, futures
    assert nothing_held(client)
    assert pool.fallbacks == 0, "and is still here"


def test_a_pool_that_nobody_refers_to_ends(client: EmbeddedClient) -> None:
    pool = ArenaExecutor(1, multiprocessing.get_context("forkserver"), client=client, threshold=THRESHOLD)
    result = pool.submit(twice, np.ones(LARGE)).result()
    late = pool.submit(total, np.ones(LARGE))
    (worker,) = pool._processes
    gone = weakref.ref(pool)
    del pool
    assert late.result() == LARGE
    assert eventually(lambda: gc.collect() >= 0 and gone() is None)
    assert eventually(lambda: not runs(worker))
    assert result[0] == 2
    del result, late
    assert nothing_held(client)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_interpreter_that_exits_with_tasks_under_way_does_them(method: str) -> None:
    code = f"""
import multiprocessing, os, numpy as np
from gcma_shm.clients.executor import ArenaExecutor
if __name__ == "__main__":
    os.environ["GCMA_SIZE"] = "32M"
    pool = ArenaExecutor(2, multiprocessing.get_context({method!r}), threshold=4096)
    for n in range(4):  # by whichever thread, so each in one piece
        pool.submit(np.full, 10_000, n).add_done_callback(lambda future: os.write(1, b"%d\\n" % future.result().sum()))
"""
    assert sorted(run_python(code).split()) == ["0", "10000", "20000", "30000"]


# --- the broker


def test_a_broker_that_is_killed_and_another_one_takes_over(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/b"
    with contextlib.ExitStack() as brokers, contextlib.ExitStack() as stack:
        first = brokers.enter_context(broker(endpoint, size="32M"))
        client = stack.enter_context(gcma_shm.connect(endpoint, timeout=WAIT_S, wait_for_broker=WAIT_S))
        context = multiprocessing.get_context("spawn")
        pool = stack.enter_context(ArenaExecutor(2, context, client=client, threshold=THRESHOLD))
        futures = [pool.submit(twice, np.full(LARGE, float(n))) for n in range(30)]
        assert futures[3].result()[0] == 6
        first.stop(signal.SIGKILL)
        brokers.enter_context(broker(endpoint, size="32M"))
        assert [future.result()[-1] for future in futures] == [2.0 * n for n in range(30)]
        del futures


def patience_of_all(_: Array) -> list[Patience]:
    """Of this process's clients, one of which has what it was given."""
    return [client._channel.patience for client in clients if not client.closed]


def test_workers_wait_for_the_broker_as_long_as_their_pools_client(client: EmbeddedClient) -> None:
    """Or a task fails for want of what it is given, while the next broker starts that its pool waits for."""
    context = multiprocessing.get_context("spawn")
    with gcma_shm.connect(client.endpoint, timeout=77.0, wait_for_broker=88.0) as mine:
        with ArenaExecutor(1, context, client=mine, threshold=THRESHOLD) as pool:
            assert pool.submit(patience_of_all, np.ones(LARGE)).result() == [{"timeout": 77.0, "wait_for_broker": 88.0}]
        register()
        with joblib.parallel_config(backend="gcma", n_jobs=2, client=mine):
            found = joblib.Parallel()(joblib.delayed(patience_of_all)(np.ones(2 * LARGE)) for _ in range(2))
        assert found == [[{"timeout": 77.0, "wait_for_broker": 88.0}]] * 2
        mine._channel.timeout = (
            66.0  # as another client of the same arena may have it: these workers are not to wait for 77 s
        )
        with joblib.parallel_config(backend="gcma", n_jobs=2, client=mine):
            found = joblib.Parallel()(joblib.delayed(patience_of_all)(np.ones(2 * LARGE)) for _ in range(2))
        assert found == [[{"timeout": 66.0, "wait_for_broker": 88.0}]] * 2
        end_workers()


def test_a_broker_that_has_gone_for_good(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/b"
    with broker(endpoint, size="32M") as served:
        client = gcma_shm.connect(endpoint)
        context = multiprocessing.get_context("spawn")
        with ArenaExecutor(1, context, client=client, threshold=THRESHOLD) as pool:
            array = np.ones(LARGE)
            assert pool.submit(total, array).result() == LARGE
            served.stop(signal.SIGKILL)
            client._channel.timeout = 0.3  # from now on nobody answers
            assert [pool.submit(twice, array).result()[0] for _ in range(3)] == [2, 2, 2]
            assert pool.fallbacks == 6
        with contextlib.suppress(gcma_shm.GcmaError):
            client.close()
    with broker(endpoint, size="32M"):
        pass  # takes over what is left, and removes it


def test_an_arena_that_has_ended_and_another_one_in_its_place(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/b"
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(broker(endpoint))
        client = stack.enter_context(gcma_shm.connect(endpoint))
        context = multiprocessing.get_context("spawn")
        pool = stack.enter_context(ArenaExecutor(1, context, client=client, threshold=THRESHOLD))
        array = np.ones(LARGE)
        assert pool.submit(twice, array).result()[0] == 2
        first.stop()
        stack.enter_context(broker(endpoint))
        assert [pool.submit(twice, array).result()[0] for _ in range(2)] == [2, 2]
        assert pool.fallbacks == 4
        room, refused = Room(lambda: client), list[str]()  # joblib's
        data, _ = Given(room, 1000, "r", refused.append).dumps([array, array + 1])
        assert (len(data) > 2 * array.nbytes, len(refused)) == (True, 2)


# --- all at once


def _round(pool: ArenaExecutor, chance: random.Random) -> tuple[int, int]:
    """Tasks of all sizes, and perhaps a killed worker; how many results were returned, all of them right, and how many lost."""
    shared = np.full(chance.randrange(1, LARGE), 1.0)
    tasks: list[tuple[int, Future[Any]]] = []
    with contextlib.suppress(BrokenProcessPool):
        for n in range(chance.randrange(10, 60)):
            array = shared if chance.random() < 0.3 else np.full(chance.randrange(1, LARGE), float(n % 50))
            tasks.append((array.size, pool.submit(checked, int(array[0]), array)))
            if chance.random() < 0.05:
                tasks[-1][1].cancel()
    killed = chance.random() < 0.7
    if killed:
        time.sleep(chance.random() * 0.3)
        with contextlib.suppress(ProcessLookupError, IndexError):  # the pool is broken already
            os.kill(chance.choice([*pool._processes]), signal.SIGKILL)
    returned = broken = 0
    for size, future in tasks:
        if future.cancelled():
            continue
        try:
            n, doubled, text = future.result(WAIT_S)
        except BrokenProcessPool:
            broken += 1
            continue
        assert doubled.shape == (size,)
        assert (doubled == 2 * n).all()
        assert text == bytes([n]) * (size // 2)
        returned += 1
    # An idle worker has the lock of the task queue. Killed in a pool that is being shut down it leaves the other one, and the standard
    # library's pool, waiting for ever; so the pool is to notice first.
    assert not killed or eventually(lambda: bool(pool._broken))
    return returned, broken


@pytest.mark.timeout(120 + 3 * STRESS_S)
def test_workers_are_killed_at_random(client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result that was returned is right, and in the end nothing is held. GCMA_SOAK_S: for so many seconds."""
    monkeypatch.setattr(executor_module, "AFTER_END_S", 0.2)
    seed = int(os.environ.get("GCMA_SEED", time.time_ns() % 10**9))
    print(f"GCMA_SEED={seed}")
    chance, ends = random.Random(seed), time.monotonic() + STRESS_S
    returned = broken = 0
    while time.monotonic() < ends or (not (broken and returned) and time.monotonic() < ends + WAIT_S):
        with ArenaExecutor(2, multiprocessing.get_context("forkserver"), client=client, threshold=THRESHOLD) as pool:
            more, lost = _round(pool, chance)
        returned, broken = returned + more, broken + lost
    assert returned
    assert broken
    print(f"{returned} returned, {broken} broken")
    del pool
    # A future's exception has the frame that it was raised in, which has results; a pool's thread may end late, and has its tasks.
    assert eventually(lambda: gc.collect() >= 0 and client.stats() is not None and held(client) == 0)
