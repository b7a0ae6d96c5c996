"""Worker threads: the order of jobs, whose turn it is, and the bound."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest

from gcma_shm.broker.workers import Worker
from tests.processes import WAIT_S

JOBS_MAX = 50


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("tested", JOBS_MAX)
    yield worker
    assert worker.stop(WAIT_S)


@pytest.fixture
def held(worker: Worker) -> Iterator[Callable[[], None]]:
    """The worker is busy with a job of party 99 until this is called."""
    begun, end = threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        assert end.wait(WAIT_S)

    assert worker.submit(job, 99)
    assert begun.wait(WAIT_S)
    yield end.set
    end.set()


def test_parties_take_turns_and_each_keeps_its_order(worker: Worker, held: Callable[[], None]) -> None:
    done: list[tuple[str, int]] = []
    for number in range(5):
        worker.submit(lambda number=number: done.append(("a", number)), 1)  # type: ignore[misc]
    for number in range(2):
        worker.submit(lambda number=number: done.append(("b", number)), 2)  # type: ignore[misc]
    worker.submit(lambda: done.append(("c", 0)), 3)
    held()
    assert worker.stop(WAIT_S)
    assert done == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 2), ("a", 3), ("a", 4)]


def test_what_a_job_submits_comes_after_the_others(worker: Worker, held: Callable[[], None]) -> None:
    """A sync in slices does so."""
    done: list[str] = []

    def again() -> None:
        done.append("first")
        worker.submit(lambda: done.append("again"), 1)

    worker.submit(again, 1)
    worker.submit(lambda: done.append("second"), 1)
    held()
    assert worker.stop(WAIT_S)
    assert done == ["first", "second", "again"]


def test_the_queue_is_bounded_and_what_must_be_done_is_queued_all_the_same(
    worker: Worker, held: Callable[[], None]
) -> None:
    done: list[int] = []
    accepted = [worker.submit(lambda: done.append(1), party) for party in range(JOBS_MAX + 5)]
    assert accepted == [True] * (JOBS_MAX - 1) + [False] * 6, "the one that is being done counts"
    assert worker.submit(lambda: done.append(2), whatever_the_queue=True)
    held()
    assert worker.stop(WAIT_S)
    assert sorted(done) == [1] * (JOBS_MAX - 1) + [2]


def test_a_job_that_fails_ends_neither_the_thread_nor_its_line(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()

    def fail() -> None:
        raise RuntimeError("on purpose")

    with caplog.at_level(logging.ERROR):
        worker.submit(fail, 1)
        worker.submit(done.set, 1)
        assert done.wait(WAIT_S)
    assert "a job failed" in caplog.text


def test_a_job_that_does_not_end_is_left(worker: Worker, held: Callable[[], None]) -> None:
    assert not worker.stop(0.01)
    held()
