"""The reclaim thread: keeps part of the nursery free, and writes what write-behind types left dirty for a while.

The sweep runs without the GIL and sleeps on a futex in the arena, which clients wake when the nursery runs low.
"""

from __future__ import annotations

import threading
import time

from gcma_shm._core import Plane, scheduler_slice

NAP_S = 0.1  # how long the sweep sleeps at most; also bounds a wake-up that was lost
WRITE_BEHIND_S = 1.0  # a dirty page is left alone for so long: what is overwritten meanwhile costs no write


class ReclaimThread:
    """Runs from construction until `stop`."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="reclaim", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; takes one nap at the most."""
        self._stopping = True
        self._thread.join()

    def _run(self) -> None:
        scheduler_slice(0)  # not the control loop's
        head_then = 0
        then = time.monotonic()
        while not self._stopping:
            head = self._plane.sweep(NAP_S)
            now = time.monotonic()
            if now - then >= WRITE_BEHIND_S:
                self._plane.clean_until(head_then)
                head_then, then = head, now
