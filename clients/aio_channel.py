"""Requests to the broker from an event loop, by pyzmq's asyncio socket: many under way at once, each reply given to whom its number says. What a reply means is
`correspondence`'s.

One callback reads whatever comes and settles it at once, so that a grant, its hold and the replies around it keep their order; tasks only wait for
what it found. One timer asks whether we are known still, and ends what has waited too long. One task says hello, for all who need it, and no
cancellation of theirs touches it.

A cancelled task leaves its request under way. What comes for it is late and given back; what had come, and the task had not seen, too. So whatever is granted
has a Buffer or Reservation that the caller was given, or is freed.

No hello is sent while a request is under way that the broker might serve: it would list what we hold without what that one is granted, and the broker would free
it. A HelloNeeded says that none is: what was sent before it is lost, and what was sent after it, before the hello, is answered like it.

Belongs to the loop that it was first used in; only `give_up` may be called from elsewhere, by finalizers, in any thread. The lock is for forks in other
threads: a child finds a grant and its hold, or neither. After a fork the child starts over, in the loop that uses it there first.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, cast

import zmq
import zmq.asyncio

from gcma_shm import curve, messages
from gcma_shm._core import scheduler_slice
from gcma_shm.clients.channel import GOODBYE_MS, RECONNECT_MS, SLICE_S, say_goodbye
from gcma_shm.clients.correspondence import BEGIN_AGAIN, HELLO_NEEDED, LOST, ONCE, PROBE_S, Correspondence, kind_of
from gcma_shm.clients.holds import Hold
from gcma_shm.errors import BrokerUnavailable, Closed, GcmaError
from gcma_shm.messages import Frame, Reply, Request

MESSAGES_MAX = 64  # that are read in one turn of the loop; others have theirs then
# What is answered at once is bounded, too: the broker's pipe to us takes four windows of replies, and the broker waits for nobody. Each of these
# has half a window: with all other kinds together that is less.
CONTROL, TOLD = (
    "control",
    "told",
)  # what somebody waits for, and what is told; so the line never waits for those who stand in it
ROOM_MIN = 2
_NOBLOCK = int(zmq.NOBLOCK)

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


class AsyncChannel(Correspondence):
    """The way to one broker, for the tasks of one event loop."""

    def __init__(
        self,
        endpoint: str,
        timeout: float,
        wait_for_broker: float,
        introduce: Callable[[], dict[str, Any]],
        credentials: curve.Credentials | None = None,
    ) -> None:
        super().__init__(endpoint, timeout, wait_for_broker, introduce)
        self._credentials = credentials
        self._begin()

    def _begin(self) -> None:
        self.lock = threading.Lock()
        self._begin_numbers()
        self._hello_number = 0  # of the last hello: a HelloNeeded from before it is old news
        self._pending: dict[int, Pending] = {}  # in the order of their numbers
        self._under_way: dict[str, int] = {}  # of the kinds that are bounded, those that somebody waits for
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}  # and those that wait for room
        self._resent: list[Request] = []  # attaches that wait for a hello to be sent again
        self._last_told: Pending | None = None
        self._greeting_task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heard_at = 0.0
        self._drains = False  # a call of `_drain` is scheduled
        self._parting = False
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- the socket

    def enter(self) -> asyncio.AbstractEventLoop:
        """The running loop, which the channel belongs to from now on. Raises Closed, RuntimeError."""
        if self.closed:
            raise Closed("this client is closed")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._open(loop)
        elif self._loop is not loop:
            raise RuntimeError(
                "this client belongs to another event loop, the one that it was connected in; connect another one in this loop"
            )
        return loop

    def _open(self, loop: asyncio.AbstractEventLoop) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        before = scheduler_slice(SLICE_S)  # for ZeroMQ's thread, as in Channel
        self._plain = self._context.socket(zmq.DEALER)
        scheduler_slice(before)
        self._plain.setsockopt(zmq.LINGER, 0)
        self._plain.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a broker that is not there
        self._plain.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        if self._path is None:
            curve.prepare(self._plain, self.endpoint, self._credentials)
        self._plain.connect(self.endpoint)
        # Over a plain socket: an asyncio socket of its own, collected in a forked child, would take the parent's out of the epoll that
        # both have.
        self._socket = zmq.asyncio.Socket.from_socket(self._plain)
        self._loop = loop
        self._goodbye = weakref.finalize(self, _part, os.getpid(), loop, self._plain, self._context)
        self._goodbye.atexit = False  # the broker sees the process end
        self._listen()

    def _listen(self) -> None:
        """Reads what is there, and asks to be called for what comes next."""
        for _ in range(MESSAGES_MAX):
            coming: Any = self._socket.recv_multipart(copy=False)  # a future, typed as any awaitable
            if not coming.done():
                # Weak: an idle client can be collected.
                coming.add_done_callback(functools.partial(_heard, weakref.ref(self)))
                return
            try:
                self._take(coming.result())
            except BaseException:  # Ctrl-C, say
                self._listen_soon()
                raise
        self._listen_soon()

    def _listen_soon(self) -> None:
        assert self._loop is not None
        self._loop.call_soon(functools.partial(_listen_again, weakref.ref(self)))

    def _take(self, frames: Any) -> None:
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
        self._admit()
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
        request = Request(0, operation, parameters or {}, tuple(pages))
        kind = self._kind(operation)
        await self._room_for(request, kind, deadline)
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
            self._under_way[kind] -= 1
            self._admit()
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
        # With a copy, as in Channel: the caller may write there again once this was given up.
        sending: Any = self._socket.send_multipart(self._encode(request), copy=True)  # a future, typed as any awaitable
        return cast("asyncio.Future[Any]", sending)

    def _abandon(self, one: Pending, sending: asyncio.Future[Any], undo: Callable[[Any], None] | None) -> None:
        """Nobody waits for it any more: cancelled, or its time is over."""
        was_sent = sending.done() and not sending.cancelled() and sending.exception() is None
        sending.cancel()  # what is not sent yet never will be
        self._forget_resent(one.request)
        if self._pending.get(one.request.number) is one:
            del self._pending[one.request.number]
            if was_sent:
                self._give_up([one.request])
        elif isinstance(one.outcome, Reply) and one.outcome.status == "ok" and undo is not None:
            undo(one.taken)  # it had come, between the cancellation and now
            self._schedule()

    async def _until(self, future: asyncio.Future[Any], request: Request, deadline: float) -> None:
        """Raises BrokerUnavailable when it is time. Whoever is cancelled cancels it."""
        try:
            async with asyncio.timeout_at(deadline):
                await future
        except TimeoutError:
            raise self._unavailable(request) from None

    async def _room_for(self, request: Request, kind: str, deadline: float) -> None:
        """Until one more of that kind may be under way; first come, first served."""
        assert self._loop is not None
        line = self._lines.setdefault(kind, deque())
        if not line and self._has_room(kind):
            self._under_way[kind] = self._under_way.get(kind, 0) + 1
            return
        turn: asyncio.Future[None] = self._loop.create_future()
        line.append(turn)
        try:
            await self._until(turn, request, deadline + self._wait_for_broker)
        except BaseException:
            if turn in line:
                line.remove(turn)
            elif not turn.cancelled():  # its turn had come
                self._under_way[kind] -= 1
                self._admit()
            raise

    def _kind(self, operation: str) -> str:
        return kind_of(operation) or CONTROL

    def _room(self, kind: str) -> int:
        if kind not in (CONTROL, TOLD):
            return super()._room(kind)
        bound = max(int(self.greeting["window"]) // 2, ROOM_MIN)
        return bound - sum(other == kind for other in self._given_up.values())

    def _has_room(self, kind: str) -> bool:
        return self._under_way.get(kind, 0) < self._room(kind)

    def _admit(self) -> None:
        for kind, line in self._lines.items():
            while line and (self.closed or self._has_room(kind)):
                turn = line.popleft()
                if not turn.done():
                    self._under_way[kind] = self._under_way.get(kind, 0) + 1
                    turn.set_result(None)

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
        finally:
            self._forget_resent(request)

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
        self._admit()
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
        if not self._greeted or self.closed:
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
        if not self._has_room(TOLD):
            return None
        request = self._make(operation, parameters, ())
        if not self._post(request):
            return None
        then = self._take_late if operation == "collect" else None  # which may have been served
        one = Pending(request, self._loop.time() + self.timeout, then, self._loop.create_future())
        one.sent = True
        one.settled.add_done_callback(self._told)
        self._under_way[TOLD] = self._under_way.get(TOLD, 0) + 1
        self._pending[request.number] = one
        self._watch()
        return one

    def _told(self, _settled: asyncio.Future[None]) -> None:
        self._under_way[TOLD] -= 1
        if self.holds:
            self._schedule()

    def _post(self, request: Request) -> bool:
        """Sends it now or never. (pyzmq's `poll` would tell whether there is room, but then forgets to look what else came.)"""
        sending: Any = self._socket.send_multipart(self._encode(request), _NOBLOCK)
        if not sending.done() or sending.exception() is not None:
            sending.cancel()
            return False
        return True

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
            while self.holds:  # the socket takes nothing
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
        if self._loop is not None:
            say_goodbye(self._plain)
        self.drop(GOODBYE_MS)

    def drop(self, linger_ms: int = 0) -> None:
        """Closes the socket without a word; the broker notices when the process ends. Whoever waits for something is told Closed."""
        with self.lock:
            self.closed = True
        for one in list(self._pending.values()):
            one.fail(Closed("this client is closed"))
        self._pending.clear()
        self._admit()
        if self._timer is not None:
            self._timer.cancel()
        if self._loop is not None and self._goodbye.detach() is not None:
            _close(self._loop, self._plain, self._context, linger_ms)

    def reset(self) -> None:
        """Starts over; in a forked child, where the parent's socket, loop and lock are of no use."""
        if self._loop is not None:
            self._goodbye.detach()
            self._plain.close()  # pyzmq knows that this is not the process that opened it, and touches nothing
            self._context.term()
        self._begin()

    def disown(self) -> None:
        """In a forked child that is no client: nothing of this channel is to be used."""
        self.reset()
        self.closed = True


def _heard(channel: weakref.ref[AsyncChannel], coming: asyncio.Future[Any]) -> None:
    found = channel()
    if found is None or coming.cancelled() or found.closed:
        return
    try:
        found._take(coming.result())
    finally:
        found._listen()


def _listen_again(channel: weakref.ref[AsyncChannel]) -> None:
    found = channel()
    if found is not None and not found.closed:
        found._listen()


def _drain_later(channel: weakref.ref[AsyncChannel]) -> None:
    found = channel()
    if found is not None:
        found._drain()


def _part(
    pid: int, loop: asyncio.AbstractEventLoop, plain: zmq.Socket[bytes], context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    """For a channel that nobody closed and nobody can reach any more; in the loop's thread, if the loop still runs."""
    if os.getpid() != pid:
        return  # forked while it was connecting: the session, the socket and what the loop waits on are the parent's

    def part() -> None:
        say_goodbye(plain)
        _close(loop, plain, context, GOODBYE_MS)

    try:
        loop.call_soon_threadsafe(part)
    except RuntimeError:
        part()


def _close(
    loop: asyncio.AbstractEventLoop, plain: zmq.Socket[bytes], context: zmq.Context[zmq.Socket[bytes]], linger_ms: int
) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.remove_reader(plain.FD)  # which pyzmq's socket has added
    plain.close(linger_ms)
    context.term()
