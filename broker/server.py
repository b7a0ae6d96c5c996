"""The control loop: one thread, one ROUTER socket, and an epoll of everything else that can happen.

It touches no file and decides nothing: frames go to `Service.request`, replies go out. Answers from worker threads
arrive in a queue, with a pipe to wake the loop. A peer that does not read its replies loses them once its pipe is full;
nobody waits for it.
"""

from __future__ import annotations

import logging
import os
import select
import time
from collections import deque
from typing import cast

import zmq

from gcma_shm import messages
from gcma_shm.broker.service import Peer, Service
from gcma_shm.broker.stop import StopSignals
from gcma_shm.errors import ArenaError
from gcma_shm.messages import Frame, Reply

log = logging.getLogger(__name__)

TICK_S = 1.0
DRAIN_MAX = 64  # requests served before answers, deaths and signals get their turn
FRAMES_MAX = 1 + messages.PAGES_MAX
STOP_S = 5.0  # for one worker to end; four of them and their owner's patience are in clients/embedded.py


class Server:
    """Serves one endpoint until `run` returns."""

    def __init__(self, endpoint: str, page_size: int, stop: StopSignals) -> None:
        self._stop = stop
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a full pipe is told, not passed over in silence
        self._socket.setsockopt(zmq.MAXMSGSIZE, max(page_size, messages.HEADER_BYTES_MAX))
        self._socket.setsockopt(zmq.RCVHWM, 2 * messages.WINDOW)
        # libzmq learns in batches of half of this how much a peer has read, so the rest must hold a window and its
        # refusals.
        self._socket.setsockopt(zmq.SNDHWM, 4 * messages.WINDOW)
        self._answers: deque[tuple[Peer, Reply]] = deque()
        self._epoll = select.epoll()
        self._epoll.register(stop.fd, select.EPOLLIN)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ArenaError(error.errno, f"cannot listen on {endpoint}: {error.strerror}") from None

    def answer(self, peer: Peer, reply: Reply) -> None:
        """Sends a reply, from any thread."""
        self._answers.append((peer, reply))
        self._stop.wake()

    def watch(self, pidfd: int) -> None:
        """Has `Service.client_ended` called when that process ends; a pidfd that is closed leaves by itself."""
        self._epoll.register(pidfd, select.EPOLLIN)

    def run(self, service: Service, owner_pidfd: int = -1) -> str:
        """Serves until a signal or the end of the owner's process; returns the reason."""
        if owner_pidfd >= 0:
            self._epoll.register(owner_pidfd, select.EPOLLIN)
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._epoll.fileno(), zmq.POLLIN)
        ticked = time.monotonic()
        while not self._stop.reason:
            ready = dict(poller.poll(0 if service.busy else int(TICK_S * 1000)))
            if self._socket in ready:
                self._serve(service)
            if self._epoll.fileno() in ready:
                self._other(service, owner_pidfd)
            if service.busy:
                service.advance()
            if time.monotonic() - ticked >= TICK_S:
                service.tick()
                ticked = time.monotonic()
        return self._stop.reason

    def close(self) -> None:
        """Sends what is still to be sent, for a moment, and closes the socket."""
        self._send_answers(None)
        self._socket.close()
        self._context.term()
        self._epoll.close()

    def _serve(self, service: Service) -> None:
        for _ in range(DRAIN_MAX):
            if not cast(int, self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            peer = self._socket.recv()
            frames: list[Frame] = []
            process = ""
            while self._socket.getsockopt(zmq.RCVMORE):
                # A page stays in ZeroMQ's memory until a worker has stored it. Of a message with too many parts one
                # more than allowed is kept, to be refused for it.
                frame = self._socket.recv(copy=False)
                if not frames:
                    process = str(frame.get("Peer-Address"))
                    frames.append(frame.bytes)
                elif len(frames) <= FRAMES_MAX:
                    frames.append(frame.buffer)
            reply = service.request(peer, frames, process)
            if reply is not None:
                self._send(peer, reply)

    def _send(self, peer: bytes, reply: Reply) -> None:
        try:
            self._socket.send_multipart([peer, *messages.encode_reply(reply)], zmq.NOBLOCK, copy=not reply.pages)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            log.debug("a reply is lost: its peer %s", "reads too slowly" if error.errno == zmq.EAGAIN else "is gone")

    def _other(self, service: Service, owner_pidfd: int) -> None:
        for fd, _ in self._epoll.poll(0):
            if fd == self._stop.fd:
                os.read(fd, 4096)
                self._send_answers(service)
            elif fd == owner_pidfd:
                self._stop.reason = "its owner has ended"
            else:
                service.client_ended(fd)

    def _send_answers(self, service: Service | None) -> None:
        while self._answers:
            peer, reply = self._answers.popleft()
            if service is not None:
                service.answered(peer, reply)
            self._send(peer.address, reply)
