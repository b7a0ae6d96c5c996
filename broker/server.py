"""The control loop: one thread, one socket, and an epoll of everything that can happen.

It touches no file and decides nothing: frames go to `Service.request`, replies go out. Answers from worker threads
arrive in a queue, with a pipe to wake the loop. A peer that does not read its replies loses them once its pipe is full;
nobody waits for it. Connections that are too many are ended, and those that make the process grow beyond its bound.
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
from gcma_shm.broker.connections import Connections
from gcma_shm.broker.door import CHANGES_MAX, Door
from gcma_shm.broker.growth import give_back, growth_max, private_bytes
from gcma_shm.broker.service import Peer, Service
from gcma_shm.broker.stop import StopSignals
from gcma_shm.messages import Reply

log = logging.getLogger(__name__)

TICK_S = 1.0
LOOK_S = (
    0.1  # at the process's own size: what a message of endless frames adds in between is what ZeroMQ reads in that time
)
RETURNING_TICKS = 5  # in which memory goes back to the system after connections were ended
EVENTS_MAX = 64  # deaths, signals and the like that one turn of the loop looks at
CATCH_UP_MAX = (
    8  # times CHANGES_MAX connections that may come and go between two messages, and not be mistaken for others
)
DRAIN_MAX = 64  # requests served before answers, deaths and signals get their turn
COPY_BYTES = 128 << 10  # of a page frame; longer ones are not copied for ZeroMQ
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
_NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
STOP_S = 5.0  # for one worker to end; four of them and their owner's patience are in clients/embedded.py


class Server:
    """Serves one door until `run` returns."""

    def __init__(self, door: Door, stop: StopSignals, page_size: int) -> None:
        self._stop = stop
        self._door = door
        self._socket = door.socket
        self._page_size = page_size
        self._sessions = 0  # at the last look
        self._growth_max = growth_max(page_size, 0)  # bytes that the process may have grown by
        self._size_at_start = private_bytes()
        self._crowded = False  # whether connections may have come or gone of which we took no notice yet
        self._looked = 0.0
        self._looks = 0  # in a row, that found the process too large
        self._ended = self._returning = 0
        self._answers: deque[tuple[Peer, Reply]] = deque()
        self._epoll = select.epoll()
        self._epoll.register(stop.fd, select.EPOLLIN)

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
        connections = Connections(self._door.connections_max, service.sessions.has_session)
        socket_fd, monitor_fd = _fd(self._socket), _fd(self._door.monitor)
        for fd in (socket_fd, monitor_fd):
            self._epoll.register(fd, select.EPOLLIN)
        ticked = time.monotonic()
        # ZeroMQ's descriptors tell once that there is something, and of nothing that is left: what else there is must be asked for
        # before the next wait, and after whatever was done with the socket. (Its own Poller asks for everything each time.)
        more = self._crowded = True
        while not self._stop.reason:
            for fd, _ in self._epoll.poll(0 if more or self._crowded or service.busy else LOOK_S, EVENTS_MAX):
                if fd == socket_fd:
                    more = True
                elif fd == monitor_fd:
                    self._crowded = True
                else:
                    self._other(fd, service, owner_pidfd)
                    more = more or _has_more(self._socket)  # to send answers takes notice of what has come
            if self._crowded:
                self._count(connections, service)
            if more:
                more = self._serve(connections, service)
            if service.busy:
                service.advance()
            now = time.monotonic()
            if now - self._looked >= LOOK_S:
                self._looked = now
                self._look(connections, len(service.sessions))
            if now - ticked >= TICK_S:
                service.tick()
                ticked = now
                self._tell_ended(connections.connections_max)
        return self._stop.reason

    def _tell_ended(self, connections_max: int) -> None:
        if self._ended:
            log.warning(
                "ended %d connections: beyond %d of them, or the process had grown by %d bytes",
                self._ended,
                connections_max,
                self._growth_max,
            )
            self._ended, self._returning = 0, RETURNING_TICKS
        if self._returning:
            self._returning -= 1
            give_back()  # what they had sent, as ZeroMQ's thread comes to free it

    def close(self) -> None:
        """Sends what is still to be sent, for a moment; the door is closed by who opened it."""
        self._send_answers(None)
        self._epoll.close()

    def _catch_up(self, connections: Connections, service: Service) -> None:
        """What came and went before a message was told before it; but whoever comes and goes without end keeps nobody for longer than
        CATCH_UP_MAX times.
        """
        self._crowded = True
        for _ in range(CATCH_UP_MAX):
            if not self._crowded:
                break
            self._count(connections, service)

    def _count(self, connections: Connections, service: Service) -> None:
        """Takes notice of connections that have come and gone."""
        count = 0
        for opened, fd in self._door.changes():
            count += 1
            if opened:
                connections.opened(fd)
            elif (peer := connections.closed(fd)) is not None:
                service.peer_gone(peer)
        self._end(connections.too_many())
        self._crowded = count == CHANGES_MAX  # there may be more

    def _look(self, connections: Connections, sessions: int) -> None:
        """When the process is too large, some connections are ended: a message that has not ended belongs to nobody yet. Clients come
        again by themselves.
        """
        connections.turn()
        # Those that have left since the last look as well: what was theirs may not be freed yet.
        self._growth_max = growth_max(self._page_size, max(sessions, self._sessions))
        self._sessions = sessions
        if not self._is_small():
            give_back()
        if self._is_small():
            self._looks = 0
            return
        self._looks += 1
        self._end(connections.to_blame(self._looks))

    def _end(self, fds: list[int]) -> None:
        self._ended += len(fds)  # told once in a tick: nobody is to fill the log with it
        self._door.end(fds)

    def _is_small(self) -> bool:
        return private_bytes() - self._size_at_start <= self._growth_max

    def _serve(self, connections: Connections, service: Service) -> bool:
        """Serves what is there; whether there may be more."""
        for _ in range(DRAIN_MAX):
            try:
                peer, frames, sender, fd = self._door.receive()
            except zmq.Again:
                return False
            if connections.is_anothers(fd, peer):
                self._catch_up(connections, service)
            reply = service.request(peer, frames, sender)
            left = connections.heard(fd, peer)
            if left is not None and not self._crowded:
                service.peer_gone(left)  # before it was served, or unnoticed: nobody will tell again
            if reply is not None and (left != peer or self._crowded):
                self._send(peer, reply)
            if not _has_more(self._socket):  # the question costs less than the exception
                return False
        return True

    def _send(self, peer: bytes, reply: Reply) -> bool:
        """Whether ZeroMQ took it."""
        frames = messages.encode_reply(reply)
        try:
            self._socket.send(peer, _MORE)
            for frame in frames[:-1]:
                self._socket.send(frame, _MORE)
            # pyzmq copies what is small anyhow; to hand it over without a copy takes a third thread, which then frees it.
            self._socket.send(frames[-1], _NOBLOCK, len(frames[-1]) < COPY_BYTES)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            log.debug("a reply is lost: its peer %s", "reads too slowly" if error.errno == zmq.EAGAIN else "is gone")
            return False
        return True

    def _other(self, fd: int, service: Service, owner_pidfd: int) -> None:
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
            if not self._send(peer.address, reply) and service is not None:
                service.lost(peer)


def _fd(socket: zmq.Socket[bytes]) -> int:
    return cast(int, socket.getsockopt(zmq.FD))


def _has_more(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message is there. Asked for by plain numbers: to combine ZeroMQ's own takes longer than the question."""
    return bool(cast(int, socket.getsockopt(_EVENTS)) & _POLLIN)
