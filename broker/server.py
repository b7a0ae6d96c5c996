"""The control loop: one thread, one ROUTER socket, and an epoll of everything else that can happen.

It touches no file and decides nothing: frames go to `Service.request`, replies go out. Answers from worker threads
arrive in a queue, with a pipe to wake the loop. A peer that does not read its replies loses them once its pipe is
full; nobody waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
from collections import deque
from collections.abc import Iterator
from typing import cast

import zmq

from gcma_shm import messages
from gcma_shm.broker.service import Service
from gcma_shm.messages import Frame, Reply

log = logging.getLogger(__name__)

TICK_MS = 1000
DRAIN_MAX = 64  # requests served before answers, deaths and signals get their turn
STOP_S = 10.0


class Server:
    """Serves one endpoint until `run` returns."""

    def __init__(self, endpoint: str, page_size: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a full pipe is told, not passed over in silence
        self._socket.setsockopt(zmq.MAXMSGSIZE, max(page_size, messages.HEADER_BYTES_MAX))
        self._socket.setsockopt(zmq.RCVHWM, 2 * messages.WINDOW)
        # libzmq learns in batches of half of this how much a peer has read, so the rest must hold a window and its refusals.
        self._socket.setsockopt(zmq.SNDHWM, 4 * messages.WINDOW)
        self._answers: deque[tuple[bytes, Reply]] = deque()
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._woken, select.EPOLLIN)
        self._watched: set[int] = set()
        self._stopping = ""
        self._socket.bind(endpoint)
        log.debug("bound %s", endpoint)

    def answer(self, peer: bytes, reply: Reply) -> None:
        """Sends a reply, from any thread."""
        self._answers.append((peer, reply))
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._wake, b"\0")

    def run(self, service: Service, owner_pidfd: int = -1) -> str:
        """Serves until SIGTERM, SIGINT, or the end of the owner's process; returns the reason."""
        if owner_pidfd >= 0:
            self._epoll.register(owner_pidfd, select.EPOLLIN)
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._epoll.fileno(), zmq.POLLIN)
        with self._signals():
            while not self._stopping:
                ready = dict(poller.poll(TICK_MS))
                if not ready:
                    service.tick()
                if self._socket in ready:
                    self._serve(service)
                if self._epoll.fileno() in ready:
                    self._other(service, owner_pidfd)
                self._watch(service)
        return self._stopping

    def close(self) -> None:
        """Sends what is still to be sent, for a moment, and closes the socket."""
        self._send_answers(None)
        self._socket.close()
        self._context.term()
        self._epoll.close()
        os.close(self._woken)
        os.close(self._wake)

    def _serve(self, service: Service) -> None:
        for _ in range(DRAIN_MAX):
            if not cast(int, self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            peer = self._socket.recv()
            frames: list[Frame] = []
            while self._socket.getsockopt(zmq.RCVMORE):
                # A header is small and read at once; a page stays in ZeroMQ's memory until a worker has stored it.
                frames.append(self._socket.recv(copy=False).buffer if frames else self._socket.recv())
            reply = service.request(peer, frames)
            if reply is not None:
                self._send(peer, reply)

    def _send(self, peer: bytes, reply: Reply) -> None:
        try:
            self._socket.send_multipart([peer, *messages.encode_reply(reply)], zmq.NOBLOCK, copy=not reply.pages)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            log.warning("a reply is lost: its peer %s", "reads too slowly" if error.errno == zmq.EAGAIN else "is gone")

    def _other(self, service: Service, owner_pidfd: int) -> None:
        for fd, _ in self._epoll.poll(0):
            if fd == self._woken:
                os.read(fd, 4096)
                self._send_answers(service)
            elif fd == owner_pidfd:
                self._stopping = "its owner has ended"
            elif fd in self._watched:
                service.client_ended(fd)

    def _send_answers(self, service: Service | None) -> None:
        while self._answers:
            peer, reply = self._answers.popleft()
            if service is not None:
                service.answered(peer)
            self._send(peer, reply)

    def _watch(self, service: Service) -> None:
        """Has epoll follow the set of pidfds. A closed pidfd left epoll by itself."""
        current = service.sessions.by_pidfd.keys()
        if current == self._watched:
            return
        for fd in current - self._watched:
            self._epoll.register(fd, select.EPOLLIN)
        self._watched = set(current)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the loop; the signal's arrival wakes the poll through the pipe."""

        def stop(number: int, _frame: object) -> None:
            self._stopping = signal.Signals(number).name

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        wakeup = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
