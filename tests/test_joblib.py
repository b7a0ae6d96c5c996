"""joblib's backend: what it carries and how, what becomes of the memory, that it is loky in all else, and scikit-learn on it."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import numpy.typing as npt
import pytest
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.backend import get_context
from joblib.externals.loky.process_executor import TerminatedWorkerError, _ResultItem

import gcma_shm
from gcma_shm.clients import joblib as ours
from gcma_shm.clients import joblib_arrays
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.handles import clients
from gcma_shm.clients.joblib import ArenaBackend, end_workers, register
from gcma_shm.clients.places import HOLD_S

from .client import held
from .gates import meet, place
from .processes import Said, broker, eventually, in_fork, run_python, runs

Array = npt.NDArray[Any]
LARGE = 200_000  # floats: 1.5 MiB, more than joblib's default for max_nbytes


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedClient]:
    """One arena, and one pool of workers, for all tests here: to start them for each takes longer than what is tested. Each test sees to
    it that it leaves nothing held.
    """
    short = Path(tempfile.mkdtemp(prefix="gt-"))  # for a socket
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_RUNTIME_DIR", str(short))
        with gcma_shm.embedded("16M") as owner:
            yield owner
            end_workers()
    shutil.rmtree(short)


@pytest.fixture
def backend(client: EmbeddedClient) -> Iterator[ArenaBackend]:
    """The active one, on the module's arena; its counters are the test's own."""
    register()
    with parallel_config(backend="gcma", n_jobs=2, client=client) as config:
        yield config["backend"]
    assert nothing_is_held(client)


def nothing_is_held(client: gcma_shm.Client) -> bool:
    return eventually(lambda: held(client) == 0)


# --- what workers do


def in_arena(array: Array) -> bool:
    begin = array.__array_interface__["data"][0]
    return any(client.mapped and client.locate(begin, 1) is not None for client in clients)


def looked_at(array: Array, *_: object) -> tuple[bool, bool, str, float]:
    return in_arena(array), array.flags.writeable, type(array).__name__, float(array.sum())


def look_around(array: Array) -> list[str]:
    """What is in the temporary folders of this user while a task is under way, that is joblib's or a memmap."""
    return folders(os.getppid())


def folders(pid: int) -> list[str]:
    """joblib names its folders after the process that calls Parallel."""
    places = {Path("/dev/shm"), Path("/tmp"), Path(tempfile.gettempdir())}
    return [str(found) for place in places for found in place.glob(f"joblib*_{pid}_*")]


def add_one(array: Array) -> float:
    array += 1
    return float(array[0])


def echo(value: Any) -> Any:
    return value


def give_away_for(after_end: float, result: Any) -> Any:
    """The result, which is held for so many seconds when its worker is killed on the way."""
    vars(joblib_arrays)["AFTER_END_S"] = after_end
    return result


def ones(size: int, value: float = 1.0) -> Array:
    return np.full(size, value)


def layout(array: Array) -> tuple[bool, bool, bool, Array]:
    return in_arena(array), array.flags.c_contiguous, array.flags.f_contiguous, np.array(array)


def fail(array: Array, number: int) -> float:
    if number == 3:
        raise LookupError(f"planted, {array.size}")
    return float(array[0])


def die(_: Array) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nap(_: Array) -> None:
    time.sleep(60)


def variable(name: str) -> str | None:
    return os.environ.get(name)


def all_workers(count: int = 2) -> set[int]:
    """Of a pool of so many: each does one task, and none goes on without the others. One that begins late would have none to do, else."""
    at = place()
    return set(Parallel(n_jobs=count, batch_size=1)(delayed(meet)(at, count) for _ in range(count)))


def nested(array: Array, backend: str | None, mmap_mode: Any = "r") -> list[tuple[bool, bool, str, float]]:
    found: list[tuple[bool, bool, str, float]] = Parallel(n_jobs=2, backend=backend, mmap_mode=mmap_mode)(
        delayed(looked_at)(array) for _ in range(2)
    )
    return found


def start(value: str) -> None:
    os.environ["GCMA_TEST_STARTED"] = value


# --- what tasks are given


def test_an_array_for_many_tasks_is_copied_once_and_no_file_is_made(
    backend: ArenaBackend, client: EmbeddedClient
) -> None:
    array = np.arange(LARGE, dtype=float)
    assert (
        Parallel(pre_dispatch=2)(delayed(looked_at)(array, n) for n in range(40))
        == [(True, False, "ndarray", float(array.sum()))] * 40
    )
    assert backend.copied == array.nbytes
    assert nothing_is_held(client)
    assert Parallel()(delayed(look_around)(array) for _ in range(4)) == [[]] * 4
    assert folders(os.getpid()) == []
    assert nothing_is_held(client)
    # joblib's own backend, by the same look
    with parallel_config(backend="loky", n_jobs=2):
        assert any(Parallel()(delayed(look_around)(array) for _ in range(4)))
    joblib.externals.loky.get_reusable_executor().shutdown()


def test_parts_of_one_memory_are_told_apart_and_a_call_sees_what_there_is_when_it_begins(
    backend: ArenaBackend, client: EmbeddedClient
) -> None:
    array = np.zeros((2, LARGE))
    array[1] = 1
    sums = [found[3] for found in Parallel()(delayed(looked_at)(array[n % 2]) for n in range(8))]
    assert sums == [0, LARGE] * 4
    assert backend.copied == array.nbytes  # each time a new view of the same memory
    array[:] = 2
    assert Parallel()(delayed(looked_at)(array) for _ in range(2))[0][3] == 4 * LARGE
    assert backend.copied == 2 * array.nbytes
    assert nothing_is_held(client)


def test_a_stream_of_arrays_larger_than_the_arena_goes_through_it(
    backend: ArenaBackend, client: EmbeddedClient
) -> None:
    count = 3 * client.areas()[0].size // (8 * LARGE)
    results = Parallel(return_as="generator", batch_size=1)(delayed(looked_at)(ones(LARGE, n)) for n in range(count))
    for number, result in enumerate(results):
        assert result == (True, False, "ndarray", number * LARGE)
    assert backend.fallbacks == 0
    assert backend.copied == count * 8 * LARGE
    assert nothing_is_held(client)


@pytest.mark.parametrize(
    ("mmap_mode", "writable", "seen"),
    [("r+", True, {1, 2, 3, 4, 5, 6}), ("w+", True, {1, 2, 3, 4, 5, 6}), ("c", False, {1}), (None, False, {1})],
)
def test_mmap_modes(
    backend: ArenaBackend, client: EmbeddedClient, mmap_mode: Any, writable: bool, seen: set[float]
) -> None:
    array = np.zeros(LARGE)
    found = Parallel(mmap_mode=mmap_mode)(delayed(looked_at)(array) for _ in range(2))
    assert found == [(writable, True, "ndarray", 0.0)] * 2
    # One after another, so that none overtakes; the copy lives as long as the call, not as the task.
    one_by_one = Parallel(mmap_mode=mmap_mode, pre_dispatch=1, batch_size=1)
    assert set(one_by_one(delayed(add_one)(array) for _ in range(6))) == seen
    assert not array.any()
    assert backend.copied == 2 * array.nbytes
    assert nothing_is_held(client)


def test_max_nbytes_decides_both_ways(backend: ArenaBackend, client: EmbeddedClient) -> None:
    cases = [
        (1000, 1000, False),
        (1000, 1001, True),
        ("1K", 1024, False),
        ("1K", 1025, True),
        (0, 1, True),
        (None, 1 << 21, False),
    ]
    for max_nbytes, size, expected in cases:
        array = np.ones(size, np.uint8)
        with Parallel(max_nbytes=max_nbytes) as parallel:
            assert (
                parallel(delayed(looked_at)(array) for _ in range(2)) == [(expected, not expected, "ndarray", size)] * 2
            )
            results = parallel(delayed(echo)(array) for _ in range(2))
        assert [in_arena(result) for result in results] == [expected] * 2
        assert all(np.array_equal(result, array) for result in results)
        del results
    assert nothing_is_held(client)


def test_arrays_of_every_kind(backend: ArenaBackend, client: EmbeddedClient, tmp_path: Path) -> None:
    square = np.arange(40_000, dtype=float).reshape(200, 200)
    record = np.zeros(1000, [("a", "u1"), ("b", "f8")])
    objects = np.array([None, "x"] * LARGE, dtype=object)
    times = np.arange(1000).astype("datetime64[s]")
    arrays = [square, square.T, square[::2, 1:], square[::-1], record, times]
    for array, (inside, c_order, f_order, same) in zip(
        arrays, Parallel(max_nbytes=1000)(delayed(layout)(array) for array in arrays), strict=True
    ):
        assert inside
        assert same.dtype == array.dtype
        assert np.array_equal(same, array)
        assert (c_order, f_order) == (not array.flags.f_contiguous, array.flags.f_contiguous) or array.ndim == 1
    assert Parallel()(delayed(echo)(objects) for _ in range(2))[0][:2].tolist() == [None, "x"]
    # What is a file already goes by its name.
    mapped = np.memmap(tmp_path / "file", dtype=float, mode="w+", shape=LARGE)
    mapped[:] = 1
    before = backend.copied
    assert Parallel()(delayed(looked_at)(part) for part in (mapped, mapped[5:])) == [
        (False, True, "memmap", LARGE), (False, True, "memmap", LARGE - 5)
    ]  # fmt: skip
    # One after the other: who adds to the same memory at once may overwrite what the other one has added.
    assert Parallel(pre_dispatch=1, batch_size=1)(delayed(add_one)(mapped) for _ in range(2)) == [2, 3]
    assert mapped[0] == 3
    assert backend.copied == before
    del mapped, same
    assert nothing_is_held(client)


def test_arrays_on_a_buffer_are_not_copied(backend: ArenaBackend, client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(8 * LARGE)
    array = buffer.numpy(LARGE, "float64")
    array[:] = 1
    parts = [array, array[7:], array[::-2], array[3:5]]
    for max_nbytes in ("1M", None):
        found = Parallel(max_nbytes=max_nbytes)(delayed(looked_at)(part) for part in parts)
        assert found == [(True, True, "ndarray", part.size) for part in parts]
    Parallel()(delayed(add_one)(part) for part in (array[:100], array[100:]))
    assert array[0] == array[-1] == 2
    array.flags.writeable = False
    assert Parallel()(delayed(looked_at)(array) for _ in range(2))[0][1] is False
    assert backend.copied == 0
    returned = Parallel()(delayed(echo)(buffer.numpy(5)) for _ in range(2))
    buffer.numpy(5)[:] = 9
    assert [part.tolist() for part in returned] == [[9] * 5] * 2  # the very memory
    del array, parts, returned
    part = None
    assert eventually(lambda: buffer.exports == 0), part
    buffer.free()
    assert nothing_is_held(client)


# --- what tasks return


def test_results_are_the_callers_own_and_freed_with_the_last_reference(
    backend: ArenaBackend, client: EmbeddedClient
) -> None:
    results = Parallel()(delayed(ones)(LARGE, n) for n in range(4))
    assert [(in_arena(result), result.flags.writeable, result[0]) for result in results] == [
        (True, True, float(n)) for n in range(4)
    ]
    part = results[2][5:6]
    del results
    assert eventually(lambda: held(client) == -(-8 * LARGE // client.page_size) * client.page_size)
    assert part[0] == 2
    del part
    assert nothing_is_held(client)
    array = np.ones(LARGE)
    same = Parallel()(delayed(echo)(array) for _ in range(2))
    same[0] += 1
    assert (same[0][0], same[1][0], array[0]) == (2, 1, 1)
    del same
    assert nothing_is_held(client)


def test_a_result_passed_on_is_as_any_array_to_the_tasks(backend: ArenaBackend, client: EmbeddedClient) -> None:
    (result,) = Parallel()(delayed(ones)(LARGE) for _ in range(1))
    assert Parallel()(delayed(looked_at)(result) for _ in range(2)) == [(True, False, "ndarray", LARGE)] * 2
    assert backend.copied == 0
    assert Parallel(mmap_mode="c", batch_size=1)(delayed(add_one)(result) for _ in range(2)) == [2, 2]
    assert backend.copied == 0
    assert Parallel(mmap_mode="r+", pre_dispatch=1, batch_size=1)(delayed(add_one)(result) for _ in range(2)) == [2, 3]
    assert backend.copied == result.nbytes
    assert result[0] == 1
    del result
    assert nothing_is_held(client)


def test_without_room_it_goes_through_the_pipe_and_says_so(
    backend: ArenaBackend, client: EmbeddedClient, caplog: pytest.LogCaptureFixture
) -> None:
    guest = client.alloc_contig(client.areas()[0].largest_free)
    array = np.arange(LARGE, dtype=float)
    with caplog.at_level(logging.WARNING):
        results = Parallel(batch_size=1)(delayed(echo)(array) for _ in range(3))
    assert all(np.array_equal(result, array) for result in results)
    assert backend.fallbacks == 6
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "through the pipe" in caplog.text
    assert "bytes" in caplog.text
    guest.free()
    assert Parallel()(delayed(looked_at)(array) for _ in range(2))[0][0]
    assert backend.fallbacks == 6


# --- loky in all else


@pytest.mark.parametrize("return_as", ["generator", "generator_unordered"])
def test_generators(backend: ArenaBackend, client: EmbeddedClient, return_as: str) -> None:
    results = Parallel(return_as=return_as)(delayed(echo)(ones(LARGE, n)) for n in range(10))
    assert sorted(result[0] for result in results) == list(range(10))
    assert nothing_is_held(client)
    # Its workers are killed in the midst of what they give away.
    results = Parallel(return_as=return_as)(delayed(give_away_for)(0.1, ones(LARGE, n)) for n in range(10))
    assert next(results)[0] < 10
    with pytest.warns(UserWarning, match="cancelled|not used"):
        del results
    assert nothing_is_held(client)
    assert Parallel()(delayed(echo)(n) for n in range(3)) == [0, 1, 2]


def test_failures(backend: ArenaBackend, client: EmbeddedClient) -> None:
    array = np.ones(LARGE)
    with pytest.raises(LookupError, match=f"planted, {LARGE}") as raised:
        Parallel()(delayed(fail)(array, n) for n in range(8))
    assert "in fail" in str(raised.value.__cause__)
    with pytest.raises(Exception, match="pickle"):
        Parallel()(delayed(echo)((array, threading.Lock())) for _ in range(2))
    with pytest.raises(Exception, match="pickle"):
        Parallel()(delayed(threading.Lock)() for _ in range(2))
    with pytest.raises(TerminatedWorkerError):  # of what, loky says if the kernel tells it within a quarter of a second
        Parallel()(delayed(die)(array) for _ in range(4))
    with pytest.raises(multiprocessing.TimeoutError):
        Parallel(timeout=0.5)(delayed(nap)(array) for _ in range(4))
    with Parallel(max_nbytes=1000, mmap_mode="c") as parallel:
        with pytest.raises(LookupError, match="planted"):
            parallel(delayed(fail)(array, n) for n in range(8))
        # A new pool, and what Parallel was told is not forgotten. (joblib may put a result of the failed call in front, on loky too.)
        found = parallel(delayed(looked_at)(array[:500]) for _ in range(2))
        assert found[-2:] == [(False, True, "ndarray", 500)] * 2
        assert backend.copied % array.nbytes == 4000
    assert nothing_is_held(client)


class Gone:
    """Of a parcel that comes too late, or anything else that cannot be loaded."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return explode, ()


def explode() -> None:
    raise ZeroDivisionError("planted in unpickling")


def test_what_fails_while_it_is_unpickled_is_the_tasks_exception(backend: ArenaBackend, client: EmbeddedClient) -> None:
    with pytest.raises(ZeroDivisionError, match="planted"):
        Parallel()(delayed(echo)(Gone()) for _ in range(2))
    with pytest.raises(ZeroDivisionError, match="planted"):
        Parallel()(delayed(Gone)() for _ in range(2))


def refuse_pickling(after_end: float) -> Any:
    return give_away_for(after_end, (ones(LARGE), threading.Lock()))


def refuse_unpickling(after_end: float) -> Any:
    return give_away_for(after_end, (ones(LARGE), Gone(), ones(LARGE)))


def catch(array: Array) -> Exception | None:
    try:
        fail(array, 3)
    except LookupError as error:
        return error
    return None


def test_a_result_that_is_an_exception_leaves_nothing(backend: ArenaBackend, client: EmbeddedClient) -> None:
    """Its traceback in the worker has the task's array."""
    (error,) = Parallel()(delayed(catch)(array) for array in (np.ones(LARGE),))
    assert str(error) == f"planted, {LARGE}"
    assert nothing_is_held(client)


def test_a_result_that_fails_on_its_way_leaves_nothing(backend: ArenaBackend, client: EmbeddedClient) -> None:
    for task, error in ((refuse_pickling, "pickle"), (refuse_unpickling, "planted")):
        with pytest.raises(Exception, match=error):
            Parallel()(delayed(task)(HOLD_S) for _ in range(1))
        assert nothing_is_held(client), f"{task}: it waits for its worker's end, and longer"
        # Of two the other one's worker may be killed before it has sent what it gave away: that is held for as long as it said.
        with pytest.raises(Exception, match=error):
            Parallel()(delayed(task)(0.1) for _ in range(2))
        assert nothing_is_held(client), task


def give_away_and_die(after_end: float) -> Any:
    return give_away_for(after_end, (ones(LARGE), Die()))


class Die:
    """Kills the worker that packs it, which has given away an array before."""

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_result_whose_worker_was_killed_is_held_for_a_while(backend: ArenaBackend, client: EmbeddedClient) -> None:
    with pytest.raises(TerminatedWorkerError):
        Parallel()(delayed(give_away_and_die)(0.1) for _ in range(1))
    assert nothing_is_held(client)


def test_results_that_were_sent_and_nobody_waits_for_are_given_up(client: EmbeddedClient) -> None:
    """Their workers have been ended since, or the arena would hold them for a minute."""
    packer = joblib_arrays.Returned(joblib_arrays.Room(lambda: client), 1000, pytest.fail)
    packed, _ = packer.dumps([ones(LARGE), ones(LARGE)])
    results = ours._Results(ctx=get_context("loky"))
    results.put(_ResultItem(1, result=ours._Result(packed, packer.handles, [])))
    results.put(os.getpid())  # of a worker that has ended
    assert held(client) >= 2 * 8 * LARGE
    results.close()
    assert nothing_is_held(client)


def die_after(number: int, result: Array) -> Array:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return result


def test_a_call_that_lost_its_workers_keeps_no_results(backend: ArenaBackend, client: EmbeddedClient) -> None:
    """Not those that nobody has taken, nor those that were taken: the exception has been where they were."""
    results = Parallel(return_as="generator", batch_size=1, pre_dispatch=2)(
        delayed(die_after)(n, ones(LARGE)) for n in range(6)
    )
    with pytest.raises(TerminatedWorkerError):
        assert all(result[0] == 1 for result in results)
    del results
    assert eventually(lambda: gc.collect() >= 0 and held(client) == 0)
    assert Parallel()(delayed(ones)(2) for _ in range(1))[0].tolist() == [1, 1]


def test_the_broker_dies_during_a_call(tmp_path: Path) -> None:
    register()
    endpoint = f"ipc://{tmp_path}/b"
    array = np.ones(LARGE)
    with broker(endpoint, size="32M") as served:
        client = gcma_shm.connect(endpoint)
        with parallel_config(backend="gcma", n_jobs=2, client=client) as config:
            results = Parallel(return_as="generator", batch_size=1, pre_dispatch=2)(
                delayed(echo)(ones(LARGE, n) if n in (0, 1, 7) else n) for n in range(8)
            )
            assert next(results)[0] == 0
            served.stop(signal.SIGKILL)
            client._channel.timeout = 0.3  # from now on nobody answers
            with contextlib.suppress(gcma_shm.BrokerUnavailable):  # what was on its way
                assert [float(np.max(result)) for result in results] == [float(n) for n in range(1, 8)]
            del results
            # Calls that begin now do without.
            found = Parallel()(delayed(echo)(array) for _ in range(2))
            assert [result.tolist() == array.tolist() for result in found] == [True, True]
            assert config["backend"].fallbacks >= 4
        end_workers()
        with contextlib.suppress(gcma_shm.GcmaError):
            client.close()
    with broker(endpoint, size="32M"):
        pass  # takes over what is left, and removes it


def end_the_broker_and_return(pid: int) -> list[Array]:
    """A large and a small array on Buffers of this worker, twice each, when nobody serves any more."""
    assert ours._room is not None
    arrays = [ours._room.client.alloc_contig(8 * count).numpy(count, "float64") for count in (LARGE, 10)]
    for number, array in enumerate(arrays):
        array[:] = number
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    return [array[n:] for array in arrays for n in range(2)]


def test_a_result_on_a_buffer_goes_through_the_pipe_when_no_broker_answers(tmp_path: Path) -> None:
    register()
    endpoint = f"ipc://{tmp_path}/b"
    with broker(endpoint, size="32M") as served:
        client = gcma_shm.connect(endpoint)
        with parallel_config(backend="gcma", n_jobs=2, client=client) as config:
            (found,) = Parallel()(delayed(end_the_broker_and_return)(pid) for pid in (served.pid,))
            assert [(array.size, *set(array)) for array in found] == [(LARGE, 0), (LARGE - 1, 0), (10, 1), (9, 1)]
            assert not any(in_arena(array) for array in found)
            assert config["backend"].fallbacks == 2  # of small ones nobody asks which way they went
        end_workers()
        with contextlib.suppress(gcma_shm.GcmaError):
            client.close()
    with broker(endpoint, size="32M"):
        pass  # takes over what is left, and removes it


KILLED = """
import os, signal, sys
import numpy as np
from joblib import Parallel, delayed, parallel_config
from gcma_shm.clients.joblib import register

def work(n):
    print(os.getpid(), flush=True)
    return np.ones(300_000)

register()
with parallel_config(backend="gcma", n_jobs=2):
    for result in Parallel(return_as="generator", batch_size=1)(delayed(work)(n) for n in range(8)):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_workers_end_with_a_caller_that_was_killed(client: EmbeddedClient, tmp_path: Path) -> None:
    program = tmp_path / "killed.py"
    program.write_text(KILLED.replace("\nregister()\n", "\nif __name__ != '__main__': sys.exit()\nregister()\n"))
    done = subprocess.run(
        [sys.executable, str(program)], env=os.environ | {"GCMA_ENDPOINT": client.endpoint}, capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    workers = {int(line) for line in done.stdout.split()}
    assert workers
    assert eventually(lambda: not any(map(runs, workers)))


def test_workers_stay_for_the_next_call_and_are_resized(backend: ArenaBackend, client: EmbeddedClient) -> None:
    with parallel_config(backend="gcma", n_jobs=2, client=client, inner_max_num_threads=1):
        first = all_workers()
        pool = ours._workers
        assert all_workers() == first
        more = all_workers(3)
        assert more > first
        assert all_workers() < more
        assert ours._workers is pool
        del pool
        assert Parallel()(delayed(variable)("OMP_NUM_THREADS") for _ in range(2)) == ["1", "1"]
        assert Parallel()(delayed(variable)("GCMA_ENDPOINT") for _ in range(2)) == [client.endpoint] * 2
    with parallel_config(backend="gcma", n_jobs=2, client=client, initializer=start, initargs=("yes",)):
        assert Parallel()(delayed(variable)("GCMA_TEST_STARTED") for _ in range(2)) == ["yes", "yes"]
    assert Parallel()(delayed(variable)("GCMA_TEST_STARTED") for _ in range(2)) == [None, None]
    # The pools that were in the way of these have ended, or will.
    assert eventually(lambda: not any(map(runs, more)))


def test_calls_of_several_threads_and_sizes_at_once(backend: ArenaBackend, client: EmbeddedClient) -> None:
    array = np.ones(LARGE)
    found: list[list[Any]] = []

    def call(n_jobs: int) -> None:
        mine = ArenaBackend(client=client, nesting_level=0)
        found.append(Parallel(n_jobs=n_jobs, backend=mine)(delayed(looked_at)(array, n) for n in range(12)))

    threads = [threading.Thread(target=call, args=(2 + n % 2,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[(True, False, "ndarray", LARGE)] * 12] * 4
    assert nothing_is_held(client)


def test_parallel_calls_inside_of_tasks(backend: ArenaBackend, client: EmbeddedClient) -> None:
    array = np.ones(LARGE)
    seen = (True, False, "ndarray", float(LARGE))
    for inner in (None, "threading", "gcma"):
        assert Parallel()(delayed(nested)(array, inner) for _ in range(2)) == [[seen] * 2] * 2
    own = (True, True, "ndarray", float(LARGE))
    for mode in ("r+", "c"):
        found = Parallel()(delayed(nested)(array, "gcma", mode) for _ in range(2))
        assert found == [[(mode == "r+", *own[1:])] * 2] * 2
    assert backend.copied == 5 * array.nbytes
    assert nothing_is_held(client)
    with parallel_config(backend="loky", n_jobs=2):  # whose workers connect by themselves
        os.environ["GCMA_ENDPOINT"] = client.endpoint  # the fixture of all tests has removed it, and does again
        try:
            assert Parallel()(delayed(nested_in_loky)(LARGE) for _ in range(2)) == [[seen] * 2] * 2
        finally:
            del os.environ["GCMA_ENDPOINT"]
    joblib.externals.loky.get_reusable_executor().shutdown()


def nested_in_loky(size: int) -> list[tuple[bool, bool, str, float]]:
    register()
    return nested(np.ones(size), "gcma")


def test_a_forked_child_has_workers_of_its_own(backend: ArenaBackend, client: EmbeddedClient) -> None:
    ours = all_workers()

    def child(_: Said) -> set[int]:
        theirs = all_workers()
        assert Parallel()(delayed(looked_at)(np.ones(LARGE)) for _ in range(2))[0][0]
        end_workers()
        return theirs

    theirs = in_fork(child)
    assert len(theirs) == 2
    assert not theirs & ours
    assert all_workers() == ours


def test_misuse(client: EmbeddedClient) -> None:
    register()
    with gcma_shm.connect(client.endpoint, mapped=False) as other, parallel_config(backend="gcma", client=other):
        assert Parallel(n_jobs=1)(delayed(echo)(n) for n in range(2)) == [0, 1]  # no pool, no arena
        with pytest.raises(ValueError, match="maps the arena"):
            Parallel(n_jobs=2)(delayed(echo)(n) for n in range(2))
    with pytest.raises(ValueError, match="idle_worker_timeout"), parallel_config(backend="gcma", client=client):
        ArenaBackend(client=client).configure(2, timeout=3)


INTERACTIVE = """
import os, sys
import numpy as np
from joblib import Parallel, delayed, parallel_config
from gcma_shm.clients.joblib import register

SCALE = 3

class Model:
    def __init__(self, weight):
        self.weight = weight
    def apply(self, array):
        return SCALE * self.weight * array.sum(), array.flags.writeable, os.getpid()

if __name__ == "__main__":
    register()
    register()
    array = np.ones(300_000)
    parallel_config(backend="gcma", n_jobs=2)
    print(Parallel()(delayed(lambda a, n: float(a.sum()) * n)(array, n) for n in range(3)))
    found = Parallel()(delayed(Model(w).apply)(array) for w in range(3))
    print([float(value) for value, _, _ in found], {flag for _, flag, _ in found}, os.getpid() in {p for _, _, p in found})
    big = Parallel()(delayed(lambda: np.zeros(300_000))() for _ in range(2))  # alive at the end
"""


def test_a_script_with_functions_of_its_own_and_the_processes_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCMA_SIZE", "32M")
    said = run_python(INTERACTIVE).splitlines()
    assert said == ["[0.0, 300000.0, 600000.0]", "[0.0, 900000.0, 1800000.0] {False} False"]


# --- scikit-learn


def test_scikit_learn_finds_the_same_as_with_one_process(backend: ArenaBackend, client: EmbeddedClient) -> None:
    # Not above: each worker of each test here would take a second to import it.
    from sklearn.datasets import make_classification
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, cross_val_score

    samples, classes = make_classification(1500, 30, random_state=0)
    grid = GridSearchCV(LogisticRegression(max_iter=500), {"C": [0.1, 1, 10]}, cv=3, n_jobs=1).fit(samples, classes)
    forest = RandomForestClassifier(20, random_state=0, n_jobs=1).fit(samples, classes)
    scores = cross_val_score(forest, samples, classes, cv=3, n_jobs=1)
    with parallel_config(backend=backend, max_nbytes="10K"):
        again = GridSearchCV(LogisticRegression(max_iter=500), {"C": [0.1, 1, 10]}, cv=3, n_jobs=2)
        again.fit(samples, classes)
        assert np.array_equal(again.cv_results_["mean_test_score"], grid.cv_results_["mean_test_score"])
        assert again.best_params_ == grid.best_params_
        assert samples.nbytes <= backend.copied < 2 * samples.nbytes  # and not one for each of nine fits
        copied = backend.copied
        assert np.array_equal(cross_val_score(forest, samples, classes, cv=3, n_jobs=2), scores)
        assert backend.copied > copied
        assert nothing_is_held(client)
        copied = backend.copied
        parallel = RandomForestClassifier(20, random_state=0, n_jobs=2).fit(samples, classes)
        assert backend.copied > copied
        assert np.array_equal(parallel.predict_proba(samples), forest.predict_proba(samples))
        assert nothing_is_held(client)
    assert backend.fallbacks == 0
