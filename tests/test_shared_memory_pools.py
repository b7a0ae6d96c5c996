"""Segments, lists and managers across pools, threads and forks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any

import numpy as np
import pytest

from gcma_shm import Client
from gcma_shm.clients import tree
from gcma_shm.clients.shared_memory import ShareableList, SharedMemory, SharedMemoryManager, using
from tests.processes import Said, eventually, in_fork

from .client import held
from .segments import METHODS, PAGE, buf, names

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


# --- pools, lists and managers


def doubled(segment: SharedMemory) -> int:
    array = np.frombuffer(buf(segment), np.int64)
    array *= 2
    total = int(array.sum())
    del array
    segment.close()
    return total


def appended(numbers: ShareableList[Any]) -> list[Any]:
    numbers[0] = "changed"
    found = [numbers[n] for n in range(len(numbers))]
    numbers.shm.close()
    return found


@pytest.mark.parametrize("method", METHODS)
def test_segments_and_lists_through_a_pool(method: Any, at: Client) -> None:
    """What is pickled finds its arena, whatever that process's own is."""
    items: Any = ["a list", 2.5, None, True, b"x"]
    segment, numbers = SharedMemory(create=True, size=PAGE), ShareableList(items)
    np.frombuffer(buf(segment), np.int64)[:] = 1
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(doubled, [segment, segment]) == [1024, 2048]
        assert pool.apply(appended, (numbers,)) == ["changed", 2.5, None, True, b"x"]
        pool.close()
        pool.join()
    assert np.frombuffer(buf(segment), np.int64).sum() == 2048
    assert numbers[0] == "changed"
    for one in (segment, numbers.shm):
        one.close()
        one.unlink()
    assert eventually(lambda: not held(at))


def make(manager: SharedMemoryManager) -> str:
    segment = manager.SharedMemory(PAGE)
    buf(segment)[0] = 7
    segment.close()
    return segment.name


@pytest.mark.parametrize("method", METHODS)
def test_a_manager(method: Any, at: Client) -> None:
    with SharedMemoryManager(ctx=multiprocessing.get_context(method)) as manager:
        assert isinstance(manager, multiprocessing.managers.SharedMemoryManager)
        segment, numbers = manager.SharedMemory(PAGE), manager.ShareableList(range(10))
        assert isinstance(segment, SharedMemory)
        assert isinstance(numbers, ShareableList)
        assert names(at).keys() == {segment.name, numbers.shm.name}
        gone = manager.SharedMemory(PAGE)
        gone.close()
        gone.unlink()  # which the standard library's manager would stumble over
    assert not names(at)
    segment.close()
    numbers.shm.close()
    assert eventually(lambda: not held(at))


def test_a_managers_server_that_is_killed_leaves_its_segments_to_the_tree(at: Client) -> None:
    manager = SharedMemoryManager()
    manager.start()
    segment = manager.SharedMemory(PAGE)
    server = manager._process  # type: ignore[attr-defined]
    os.kill(server.pid, signal.SIGKILL)
    server.join()
    (keeper,) = names(at)[segment.name]
    assert at.stats()["clients"][str(keeper)]["pid"] == tree.root().pid
    segment.close()
    segment.unlink()
    assert eventually(lambda: not held(at))


def test_a_manager_that_cannot_be_told_leaves_no_segment(at: Client) -> None:
    with SharedMemoryManager() as manager:
        address, manager._address = manager._address, "/nobody"
        for make_one in (lambda: manager.SharedMemory(PAGE), lambda: manager.ShareableList([1])):
            with pytest.raises(FileNotFoundError):
                make_one()
        manager._address = address
        assert not names(at)
    assert eventually(lambda: not held(at))


# --- threads and forks


def test_threads_that_create_one_name_have_one_segment(at: Client) -> None:
    made: list[object] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        with using(at):
            for n in range(25):
                barrier.wait()
                try:
                    made.append(SharedMemory(f"n{n}", create=True, size=PAGE))
                except FileExistsError as error:
                    made.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    segments = [one for one in made if isinstance(one, SharedMemory)]
    assert (len(made), len(segments), held(at)) == (100, 25, 25 * PAGE)
    for segment in segments:
        segment.close()
        segment.unlink()
    assert not held(at)


def test_a_forked_child_has_it_and_closes_its_own(at: Client) -> None:
    segment = SharedMemory(create=True, size=PAGE)

    def child(_said: Said) -> object:
        buf(segment)[0] = 7
        segment.close()
        return True

    assert in_fork(child)
    assert buf(segment)[0] == 7
    segment.close()
    segment.unlink()
    assert eventually(lambda: not held(at))
