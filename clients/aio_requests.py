"""Requests to the broker from an event loop: many at once; who waits, and how long; being known. How they and their replies go and come is `aio_exchange`'s,
what is given back `aio_channel`'s.

One task says hello, for all who need it, and no cancellation of theirs touches it.

No hello is sent while a request is under way that the broker might serve: it would list what we hold without what that one is granted, and the broker would free
it. A HelloNeeded says that none is: what was sent before it is lost, and what was sent after it, before the hello, is answered like it.

Nor is a hold ended while an attach is under way: the broker counts no more than one hold of a client, so the end of an older one, sent after the attach, would
end the one that it grants. What is to be given back waits for the attaches under way, and the next attach for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from gcma_shm import messages
from gcma_shm.clients.aio_exchange import Exchange, Pending, Then
from gcma_shm.clients.correspondence import BEGIN_AGAIN, LOST, ONCE, again_after, kind_of
from gcma_shm.errors import Closed
from gcma_shm.messages import Frame, Reply, Request

# What is answered at once is bounded, too: the broker's pipe to us takes four windows of replies, and the broker waits for nobody. Each of these
# has half a window: with all other kinds together that is less. What somebody waits for, and what is told: so the line never waits for those who
# stand in it.
CONTROL, TOLD = "control", "told"
ROOM_MIN = 2
ATTACHES = ("attach", "attach_name")


class Requests(Exchange):
    """Those of one session, for the tasks of one event loop: the one that it was first used in."""

    def _begin(self) -> None:
        super()._begin()
        self._attaches = 0  # of those that somebody waits for
        self._greeting_task: asyncio.Task[None] | None = None

    def _drain(self) -> None:
        """Sends what was given up, and waits for no reply."""
        raise NotImplementedError

    async def settled(self) -> None:
        """Until the broker has done all that was given up so far."""
        raise NotImplementedError

    # --- requests

    async def request(
        self,
        operation: str,
        parameters: dict[str, Any] | None = None,
        pages: Iterable[Frame] = (),
        *,
        patience: float = 0.0,
        then: Then | None = None,
        undo: Callable[[Any], None] | None = None,
    ) -> Any:
        """Sends one request and returns its reply, or `then` of it, made when it comes. `undo` gives back what `then` has made, should
        nobody want it any more.

        `patience`: seconds that the broker may take on top of the timeout. Raises what the broker answers,
        BrokerUnavailable, Closed, RuntimeError in another loop than the first. Cancelled, it waits for nothing.
        """
        loop = self.enter()
        deadline = loop.time() + self.timeout + patience
        latest = deadline + self._wait_for_broker
        await self._greet(deadline)
        if self.holds:
            self._drain()
        attaches = operation in ATTACHES
        if attaches and self.holds:
            await self.settled()
        request = Request(0, operation, parameters or {}, tuple(pages))
        kind = self._kind(operation)
        await self._wait_for_room(request, kind, deadline)
        self._attaches += attaches
        try:
            while True:
                one = Pending(request, self._anew(deadline), latest, then, loop.create_future())
                reply = await self._exchange(one, undo)
                if reply.status not in BEGIN_AGAIN:
                    break
                if operation == "bye":
                    return None  # our session has ended
                if reply.status == LOST and operation in ONCE:
                    raise self._lost(request)
                await self._greet_again(request, deadline)
        finally:
            self._attaches -= attaches
            self._rooms.leave(kind, self._room)
            if attaches and self.holds:
                self._schedule()
        if reply.status != "ok":
            raise messages.reply_error(reply)
        return reply if then is None else one.taken

    async def _wait_for_room(self, request: Request, kind: str, deadline: float) -> None:
        """Until one more of that kind may be under way."""
        try:
            await self._rooms.enter_in_turn(kind, self._room, deadline + self._wait_for_broker)
        except TimeoutError:
            raise self._unavailable(request) from None

    def _kind(self, operation: str) -> str:
        return kind_of(operation) or CONTROL

    def _room(self, kind: str) -> int:
        if kind not in (CONTROL, TOLD):
            return super()._room(kind)
        bound = max(int(self.greeting["window"]) // 2, ROOM_MIN)
        return bound - sum(other == kind for other in self._given_up.values())

    # --- being known

    async def _greet(self, deadline: float) -> None:
        """Until the broker knows us. A hello has the channel's own time; `deadline` ends one hello after the other."""
        while not self._greeted:
            loop = self.enter()
            if self._parting:  # a hello after the bye would begin another session
                raise Closed("this client is about to be closed")
            if self._greeting_task is None:
                self._greeting_task = loop.create_task(self._hello())
                self._greeting_task.add_done_callback(self._has_greeted)
            await asyncio.shield(self._greeting_task)
            if not self._greeted and loop.time() >= deadline + self._wait_for_broker:
                raise self._unavailable(Request(0, "hello", {}))

    async def _greet_again(self, request: Request, deadline: float) -> None:
        """Before a request is sent again."""
        try:
            await self._greet(deadline)
        except BaseException:
            self._take_back(request)
            raise
        finally:
            self._forget_resent(request)

    def _has_greeted(self, task: asyncio.Task[None]) -> None:
        self._greeting_task = None
        if not task.cancelled():
            task.exception()  # those who wait for it, if anybody does, raise it

    async def _hello(self) -> None:
        """Introduces us. What it says is read from the state of this very moment, and accepted where its reply is read."""
        assert self._loop is not None
        deadline = self._loop.time() + self.timeout
        latest = deadline + self._wait_for_broker
        reply = Reply(0, LOST, {})
        while (pause_s := again_after(reply, latest - self._loop.time())) is not None:
            if pause_s:
                await asyncio.sleep(pause_s)
            self._refuse_absent()
            with self.lock:
                self.attaching = [request.parameters for request in self._resent]
                request = Request(0, "hello", self._introduce())
                self.attaching = []
            self._hello_number = self._number + 1
            reply = await self._exchange(
                Pending(
                    request,
                    self._anew(deadline),
                    latest,
                    self._greeted_with,
                    self._loop.create_future(),
                ),
                None,
            )
        if reply.status != "ok":
            raise messages.reply_error(reply)
        self._rooms.admit(self._room)
        if self.holds:
            self._drain()
