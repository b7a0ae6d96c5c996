"""Requests to the broker: one DEALER socket, one reply for each request, every wait bounded.

Safe across threads: a lock lets one thread at a time send and wait. After a fork the child starts over with a socket
of its own.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import zmq

from gcma_shm import messages
from gcma_shm.endpoint import socket_path
from gcma_shm.errors import BrokerUnavailable, Closed
from gcma_shm.messages import Frame, Reply, Request

RECONNECT_MS = 20
# Sockets of the parent, in a child: closing them would send, dropping them would warn, so they rest here until the
# process ends.
_inherited: list[object] = []


class Channel:
    """The way to one broker. `introduce` makes the parameters of a hello; it is said first, and again to whoever asks
    for it.
    """

    def __init__(
        self, endpoint: str, timeout: float, wait_for_broker: float, introduce: Callable[[], dict[str, Any]]
    ) -> None:
        self.endpoint = endpoint
        self.timeout = timeout
        self._wait_for_broker = wait_for_broker
        self._introduce = introduce
        self._path = socket_path(endpoint)
        self.closed = False
        self.greeting: dict[str, Any] = {}
        # Buffers that nobody refers to any more, to be freed with the next request.
        self._given_up: deque[int] = deque()
        self._open()

    def reset(self) -> None:
        """Starts over; in a forked child, where the parent's socket and lock are of no use."""
        _inherited.extend((self._socket, self._context))
        self._open()

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._number = 0
        self._greeted = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a broker that is not there
        self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.setsockopt(zmq.RCVTIMEO, max(int(self.timeout * 1000), 1))
        self._socket.connect(self.endpoint)

    def request(self, operation: str, parameters: dict[str, Any] | None = None, pages: Iterable[Frame] = ()) -> Reply:
        """Sends one request and returns its reply. Raises what the broker answers, BrokerUnavailable, Closed."""
        reply = next(self.requests([(operation, parameters or {}, tuple(pages))]))
        if isinstance(reply, Exception):
            raise reply
        return reply

    def requests(
        self, wanted: Iterable[tuple[str, dict[str, Any], tuple[Frame, ...]]], window: int = 1
    ) -> Iterator[Reply | Exception]:
        """Sends requests, `window` of them ahead of their replies, and yields the replies in order; a refusal as an
        exception, unraised.
        """
        with self._lock:
            if self.closed:
                raise Closed("this client is closed")
            deadline = time.monotonic() + self.timeout
            if not self._greeted:
                self._hello(deadline + self._wait_for_broker)
            self._free_given_up(deadline)
            sent: deque[Request] = deque()
            source = iter(wanted)
            exhausted = False
            while True:
                while not exhausted and len(sent) < window:
                    try:
                        sent.append(self._make(*next(source)))
                    except StopIteration:
                        exhausted = True
                        break
                    self._send(sent[-1], deadline)
                if not sent:
                    return
                reply = self._receive(sent[0], deadline)
                if sent[0].operation == "bye":
                    self._greeted = False
                if (
                    reply.status == "HelloNeeded"
                ):  # the broker does not know this socket (any more); a window is lost with it
                    self._hello(deadline + self._wait_for_broker)
                    for request in sent:
                        self._send(request, deadline)
                    continue
                sent.popleft()
                yield reply if reply.status == "ok" else messages.reply_error(reply)
                deadline = time.monotonic() + self.timeout

    def give_up(self, buffer: int) -> None:
        """Frees a buffer that nobody refers to any more, now or with the next request. For finalizers: takes no lock
        that may be held.
        """
        self._given_up.append(buffer)
        if self._lock.acquire(blocking=False):
            try:
                with contextlib.suppress(BrokerUnavailable):
                    self._free_given_up(time.monotonic() + self.timeout)
            finally:
                self._lock.release()

    def close(self) -> None:
        """Says bye, if the broker still listens, and closes the socket."""
        if self.closed:
            return
        if self._greeted:
            with contextlib.suppress(BrokerUnavailable):
                self.request("bye")
        with self._lock:
            self.closed = True
            self._socket.close()
            self._context.term()

    def _hello(self, deadline: float) -> None:
        if not self._path.exists() and time.monotonic() + self.timeout >= deadline:
            raise BrokerUnavailable(
                f"no broker listens on {self.endpoint}: start one with `gcma broker --endpoint {self.endpoint} --size …`, or use gcma_shm.embedded()"
            )
        request = self._make("hello", self._introduce(), ())
        self._send(request, deadline)
        reply = self._receive(request, deadline)
        if reply.status != "ok":
            raise messages.reply_error(reply)
        self.greeting = reply.results
        self._greeted = True

    def _free_given_up(self, deadline: float) -> None:
        while self._greeted and self._given_up:
            request = self._make("free_contig", {"buffer": self._given_up.popleft()}, ())
            self._send(request, deadline)
            self._receive(request, deadline)

    def _make(self, operation: str, parameters: dict[str, Any], pages: tuple[Frame, ...]) -> Request:
        self._number += 1
        return Request(self._number, operation, parameters, pages)

    def _send(self, request: Request, deadline: float) -> None:
        frames = messages.encode_request(request)
        while True:
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK, copy=not request.pages)
                return
            except zmq.Again:  # not connected, or the broker is far behind
                left_ms = int((deadline - time.monotonic()) * 1000)
                if left_ms <= 0 or not self._socket.poll(left_ms, zmq.POLLOUT):
                    raise self._unavailable(request) from None

    def _receive(self, request: Request, deadline: float) -> Reply:
        while True:
            try:
                frames = self._socket.recv_multipart()  # for `timeout` at the most
            except zmq.Again:
                if time.monotonic() >= deadline:
                    raise self._unavailable(request) from None
                continue
            reply = messages.decode_reply(frames)
            if reply.number == request.number:
                return reply
            if "buffer" in reply.results:  # for a request that was given up after its bound; it must not stay allocated
                self._given_up.append(int(reply.results["buffer"]))

    def _unavailable(self, request: Request) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"no answer from the broker on {self.endpoint} to {request.operation} within {self.timeout:g} s; "
            "is it running, and not stopped?"
        )
