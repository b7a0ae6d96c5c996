"""What is under way between an event loop and its broker: each reply is given to whom its number says, and whatever comes is settled at once. Who may ask,
and how often, is `aio_requests`'s; what a reply means `correspondence`'s, how frames come and go `aio_socket`'s.

One callback reads whatever comes and settles it, so that a grant, its hold and the replies around it keep their order; tasks only wait for what it
found. One timer asks whether we are known still, and ends what has waited too long.

A cancelled task leaves its request under way. What comes for it is late and given back; what had come, and the task had not seen, too. So whatever is granted
has a Buffer or Reservation that the caller was given, or is freed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from gcma_shm import messages
from gcma_shm.clients.aio_rooms import Rooms
from gcma_shm.clients.aio_socket import AsyncSocket
from gcma_shm.clients.correspondence import BEGIN_AGAIN, HELLO_NEEDED, LOST, PROBE_S, Correspondence, anew
from gcma_shm.errors import Closed, GcmaError
from gcma_shm.messages import Reply, Request

Then = Callable[[Reply], Any]


class Pending:
    """One request on its way. `then` makes `taken` of its reply, as soon as that comes; `outcome` is the reply, or an error."""

    __slots__ = ("deadline", "latest", "outcome", "request", "sent", "settled", "taken", "then")

    def __init__(
        self, request: Request, deadline: float, latest: float, then: Then | None, settled: asyncio.Future[None]
    ) -> None:
        self.request = request
        self.deadline = deadline
        self.latest = latest  # what no absence of a broker puts the deadline beyond
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


class Exchange(Correspondence):
    """Of one session, with the tasks of one event loop: the one that it was first used in."""

    def _begin(self) -> None:
        self.lock = threading.Lock()
        super()._begin()
        self._hello_number = 0  # of the last hello: a HelloNeeded from before it is old news
        self._pending: dict[int, Pending] = {}  # in the order of their numbers
        self._rooms = Rooms()
        self._resent: list[Request] = []  # attaches that wait for a hello to be sent again
        self._timer: asyncio.TimerHandle | None = None
        self._heard_at = 0.0
        self._away = False  # no broker was there when we last looked
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket: AsyncSocket | None = None

    def _schedule(self) -> None:
        """Does that soon. For any thread, at any moment."""
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

    # --- what goes

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
        return anew(deadline, deadline + self._wait_for_broker, self._loop.time(), self.timeout)

    async def _wait_to_send(self, one: Pending, sending: asyncio.Future[Any]) -> None:
        assert self._loop is not None
        left = one.latest - self._loop.time()
        await asyncio.wait((sending, one.settled), timeout=max(left, 0.0), return_when=asyncio.FIRST_COMPLETED)
        if not sending.done() and not one.settled.done():
            raise self._unavailable(one.request)
        one.deadline = anew(one.deadline, one.latest, self._loop.time(), self.timeout)

    def _dispatch(self, one: Pending) -> asyncio.Future[Any]:
        """Gives it its number and sends it; pyzmq sends in order what it could not send at once."""
        assert self._loop is not None
        if self.closed:  # while its task waited, or was about to go on
            raise Closed("this client is closed")
        request = one.request
        self._renumber(request)
        frames = self._encode(request)
        self._pending[request.number] = one
        self._watch()
        assert self._socket is not None
        return self._socket.send(frames)

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

    def _take_back(self, request: Request) -> None:
        """It is not sent again, and a hello may have told that we hold what it asks for."""
        if request.operation == "attach":
            self.holds.give_up(request.parameters["buffer"], request.parameters.get("claim", 0), None)
            self._schedule()

    def _forget_resent(self, request: Request) -> None:
        self._resent = [other for other in self._resent if other is not request]

    # --- while anything is under way

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
        sent = [one for one in self._pending.values() if one.sent]
        connected = True
        if now - self._heard_at >= self._interval or any(now >= one.deadline for one in sent):
            connected = self._post(self._make("ping", {}, ()))  # whose reply nobody waits for
        if connected and self._away:  # a broker is there again: it has yet to say whether it knows us
            for one in sent:
                one.deadline = anew(one.deadline, one.latest, now, self.timeout)
        self._away = not connected
        if self._parting and not connected and self._is_deserted():
            for one in list(self._pending.values()):
                one.fail(self._unavailable(one.request))
        for one in sent:
            if now >= (one.deadline if connected else one.latest):
                self._pending.pop(one.request.number, None)
                self._give_up([one.request])
                one.fail(self._unavailable(one.request))
        self._watch()

    def _post(self, request: Request) -> bool:
        """Sends it now or never."""
        return self._socket is not None and self._socket.post(self._encode(request))
