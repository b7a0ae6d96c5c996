"""Worker threads: work that may touch a file or sweep a type, away from the control loop. Each has one bounded queue. Jobs of
one party keep their order; parties take turns, so that who sends many delays another by one job.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable

from gcma_shm._core import scheduler_slice

log = logging.getLogger(__name__)

Job = Callable[[], None]


class Worker:
    """One thread that does jobs one after another."""

    def __init__(self, name: str, jobs_max: int) -> None:
        self._jobs_max = jobs_max
        self._count = 0
        self._lock = threading.Lock()  # for the next three; held for a few steps
        self._lines: dict[int, deque[Job]] = {}  # of the parties that have jobs; none is empty
        self._turns: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # each party with a line has one turn here
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job, party: int = 0, *, whatever_the_queue: bool = False) -> bool:
        """Queues a job behind its party's others; False when the queue is full. `whatever_the_queue`: for what the broker itself
        must get done, of which there is no more than one job a client.
        """
        with self._lock:
            if self._count >= self._jobs_max and not whatever_the_queue:
                return False
            self._count += 1
            line = self._lines.get(party)
            if line is not None:
                line.append(job)
            else:
                self._lines[party] = deque([job])
                self._turns.put(party)
        return True

    def stop(self, timeout_s: float) -> bool:
        """Lets the jobs in the queue end, then the thread; False when that took longer than `timeout_s`."""
        self._turns.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        scheduler_slice(0)  # not the control loop's
        stopping = False
        while not (stopping and not self._lines):
            party = self._turns.get()
            if party is None:
                stopping = True
                continue
            with self._lock:
                job = self._lines[party][0]
            try:
                job()
            except Exception:
                log.exception("a job failed")
            # Its job stays in the line until it is done: what is submitted meanwhile finds the line, and takes no second turn.
            with self._lock:
                self._count -= 1
                line = self._lines[party]
                line.popleft()
                if line:
                    self._turns.put(party)
                else:
                    del self._lines[party]
