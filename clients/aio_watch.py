"""Tasks that wait until the broker has woken their client: one thread sleeps on the client's word in the arena for all of them, while there are any.

A futex is nothing that an event loop can wait for. Asking the broker now and then instead would cost either time or requests; a reply that comes late,
a second way to be served, beside the one that clients of all kinds have.

No wake is lost: a task is noted before it looks at the word a last time, and the thread tells of each value of the word before it sleeps on that.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import weakref

from gcma_shm._core import Plane
from gcma_shm.errors import Closed

SLEEP_S = 1.0  # of the thread, at a time: a client that is forgotten keeps it no longer


class Watch:
    """For the tasks of one loop."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._loop = asyncio.get_running_loop()
        self._lock = (
            threading.Lock()
        )  # of the next two: the thread ends when nobody waits, and nobody may begin to wait just then
        self._waiting: dict[asyncio.Future[None], int] = {}  # and how many wakes each has seen
        self._runs = False

    async def wait(self, seen: int, seconds: float) -> None:
        """Until the client was woken more than `seen` times, or so many seconds. Raises Closed."""
        woken: asyncio.Future[None] = self._loop.create_future()
        with self._lock:
            self._waiting[woken] = seen
            begins = not self._runs
            self._runs = True
        try:
            if begins:
                self._begin()
            if self._plane.wake_count() == seen and not self._plane.closed:
                await asyncio.wait((woken,), timeout=max(seconds, 0.0))
            if self._plane.closed:  # also when `close` has not succeeded: what is granted now nobody could use
                raise Closed("this client is closed")
        finally:
            with self._lock:
                del self._waiting[woken]

    def _begin(self) -> None:
        arguments = (self._plane, self._loop, weakref.ref(self))
        try:
            threading.Thread(target=_sleep, args=arguments, name="gcma-wake", daemon=True).start()
        except BaseException:  # no more threads may be had just now: who waits next tries again
            with self._lock:
                self._runs = False
            raise

    def end(self) -> None:
        """The client is about to be closed: all wake up, and the thread ends."""
        for woken in self._waiting:
            if not woken.done():
                woken.set_result(None)
        self._plane.wake(self._plane.number)

    def _tell(self) -> None:
        count = self._plane.wake_count()
        for woken, seen in self._waiting.items():
            if seen != count and not woken.done():
                woken.set_result(None)

    def _is_over(self) -> bool:
        with self._lock:
            self._runs = bool(self._waiting) and not self._plane.closed
            return not self._runs


def _sleep(plane: Plane, loop: asyncio.AbstractEventLoop, watch: weakref.ref[Watch]) -> None:
    """The thread."""
    told = -1
    while True:
        seen = plane.wake_count()
        if seen != told:
            told = seen
            try:
                loop.call_soon_threadsafe(functools.partial(_tell, watch))
            except RuntimeError:  # the loop is closed: nobody waits there any more
                return
        plane.wait(seen, SLEEP_S)
        found = watch()
        if found is None or found._is_over():
            return
        del found


def _tell(watch: weakref.ref[Watch]) -> None:
    found = watch()
    if found is not None:
        found._tell()
