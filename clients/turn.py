"""Whose turn it is to write: a lock among the processes that map an arena, on one byte of its object.

An open-file-description lock, as in `gcma_shm/presence.py`: it goes with its process however that ends, and so nobody waits for a dead one.
For one that is stopped others wait until a timeout.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType

from gcma_shm.errors import SlotBusy
from gcma_shm.presence import Presence

NAP_MIN_S, NAP_MAX_S = 0.00005, 0.002  # between two tries: the kernel's own waiting has no bound


class Turn:
    """`with turn:` has the lock. Reentrant; safe across threads and fork."""

    def __init__(self, open_file: Callable[[], Presence], at: int, what: str, timeout: float) -> None:
        """`open_file`: opens the arena's object anew; `at`: the byte; `what` is waited for, in words; `timeout` in seconds."""
        self._open_file = open_file
        self._at = at
        self._what = what
        self._timeout = timeout
        self._begin()
        _turns.add(self)

    def _begin(self) -> None:
        self._own: Presence | None = None
        self._threads = threading.RLock()
        self._depth = 0

    def start_over(self) -> None:
        """In a forked child. It shares its parent's open file, and would keep the parent's lock alive when that is killed."""
        if self._own is not None:
            self._own.close()
        self._begin()

    def __enter__(self) -> None:
        deadline = time.monotonic() + self._timeout
        if not self._threads.acquire(timeout=self._timeout):
            raise SlotBusy(f"{self._what} was being written by another thread for more than {self._timeout:g} s")
        try:
            if not self._depth:
                self._own = self._own or self._open_file()
                self._lock(self._own, deadline)
            self._depth += 1
        except BaseException:
            try:
                # Ctrl-C may come when the lock is ours already: others would wait for as long as this process writes nothing.
                if self._own is not None and not self._depth:
                    self._own.unlock(self._at)
            finally:
                self._threads.release()
            raise

    def _lock(self, own: Presence, deadline: float) -> None:
        nap = NAP_MIN_S
        while True:
            try:
                own.lock(self._at)
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
            if not self._depth and self._own is not None:
                self._own.unlock(self._at)
        finally:
            self._threads.release()


_turns: weakref.WeakSet[Turn] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for turn in list(_turns):
        turn.start_over()


os.register_at_fork(after_in_child=_after_fork_in_child)
