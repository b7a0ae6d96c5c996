"""Whose turn it is to write: a lock among the processes that map an arena, on one byte of its object.

An open-file-description lock, as in `gcma_shm/presence.py`: it goes with its process however that ends, and so nobody waits for a dead one.
For one that is stopped others wait until a timeout.
"""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType

from gcma_shm.errors import SlotBusy
from gcma_shm.presence import Presence

NAP_MIN_S, NAP_MAX_S = 0.00005, 0.002  # between two tries: the kernel's own waiting has no bound


class Turn:
    """`with turn:` has the lock. Reentrant; safe across threads and fork."""

    def __init__(self, presence: Presence, at: int, what: str, timeout: float) -> None:
        """`at`: the byte; `what` is waited for, in words; `timeout` in seconds."""
        self._presence = presence
        self._at = at
        self._what = what
        self._timeout = timeout
        self._begin(presence)

    def _begin(self, presence: Presence) -> None:
        self._own = presence.anew()  # an open file of our own: a forked child would share our locks through this one
        self._pid = os.getpid()
        self._threads = threading.RLock()
        self._depth = 0

    def __enter__(self) -> None:
        if self._pid != os.getpid():
            own = self._own
            self._begin(own)
            own.close()
        deadline = time.monotonic() + self._timeout
        if not self._threads.acquire(timeout=self._timeout):
            raise SlotBusy(f"{self._what} was being written by another thread for more than {self._timeout:g} s")
        try:
            if not self._depth:
                self._lock(deadline)
            self._depth += 1
        except BaseException:
            self._threads.release()
            raise

    def _lock(self, deadline: float) -> None:
        nap = NAP_MIN_S
        while True:
            try:
                self._own.lock(self._at)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise SlotBusy(
                        f"{self._what} was being written by another process for more than {self._timeout:g} s"
                    ) from None
                time.sleep(nap)
                nap = min(2 * nap, NAP_MAX_S)
            else:
                return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._depth -= 1
        try:
            if not self._depth:
                self._own.unlock(self._at)
        finally:
            self._threads.release()
