"""Requests to the broker from an event loop: many under way at once, each reply given to whom its number says; who waits, and how long; being known. What a
reply means is `correspondence`'s, how frames come and go `aio_socket`'s, what is given back `aio_channel`'s.

One callback reads whatever comes and settles it at once, so that a grant, its hold and the replies around it keep their order; tasks only wait for
what it found. One timer asks whether we are known still, and ends what has waited too long. One task says hello, for all who need it, and no
cancellation of theirs touches it.

A cancelled task leaves its request under way. What comes for it is late and given back; what had come, and the task had not seen, too. So whatever is granted
has a Buffer or Reservation that the caller was given, or is freed.

No hello is sent while a request is under way that the broker might serve: it would list what we hold without what that one is granted, and the broker would free
it. A HelloNeeded says that none is: what was sent before it is lost, and what was sent after it, before the hello, is answered like it.

Nor is a hold ended while an attach is under way: the broker counts no more than one hold of a client, so the end of an older one, sent after the attach, would
end the one that it grants. What is to be given back waits for the attaches under way, and the next attach for that.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from typing import Any

from gcma_shm import messages
from gcma_shm.clients.aio_rooms import Rooms
from gcma_shm.clients.aio_socket import AsyncSocket
from gcma_shm.clients.correspondence import BEGIN_AGAIN, HELLO_NEEDED, LOST, ONCE, PROBE_S, Correspondence, kind_of
from gcma_shm.errors import Closed, GcmaError
from gcma_shm.messages import Frame, Reply, Request

# What is answered at once is bounded, too: the broker's pipe to us takes four windows of replies, and the broker waits for nobody. Each of these
# has half a window: with all other kinds together that is less. What somebody waits for, and what is told: so the line never waits for those who
# stand in it.
CONTROL, TOLD = "control", "told"
ROOM_MIN = 2
ATTACHES = ("attach", "attach_name")

Then = Callable[[Reply], Any]


class Pending:
    """One request on its way. `then` makes `taken` of its reply, as soon as that comes; `outcome` is the reply, or an error."""

    __slots__ = ("deadline", "outcome", "request", "sent", "settled", "taken", "then")

    def __init__(self, request: Request, deadline: float, then: Then | None, settled: asyncio.Future[None]) -> None:
        self.request = request
        self.deadline = deadline
        self.then = then
        self.settled = settled
        self.sent = False
        self.outcome: Reply | BaseException | None = None
        self.taken: Any = None

    def settle(self, reply: Reply) -> None:
        """Its reply has come, and somebody waits for it."""
        self.outcome = reply
        if reply.status == "ok" and self.then is not None:
            try:
                self.taken = self.then(reply)
            except Exception as error:  # the client was closed meanwhile, say
                self.outcome = error
        self.settled.set_result(None)

    def fail(self, error: BaseException) -> None:
        """None will come."""
        self.outcome = error
        if not self.settled.done():
            self.settled.set_result(None)


class Requests(Correspondence):
    """Those of one session, for the tasks of one event loop: the one that it was first used in."""

    def _begin(self) -> None:
        self.lock = threading.Lock()
        super()._begin()
        self._hello_number = 0  # of the last hello: a HelloNeeded from before it is old news
        self._pending: dict[int, Pending] = {}  # in the order of their numbers
        self._rooms = Rooms()
        self._attaches = 0  # of those that somebody waits for
        self._resent: list[Request] = []  # attaches that wait for a hello to be sent again
        self._greeting_task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heard_at = 0.0
        self._parting = False  # a bye was said, or is about to be
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket: AsyncSocket | None = None

    def _drain(self) -> None:
        """Sends what was given up, and waits for no reply."""
        raise NotImplementedError

    def _schedule(self) -> None:
        """Does that soon. For any thread, at any moment."""
        raise NotImplementedError

    async def settled(self) -> None:
        """Until the broker has done all that was given up so far."""
        raise NotImplementedError

    # --- what comes

    def enter(self) -> asyncio.AbstractEventLoop:
        """The running loop, which the channel belongs to from now on. Raises Closed, RuntimeError."""
        if self.closed:
            raise Closed("this client is closed")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._socket = AsyncSocket(loop, self.endpoint, self._credentials, self)
        elif self._loop is not loop:
            raise RuntimeError(
                "this client belongs to another event loop, the one that it was connected in; connect another one in this loop"
            )
        return loop

    def take(self, frames: Any) -> None:
        """One message. Should something break in here, Ctrl-C say, nobody knows whose reply is lost: all is begun again, and the hello
        takes back what else was granted.
        """
        assert self._loop is not None
        self._heard_at = self._loop.time()
        try:
            reply = messages.decode_reply([frames[0].bytes, *(frame.buffer for frame in frames[1:])])
            with self.lock:
                self._settle(reply)
        except BaseException as error:
            self._greeted = False
            for one in list(self._pending.values()):
                self._conclude(one, Reply(one.request.number, LOST, {}))
            if not isinstance(error, GcmaError):  # a message that is none
                raise
        self._rooms.admit(self._room)
        if self.holds:
            self._schedule()

    def _settle(self, reply: Reply) -> None:
        one = self._pending.get(reply.number)
        if one is None or one.settled.done():  # cancelled, and its task has not come to say so
            self._pending.pop(reply.number, None)
            greeted = self._greeted
            self._take_late(reply)
            self._greeted = greeted
        else:
            self._read(reply)
            self._conclude(one, reply)
        if reply.status == HELLO_NEEDED:
            if reply.number > self._hello_number:
                self._greeted = False
            # Requests are read in order: those that were sent before this one were answered, or are lost.
            for number in [number for number in self._pending if number < reply.number]:
                self._conclude(self._pending[number], Reply(number, LOST, {}))

    def _conclude(self, one: Pending, reply: Reply) -> None:
        if not one.settled.done():
            if reply.status in BEGIN_AGAIN and one.request.operation == "attach":
                self._resent.append(one.request)  # it may have been served: the next hello is to say that we hold it
            one.settle(reply)
            if one.outcome is not reply:  # nobody has taken what it grants
                self._take_late(reply)
        self._pending.pop(one.request.number, None)

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
                one = Pending(request, self._anew(deadline), then, loop.create_future())
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

    async def _exchange(self, one: Pending, undo: Callable[[Any], None] | None) -> Reply:
        sending = self._dispatch(one)
        try:
            if not sending.done():  # not connected, or the broker is far behind
                await self._wait_to_send(one, sending)
            if not one.settled.done():
                sending.result()
                one.sent = True
                await one.settled
        except BaseException:
            self._abandon(one, sending, undo)
            raise
        if isinstance(one.outcome, Reply):
            return one.outcome
        assert one.outcome is not None
        raise one.outcome

    def _anew(self, deadline: float) -> float:
        """Of what is sent only now, or once more: its time may have passed while no broker was there."""
        assert self._loop is not None
        return max(deadline, min(self._loop.time() + self.timeout, deadline + self._wait_for_broker))

    async def _wait_to_send(self, one: Pending, sending: asyncio.Future[Any]) -> None:
        assert self._loop is not None
        left = one.deadline + self._wait_for_broker - self._loop.time()
        await asyncio.wait((sending, one.settled), timeout=max(left, 0.0), return_when=asyncio.FIRST_COMPLETED)
        if not sending.done() and not one.settled.done():
            raise self._unavailable(one.request)
        one.deadline = self._anew(one.deadline)

    def _dispatch(self, one: Pending) -> asyncio.Future[Any]:
        """Gives it its number and sends it; pyzmq sends in order what it could not send at once."""
        assert self._loop is not None
        if self.closed:  # while its task waited, or was about to go on
            raise Closed("this client is closed")
        request = one.request
        self._renumber(request)
        self._pending[request.number] = one
        self._watch()
        assert self._socket is not None
        return self._socket.send(self._encode(request))

    def _abandon(self, one: Pending, sending: asyncio.Future[Any], undo: Callable[[Any], None] | None) -> None:
        """Nobody waits for it any more: cancelled, or its time is over."""
        was_sent = sending.done() and not sending.cancelled() and sending.exception() is None
        sending.cancel()  # what is not sent yet never will be
        self._forget_resent(one.request)
        if self._pending.get(one.request.number) is one:
            del self._pending[one.request.number]
            if was_sent:
                self._give_up([one.request])
            else:
                self._take_back(one.request)
        elif isinstance(one.outcome, Reply) and one.outcome.status == "ok" and undo is not None:
            undo(one.taken)  # it had come, between the cancellation and now
            self._schedule()

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

    def _take_back(self, request: Request) -> None:
        """It is not sent again, and a hello may have told that we hold what it asks for."""
        if request.operation == "attach":
            self.holds.give_up(request.parameters["buffer"], request.parameters.get("claim", 0), None)
            self._schedule()

    def _forget_resent(self, request: Request) -> None:
        self._resent = [other for other in self._resent if other is not request]

    def _has_greeted(self, task: asyncio.Task[None]) -> None:
        self._greeting_task = None
        if not task.cancelled():
            task.exception()  # those who wait for it, if anybody does, raise it

    async def _hello(self) -> None:
        """Introduces us. What it says is read from the state of this very moment, and accepted where its reply is read."""
        assert self._loop is not None
        deadline = self._loop.time() + self.timeout
        reply = Reply(0, LOST, {})
        while reply.status == LOST:  # one broker after the other
            self._refuse_absent()
            with self.lock:
                self.attaching = [request.parameters for request in self._resent]
                request = Request(0, "hello", self._introduce())
                self.attaching = []
            self._hello_number = self._number + 1
            reply = await self._exchange(
                Pending(request, deadline, self._greeted_with, self._loop.create_future()), None
            )
        if reply.status != "ok":
            raise messages.reply_error(reply)
        self._rooms.admit(self._room)
        if self.holds:
            self._drain()

    @property
    def _interval(self) -> float:
        return max(min(self.timeout, PROBE_S), 0.001)

    def _watch(self) -> None:
        if self._timer is None:
            assert self._loop is not None
            self._timer = self._loop.call_later(self._interval, self._tick)

    def _tick(self) -> None:
        """While anything is under way: ends what has waited too long; where nothing is heard, asks whether we are known still."""
        self._timer = None
        if not self._pending or self.closed:
            return
        assert self._loop is not None
        now = self._loop.time()
        overdue = [one for one in self._pending.values() if one.sent and now >= one.deadline]
        connected = True
        if overdue or now - self._heard_at >= self._interval:
            connected = self._post(self._make("ping", {}, ()))  # whose reply nobody waits for
        for one in overdue:
            if connected or now >= one.deadline + self._wait_for_broker:
                self._pending.pop(one.request.number, None)
                self._give_up([one.request])
                one.fail(self._unavailable(one.request))
        self._watch()

    def _post(self, request: Request) -> bool:
        """Sends it now or never."""
        return self._socket is not None and self._socket.post(self._encode(request))
