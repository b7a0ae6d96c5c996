"""The way to a broker for the tasks of an event loop: what is given back, and the end. How requests come to be sent is `aio_requests`'s, how they go and
come `aio_exchange`'s.

Belongs to the loop that it was first used in; only `give_up` and `leave` may be called from elsewhere, by finalizers, in any thread. The lock is for forks in other
threads: a child finds a grant and its hold, or neither. After a fork the child starts over, in the loop that uses it there first.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import weakref
from typing import Any

from gcma_shm.clients.aio_exchange import Pending
from gcma_shm.clients.aio_requests import TOLD, Requests
from gcma_shm.clients.channel import GOODBYE_MS
from gcma_shm.clients.correspondence import BEGIN_AGAIN
from gcma_shm.clients.holds import Hold
from gcma_shm.errors import BrokerUnavailable, Closed, GcmaError


class AsyncChannel(Requests):
    """The way to one broker, for the tasks of one event loop."""

    def _begin(self) -> None:
        super()._begin()
        self._last_told: Pending | None = None
        self._drains = False  # a call of `_drain` is scheduled

    # --- what is given back

    def give_up(self, number: int, claim: int, hold: Hold | None) -> None:
        """Ends a hold that nobody refers to any more, soon, or with the next request. For finalizers in any thread: waits for
        nobody, and raises nothing. `hold`: see `Holds.give_up`.
        """
        if self.closed:
            return
        self.holds.give_up(number, claim, hold)
        self._schedule()

    def leave(self, ticket: int) -> None:
        """Leaves the line, and gives back what was served there meanwhile; waits for nobody."""
        self.holds.leave(ticket)
        self._schedule()

    def _schedule(self) -> None:
        """Not at once: a finalizer may run in the middle of anything. The loop may be closed: then with the process's end."""
        if self._loop is None or self._drains:
            return
        with contextlib.suppress(RuntimeError):
            self._drains = True
            self._loop.call_soon_threadsafe(functools.partial(_drain_later, weakref.ref(self)))

    def _drain(self) -> None:
        """Sends what was given up, and waits for no reply."""
        self._drains = False
        if not self._greeted or self.closed or self._attaches:
            return

        def tell(operation: str, parameters: dict[str, Any]) -> None:
            told = self._tell(operation, parameters)
            if told is None:
                raise BrokerUnavailable
            self._last_told = told

        # Not taken by the socket: with the next request.
        with self.lock, contextlib.suppress(BrokerUnavailable):
            self.holds.give_back(tell)

    def _tell(self, operation: str, parameters: dict[str, Any]) -> Pending | None:
        """Sends something whose reply says nothing that matters; None: there is no room, or the socket does not take it."""
        assert self._loop is not None
        if not self._rooms.has(TOLD, self._room):
            return None
        request = self._make(operation, parameters, ())
        if not self._post(request):
            return None
        then = self._take_late if operation == "collect" else None  # which may have been served
        deadline = self._loop.time() + self.timeout
        one = Pending(request, deadline, deadline + self._wait_for_broker, then, self._loop.create_future())
        one.sent = True
        one.settled.add_done_callback(self._told)
        self._rooms.enter(TOLD)
        self._pending[request.number] = one
        self._watch()
        return one

    def _told(self, _settled: asyncio.Future[None]) -> None:
        self._rooms.leave(TOLD, self._room)
        if self.holds:
            self._schedule()

    async def free(self, number: int, claim: int, hold: Hold | None) -> None:
        """Ends a hold of a buffer or reservation, or of our part in a shared claim; the broker is told of the last, and has done
        it when this returns. Should that fail, or be cancelled, it is told all the same. `hold`: see `give_up`. Raises BrokerUnavailable.
        """
        if self.closed:
            return  # an arena that has ended, or a client, holds nothing
        self.holds.give_up(number, claim, hold)
        await self.settled()

    async def settled(self) -> None:
        """Until the broker has done all that was given up so far."""
        with contextlib.suppress(Closed):
            loop = self.enter()
            await self._greet(loop.time() + self.timeout)
            self._drain()
            while self.holds:  # the socket takes nothing, or an attach is under way
                await self.request("ping")
                self._drain()
            last = self._last_told
            if last is None:
                return
            await asyncio.shield(last.settled)  # replies of this kind come in order
            if self._last_told is last:
                self._last_told = None
            if isinstance(last.outcome, BaseException):
                raise last.outcome
            if last.outcome is not None and last.outcome.status in BEGIN_AGAIN:
                await self._greet(loop.time() + self.timeout)  # what the hello does not list is freed by it

    # --- the end

    async def close(self) -> None:
        """Says bye, if the broker still listens, and closes the socket."""
        if self.closed:
            return
        self._wait_for_broker = 0.0
        self._parting = True
        try:
            with contextlib.suppress(GcmaError):
                if self._greeted:
                    await self.request("bye")
        finally:
            if self._greeting_task is None:
                self.drop()
            else:
                self.part()

    def part(self) -> None:
        """Says bye, waits for no reply, and closes the socket. Also after a hello whose reply has not come: it begins a session all the same."""
        if self._socket is not None:
            self._socket.say_goodbye()
        self.drop(GOODBYE_MS)

    def drop(self, linger_ms: int = 0) -> None:
        """Closes the socket without a word; the broker notices when the process ends. Whoever waits for something is told Closed."""
        with self.lock:
            self.closed = True
        for one in list(self._pending.values()):
            one.fail(Closed("this client is closed"))
        self._pending.clear()
        self._rooms.break_up()
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            self._socket.close(linger_ms)

    def rest(self) -> None:
        """At the interpreter's exit: closes the socket, unless its loop still runs, in a daemon thread. Waits for nobody."""
        if self._socket is not None and self._loop is not None and not self._loop.is_running():
            self._socket.close()

    def reset(self) -> None:
        """Starts over; in a forked child, where the parent's socket, loop and lock are of no use."""
        if self._socket is not None:
            self._socket.forget()
        self._begin()

    def disown(self) -> None:
        """In a forked child that is no client: nothing of this channel is to be used."""
        self.reset()
        self.closed = True


def _drain_later(channel: weakref.ref[AsyncChannel]) -> None:
    found = channel()
    if found is not None:
        found._drain()
