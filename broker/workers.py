"""Worker threads: work that may touch a file or sweep a type, away from the control loop. Each has one bounded queue
and keeps its order.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from gcma_shm._core import scheduler_slice

log = logging.getLogger(__name__)

Job = Callable[[], None]


class Worker:
    """One thread that does jobs one after another."""

    def __init__(self, name: str, jobs_max: int) -> None:
        self._jobs_max = jobs_max
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job, whatever_the_queue: bool = False) -> bool:
        """Queues a job; False when the queue is full. `whatever_the_queue`: for what the broker itself must get done,
        of which there is no more than one job a client.
        """
        if self._jobs.qsize() >= self._jobs_max and not whatever_the_queue:
            return False
        self._jobs.put(job)
        return True

    def stop(self, timeout_s: float) -> bool:
        """Lets the jobs in the queue end, then the thread; False when that took longer than `timeout_s`."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        scheduler_slice(0)  # not the control loop's
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("a job failed")
