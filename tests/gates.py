"""Workers of pools that a test holds up: all that it submits is there before any of it begins, however slow the machine, or the test itself, is just then."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from tests.processes import WAIT_S, eventually


def wait_at(gate: str) -> int:
    """In a worker: waits until the gate is open. Returns the worker's number."""
    assert eventually(Path(gate).exists), "the gate stays closed"
    return os.getpid()


def meet(place: str, count: int) -> int:
    """In a worker: waits until so many have come to that place (each `count` of them), so that no worker comes twice. Returns the worker's number."""
    (Path(place) / str(os.getpid())).touch()
    assert eventually(lambda: len(list(Path(place).iterdir())) >= count), "the others do not come"
    return os.getpid()


def place() -> str:
    """Where none has come to yet, in this test's own directory."""
    return tempfile.mkdtemp(prefix="gate-")


class Gate:
    """The tasks that hold workers up; the gate is opened in the end at the latest."""

    def __init__(self, pool: Executor, workers: int) -> None:
        self._pool = pool
        self._open = Path(place()) / "open"
        #: No worker begins anything that was submitted after these, which none of them leaves.
        self.tasks: list[Future[int]] = [pool.submit(wait_at, str(self._open)) for _ in range(workers)]

    def open(self) -> None:
        """Lets them go on."""
        self._open.touch()

    def shut_down(self, last: Future[Any]) -> None:
        """Shuts the pool down, with all that has not begun cancelled, and opens when that is done up to the `last` task: else it might be over before."""
        ending = threading.Thread(target=self._pool.shutdown, kwargs={"cancel_futures": True})
        ending.start()
        assert eventually(last.cancelled)
        self.open()
        ending.join(WAIT_S)
        assert not ending.is_alive()


@contextlib.contextmanager
def held_up(pool: Executor, workers: int = 1) -> Iterator[Gate]:
    """All workers of a pool that is idle, `workers` at the most, wait until the block ends."""
    gate = Gate(pool, workers)
    try:
        yield gate
    finally:
        gate.open()
