"""Requests to the broker by one DEALER socket, one reply for each request, every wait bounded. What a reply means is `correspondence`'s; here is who waits, and
how long.

Safe across threads: a lock lets one thread at a time send and wait. After a fork the child starts over with a socket of
its own.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import zmq

from gcma_shm import curve, messages
from gcma_shm._core import Trying, scheduler_slice
from gcma_shm.clients.correspondence import (
    BEGIN_AGAIN,
    HELLO_NEEDED,
    LOST,
    ONCE,
    PROBE_S,
    Correspondence,
    Wanted,
    again_after,
    anew,
    kind_of,
)
from gcma_shm.clients.holds import Hold
from gcma_shm.endpoint import is_tcp
from gcma_shm.errors import BrokerUnavailable, Closed, GcmaError
from gcma_shm.messages import Frame, Reply, Request

RECONNECT_MS = 20
WINDOW = 16  # requests that are sent together: of a few bytes, and so are their replies
SLICE_S = 0.0001  # a thread that wakes to pass a reply on need not wait for one that computes
# As plain numbers: to combine two of ZeroMQ's own takes longer than to send.
_NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
GOODBYE_MS = 50  # what a client that is garbage may keep the collector for


T = TypeVar("T")


def dealer(
    endpoint: str, credentials: curve.Credentials | None
) -> tuple[zmq.Context[zmq.Socket[bytes]], zmq.Socket[bytes]]:
    """A socket that is being connected to a broker, and its context."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    before = scheduler_slice(SLICE_S)  # for ZeroMQ's thread, which the first socket starts: somebody waits for it
    socket = context.socket(zmq.DEALER)
    scheduler_slice(before)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a broker that is not there
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    if is_tcp(endpoint):
        curve.prepare(socket, endpoint, credentials)
    socket.connect(endpoint)
    return context, socket


class Channel(Correspondence):
    """The way to one broker, for threads."""

    def _begin(self) -> None:
        self.lock = threading.Lock()
        super()._begin()
        self._is_open = False
        self._away = False  # no broker was there when we last looked

    def reset(self) -> None:
        """Starts over; in a forked child, where the parent's socket and lock are of no use."""
        if self._is_open:
            self._close()  # pyzmq knows that this is not the process that opened it, and touches nothing
            with warnings.catch_warnings():  # nor does it take it for closed, and warns when it is collected: here
                warnings.simplefilter("ignore", ResourceWarning)
                del self._socket, self._context
        self._begin()

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._goodbye.detach()
            self._socket.close()
            self._context.term()

    def _open(self) -> None:
        """With the first request, and so not in a child that is about to become another program: between fork and exec its
        descriptors are closed (subprocess), under the feet of ZeroMQ's thread.
        """
        if self._is_open:
            return
        self._context, self._socket = dealer(self.endpoint, self._credentials)
        self._socket.setsockopt(zmq.RCVTIMEO, max(int(min(self.timeout, PROBE_S) * 1000), 1))
        # Not left to the collector, which may take the context first, and that waits for its sockets.
        self._goodbye = weakref.finalize(self, _part, self._socket, self._context)
        # Not at the interpreter's exit: daemon threads may still store then, and the broker sees the process end.
        self._goodbye.atexit = False
        self._is_open = True

    def request(
        self,
        operation: str,
        parameters: dict[str, Any] | None = None,
        pages: Iterable[Frame] = (),
        *,
        patience: float = 0.0,
        then: Callable[[Reply], Any] | None = None,
    ) -> Any:
        """Sends one request and returns its reply, or `then` of it, made before any other thread's request, or a fork, goes
        on.

        `patience`: seconds that the broker may take on top of the timeout. Raises what the broker answers,
        BrokerUnavailable, Closed.
        """
        refused = False
        try:
            with self.lock:
                reply = self._ask(operation, parameters or {}, tuple(pages), patience)
                if reply is None:
                    return None  # a bye to a broker that does not know us
                if reply.status != "ok":
                    refused = True
                    raise messages.reply_error(reply)
                return reply if then is None else then(reply)
        except GcmaError:
            raise
        except BaseException:
            if refused:  # a ValueError, say
                raise
            # Ctrl-C, say, and whether a reply was lost with it nobody knows. The next request introduces us again, with all that
            # we know to hold; what else was allocated for us is freed by that.
            self._greeted = False
            raise
        finally:
            if self.holds:
                self._drain()

    def _ask(
        self, operation: str, parameters: dict[str, Any], pages: tuple[Frame, ...], patience: float
    ) -> Reply | None:
        """The reply to one request; None: to a bye of nobody. (Not the general case of `requests`, nor steps that a driver takes:
        a generator here costs 1 µs of a ping's 49.)
        """
        deadline = self._prepare(patience)
        request = self._make(operation, parameters, pages)
        if self._given_up:
            self._room_for(request, 1, 0, deadline)
        self._send(request, deadline)
        try:
            reply = self._receive(request, deadline)
            while reply.status in BEGIN_AGAIN:
                if operation == "bye":
                    return None  # our session has ended
                if self._begin_again(deque([request]), reply.status == LOST, deadline):
                    raise self._lost(request)
                reply = self._receive(request, deadline)
        except BaseException:
            self._give_up([request])
            raise
        if operation == "bye":
            self._greeted = False
        return reply

    def requests(self, wanted: Iterable[Wanted], window: int) -> Generator[Reply | Exception]:
        """Sends requests of one kind, `window` of them ahead of their replies, and yields the replies in order; a refusal as an
        exception, unraised, after which it sends no more.
        """
        sent: deque[Request] = deque()
        with self.lock:
            try:
                yield from self._exchange(iter(wanted), sent, window)
            finally:
                self._give_up(sent)
        self._drain()

    def request_together(self, wanted: Sequence[Wanted], then: Callable[[int, Reply], T]) -> list[T]:
        """As `request`, of several of one kind, no more than WINDOW: all are sent before the first reply is waited for. `then` is told which of
        them a reply is to. Raises what the broker answers to one; what was made of others is dropped.
        """
        made: list[T] = []
        refused = False
        assert len(wanted) <= WINDOW
        try:
            with contextlib.closing(self.requests(wanted, WINDOW)) as replies:
                for reply in replies:
                    if isinstance(reply, Exception):
                        refused = True
                        raise reply
                    made.append(then(len(made), reply))
        except BaseException as error:
            made.clear()  # also while the error is looked at
            if not refused and not isinstance(error, GcmaError):
                self._greeted = False  # see `request`
            raise
        finally:
            if self.holds:
                self._drain()
        return made

    def _prepare(self, patience: float) -> float:
        """Before a request: the channel is open, we are introduced, and what was given up is told. Returns the deadline."""
        if self.closed:
            raise Closed("this client is closed")
        if not self._is_open:
            self._open()
        deadline = time.monotonic() + self.timeout + patience
        if self._late:
            self._take_late_replies()
        if not self._greeted:
            self._hello(deadline)
        if self.holds:
            self._flush(deadline)
        return deadline

    def _exchange(self, source: Iterator[Wanted], sent: deque[Request], window: int) -> Iterator[Reply | Exception]:
        deadline = self._prepare(0.0)
        exhausted = False
        while True:
            while not exhausted and len(sent) < window:
                try:
                    request = self._make(*next(source))
                except StopIteration:
                    exhausted = True
                    break
                if self._given_up:
                    window = self._room_for(request, window, len(sent), deadline)
                self._send(request, deadline)
                sent.append(request)
            if not sent:
                return
            reply = self._receive(sent[0], deadline)
            if reply.status in BEGIN_AGAIN:
                if lost := self._begin_again(sent, reply.status == LOST, deadline):
                    yield from map(self._lost, lost)
                    return
                continue
            sent.popleft()
            if reply.status == "ok":
                yield reply
            else:
                exhausted = True
                yield messages.reply_error(reply)
            deadline = time.monotonic() + self.timeout

    def _begin_again(self, sent: deque[Request], may_be_done: bool, deadline: float) -> list[Request]:
        """Introduces us, and sends again what had been sent; or returns it, when it may have been done and is not to be done twice."""
        self.attaching = [request.parameters for request in sent if request.operation == "attach"]
        try:
            self._hello(deadline)
        finally:
            self.attaching = []
        if may_be_done and any(request.operation in ONCE for request in sent):
            lost = list(sent)
            sent.clear()
            return lost
        for request in sent:
            self._send_again(request, deadline)
        return []

    def _room_for(self, request: Request, window: int, sent: int, deadline: float) -> int:
        """How many of this kind may be under way beside those that were given up, and no more than `window`; waits for late replies
        while that is not one more than `sent`. Raises BrokerUnavailable.
        """
        kind = kind_of(request.operation)
        latest = deadline + self._wait_for_broker
        while kind and (room := self._room(kind)) <= sent:
            try:
                self._take_late(self._take())
            except zmq.Again:
                deadline = self._check_time(request, deadline, latest)
        if not self._greeted:  # another broker, as a late reply said
            self._hello(deadline)
        return min(window, room) if kind else window

    def free(self, number: int, claim: int, hold: Hold | None) -> None:
        """Ends a hold of a buffer or reservation, or of our part in a shared claim; the broker is told of the last, and has done
        it when this returns. Should that fail, or be interrupted, it is told later. `hold`: see `give_up`. Raises BrokerUnavailable.
        """
        self.holds.give_up(number, claim, hold)
        with contextlib.suppress(Closed):  # an arena that has ended holds nothing
            with self.lock:
                if self.closed:
                    return
                self._open()
                deadline = time.monotonic() + self.timeout
                self._take_late_replies()
                if not self._greeted:
                    self._hello(deadline)
                last = self._flush(deadline)
                reply = self._receive_flushed(last, deadline) if last is not None else None
                if reply is not None and reply.status in BEGIN_AGAIN:
                    self._hello(deadline)  # what it does not list is freed by that
            self._drain()

    def give_up(self, number: int, claim: int, hold: Hold | None) -> None:
        """Ends a hold that nobody refers to any more, now or with the next request. For finalizers: waits for nobody, and
        raises nothing. `hold`: see `Holds.give_up`.
        """
        if self.closed:
            return
        self.holds.give_up(number, claim, hold)
        self._drain()

    def _drain(self) -> None:
        """Sends what was given up while the lock was held."""
        while self.holds and self._greeted and not self.closed:
            with Trying(self.lock) as got:
                if not got:
                    return  # its holder does this last
                try:
                    self._flush(0.0)
                except (GcmaError, zmq.ZMQError):
                    return  # the broker is far behind, or gone: with the next request

    def _flush(self, deadline: float) -> Request | None:
        """Sends what was given up, and waits for no reply: it says nothing that matters. Returns the last request."""
        last: Request | None = None

        def tell(operation: str, parameters: dict[str, Any]) -> None:
            nonlocal last
            last = self._make(operation, parameters, ())
            self._send(last, deadline)
            self._late += 1

        self.holds.give_back(tell)
        return last

    def part(self) -> None:
        """Nobody waits for another broker from now on, whoever has the lock: where ours is gone, or does not know us, nothing of ours is left."""
        self._wait_for_broker = 0.0
        self._parting = True

    def close(self) -> None:
        """Says bye, if the broker still listens, and closes the socket."""
        self.part()
        # In one piece: a request of another thread that came between the bye and the end would introduce us again.
        with self.lock:
            if self.closed:
                return
            try:
                with contextlib.suppress(GcmaError):
                    if self._greeted:
                        self._ask("bye", {}, (), 0.0)
            finally:
                self.closed = True
                self._close()

    def rest(self) -> None:
        """Closes the socket until the next request, unless one is under way. Waits for nobody."""
        with Trying(self.lock) as got:
            if got:
                self._close()

    def disown(self) -> None:
        """In a forked child that is no client: nothing of this channel is to be used; its lock is held, for ever."""
        if self._is_open:
            self._goodbye.detach()
        self.closed = True
        self.lock = threading.Lock()

    def drop(self) -> None:
        """Closes the socket without a word; the broker notices when the process ends."""
        with self.lock:
            self.closed = True
            self._close()

    def _hello(self, deadline: float) -> None:
        self._greeted = False
        self._refuse_absent()
        request = self._make("hello", self._introduce(), ())
        self._send(request, deadline)
        reply = self._receive_hello(request, deadline)
        while (pause_s := again_after(reply, self._left(deadline))) is not None:
            if pause_s:
                time.sleep(pause_s)
            self._send_again(request, deadline)
            reply = self._receive_hello(request, deadline)
        self._greeted_with(reply)

    def _left(self, deadline: float) -> float:
        """Seconds in which a hello may still be said again; none when this client is about to end."""
        return 0.0 if self._parting else deadline + self._wait_for_broker - time.monotonic()

    def _send_again(self, request: Request, deadline: float) -> None:
        before = self._renumber(request)
        try:
            self._send(request, deadline)
        except BrokerUnavailable:
            request.number = before  # nothing was sent, so nothing under the new one is under way
            raise

    def _send(self, request: Request, deadline: float) -> None:
        header, *pages = self._encode(request)
        while True:
            try:
                if pages:
                    self._socket.send(header, _MORE)
                    # With a copy: else ZeroMQ would send the caller's memory whenever it can, also after this request was given up
                    # and the caller writes there again. And it is faster, but for pages of a megabyte: what is not copied must be
                    # given back by a thread of pyzmq's.
                    self._socket.send(pages[0], _NOBLOCK)
                else:
                    self._socket.send(header, _NOBLOCK)
                return
            except zmq.Again:  # not connected, or the broker is far behind
                if not self._may_send(deadline):
                    raise self._unavailable(request) from None

    def _may_send(self, deadline: float) -> bool:
        """Waits until the socket takes a message. False: not in time, or we are about to end, and nobody is there to hear it."""
        while True:
            left_ms = int((deadline + self._wait_for_broker - time.monotonic()) * 1000)
            if left_ms <= 0 or (self._parting and self._is_deserted()):
                return False
            if self._socket.poll(min(left_ms, int(PROBE_S * 1000)), zmq.POLLOUT):
                return True

    def _receive_flushed(self, request: Request, deadline: float) -> Reply:
        """For what `_flush` sent, and counted as late."""
        reply = self._receive(request, deadline)
        self._late = max(self._late - 1, 0)
        return reply

    def _receive_hello(self, request: Request, deadline: float) -> Reply:
        try:
            return self._receive(request, deadline)
        except BrokerUnavailable:
            self._late += 1
            raise

    def _receive(self, request: Request, deadline: float) -> Reply:
        """The reply; one of status LOST when there will be none, since its broker has gone and another is there."""
        latest = deadline + self._wait_for_broker
        deadline = self._anew(deadline)
        self._away = False
        while True:
            try:
                reply = self._take()
            except zmq.Again:
                deadline = self._check_time(request, deadline, latest)
                continue
            if reply.number == request.number:
                self._read(reply)
                return reply
            self._take_late(reply)
            # Requests are read in order: to one that was sent after ours, ours was lost, or answered, before.
            if reply.status == HELLO_NEEDED and reply.number > request.number:
                return Reply(request.number, LOST, {})

    def _take(self, flags: int = 0) -> Reply:
        """The next reply; raises zmq.Again when none comes within PROBE_S. Its pages stay in ZeroMQ's memory."""
        frame = self._socket.recv(flags, copy=False)
        frames: list[Frame] = [frame.bytes]
        while frame.more:
            frame = self._socket.recv(copy=False)
            frames.append(frame.buffer)
        return messages.decode_reply(frames)

    def _anew(self, deadline: float) -> float:
        """Of what is sent only now, or once more: its time may have passed while no broker was there."""
        return anew(deadline, deadline + self._wait_for_broker, time.monotonic(), self.timeout)

    def _check_time(self, request: Request, deadline: float, latest: float) -> float:
        """While a reply does not come: raises BrokerUnavailable when it is time, else asks whether we are known still. Returns the deadline:
        a later one when a broker is there again, for it has yet to say that; never after `latest`.
        """
        now, connected = time.monotonic(), self._socket.poll(0, zmq.POLLOUT)
        if connected and self._away:
            deadline = anew(deadline, latest, now, self.timeout)
        self._away = not connected
        if now >= (deadline if connected else latest):
            raise self._unavailable(request)
        if self._parting and not connected and self._is_deserted():
            raise self._unavailable(request)
        if connected:
            with contextlib.suppress(zmq.Again):
                probe = self._make("ping", {}, ())
                self._socket.send_multipart(messages.encode_request(probe), zmq.NOBLOCK)
                self._late += 1
        return deadline

    def _take_late_replies(self) -> None:
        """Before the next request: a buffer in a reply that came too late must not stand in its way."""
        while self._late:
            try:
                self._take_late(self._take(_NOBLOCK))
            except zmq.Again:
                return


def _part(socket: zmq.Socket[bytes], context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """For a channel that nobody closed and nobody can reach any more."""
    say_goodbye(socket)
    socket.close(linger=GOODBYE_MS)
    context.term()


def say_goodbye(socket: zmq.Socket[bytes]) -> None:
    """Bye, if the socket takes it, and no word about the reply."""
    with contextlib.suppress(zmq.ZMQError):
        socket.send_multipart(messages.encode_request(Request(messages.NUMBER_MAX, "bye", {})), zmq.NOBLOCK)
