"""The reclaim thread: keeps part of the nursery free, writes what write-behind types left dirty for a while, tries again what the
spill files did not take, gives back the disk space of pages that were invalidated, and, where spill files are to stay out of the page
cache, drops what is left of them there.

The sweep runs without the GIL and sleeps on a futex in the arena, which clients wake when the nursery runs low. Retries keep their own pace,
whether the nursery is low or not, and whoever wrote the page.
"""

from __future__ import annotations

import logging
import threading
import time

from gcma_shm import layout
from gcma_shm._core import Plane, scheduler_slice
from gcma_shm.broker.health import Health

log = logging.getLogger(__name__)

NAP_S = 0.1  # how long the sweep sleeps at most; also bounds a wake-up that was lost
WRITE_BEHIND_S = 1.0  # a dirty page is left alone for so long: what is overwritten meanwhile costs no write
DROP_S = 1.0  # from one time that the page cache is emptied of spill files to the next
PUNCH_S = 1.0  # from the end of a pass over the slots for places to give back to the next; a slot that is stored to again by then keeps its
FAILED_S = 1.0  # after a turn that failed
RETRY_S = 0.1  # to the first round of retries that follows one in vain, and twice as long to each further one ...
RETRY_MAX_S = 1.0  # ... but no longer than this


class ReclaimThread:
    """Runs from construction until `stop`."""

    def __init__(self, plane: Plane, health: Health) -> None:
        self._plane = plane
        self._health = health
        self._retry_pause_s = RETRY_S
        self._retry_at = 0.0
        self._head_then = (
            0  # the nursery's head at `_then`: what was granted before has been left alone for long enough
        )
        self._then = self._dropped = self._punch_at = time.monotonic()
        self._uncached = layout.SPILL_IO[plane.geometry.spill_io] == "uncached"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reclaim", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its turn: what it is just doing. Of the disk that may be all of a type's dirty pages, or
        all spill files that are to leave the page cache, since neither has a budget a turn. Its nap is cut short; one that it has not
        begun yet, having looked before us, lasts.
        """
        self._stopping.set()
        self._plane.wake_sweep()
        self._thread.join()

    def _run(self) -> None:
        scheduler_slice(0)  # not the control loop's
        while not self._stopping.is_set():
            try:
                self._turn()
            except Exception:  # without this thread stores would wait for a free page in vain
                log.exception("a turn of the reclaim thread failed; trying again")
                self._stopping.wait(FAILED_S)

    def _turn(self) -> None:
        """Each part's time is set before it: one that fails is not tried at once again, in place of those that come after it."""
        head = self._plane.sweep(NAP_S)
        now = time.monotonic()
        if now - self._then >= WRITE_BEHIND_S:
            until, self._head_then, self._then = self._head_then, head, now
            self._plane.clean_until(until)
        if now >= self._punch_at:
            self._punch_at = now + PUNCH_S
            if not self._plane.punch():
                self._punch_at = now + NAP_S
        if self._uncached and now - self._dropped >= DROP_S:
            self._dropped = now
            self._plane.drop_cached()
        if self._plane.refused and now >= self._retry_at:
            self._retry()

    def _retry(self) -> None:
        """A round, and when the next one may be: later each time that something is left."""
        unwritable, error = self._plane.retry_refused()
        self._retry_at = time.monotonic() + self._retry_pause_s
        self._retry_pause_s = min(2 * self._retry_pause_s, RETRY_MAX_S) if unwritable else RETRY_S
        line = self._health.note(unwritable, error, time.time())
        if line is not None:
            log.warning("%s", line)
