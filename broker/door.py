"""The broker's socket: a ROUTER on the ipc endpoint, and on TCP where that was asked for; who sends there, and who is connected.

Options of a ROUTER hold for what is bound after they are set (zmq_setsockopt), so one socket has a plain side, for processes of
this user, and a CURVE side. Who sent a message is what the kernel (SO_PEERCRED) and CURVE know, never what the message says.

ZeroMQ's monitor tells of every connection. Its queue is bounded and its sender waits, so ZeroMQ accepts no more than CROWD_MAX
connections that this thread has not heard of: that bounds its descriptors, and it ends the process when it finds none.
"""

from __future__ import annotations

import functools
import logging
import os
import resource
import socket as sockets
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zmq

from gcma_shm import curve, layout, messages
from gcma_shm.broker.admission import Admission
from gcma_shm.broker.rights import Sender
from gcma_shm.broker.service import window_of
from gcma_shm.endpoint import is_loopback, is_tcp, socket_path, tcp_address
from gcma_shm.errors import ArenaError
from gcma_shm.messages import Frame

log = logging.getLogger(__name__)

FRAMES_MAX = 1 + messages.PAGES_MAX
FRAMES_ENDED = 1000  # a message of more ends its connection
BACKLOG = 512  # connections that the kernel keeps until ZeroMQ accepts them
CHANGES_MAX = 256  # of connections, taken in one turn of the loop
_QUEUE = 1000  # ZeroMQ's own bound of its side of the monitor
CROWD_MAX = 2 * _QUEUE  # events under way; ours is as long
DESCRIPTORS_OWN = 64 + 2 * layout.TYPES_MAX  # files of types, and what a Python process has open
_NOBLOCK = int(zmq.NOBLOCK)
_ACCEPTED = int(zmq.EVENT_ACCEPTED)
# As zmq_socket_monitor(3) lays it out. pyzmq's own parser comes with asyncio and ssl, a fifth of the time that a broker takes to start.
_EVENT = struct.Struct("=Hi")
_MONITOR = "inproc://connections"
_LOCAL = "localhost:"  # how ZeroMQ begins the address of a peer on ipc: then uid, gid, pid, by SO_PEERCRED


@dataclass(frozen=True)
class Doorway:
    """Where to listen beside the endpoint that names the arena, and whom to let in over TCP."""

    listen: tuple[str, ...] = ()
    curve_key: Path | None = None
    authorized: Path | None = None
    insecure: bool = False

    def check(self, endpoint: str) -> None:
        """Raises ValueError when somebody would be let in over TCP without a key, but for loopback with `insecure`."""
        for other in self.listen:
            tcp_address(other)
        keys = self.curve_key is not None and self.authorized is not None
        if (self.curve_key is None) != (self.authorized is None):
            raise ValueError(
                "CURVE needs both: --curve-key, the broker's secret key, and --authorized, its clients' public keys"
            )
        if keys and self.insecure:
            raise ValueError("either --insecure or keys")
        for tcp in filter(is_tcp, (endpoint, *self.listen)):
            if keys or (self.insecure and is_loopback(tcp)):
                continue
            if self.insecure:
                raise ValueError(f"{tcp} is no loopback address: --insecure is for 127.0.0.1 and [::1] alone")
            raise ValueError(
                f"{tcp} would be open to anybody who reaches it: give --curve-key and --authorized (see `gcma keygen`), "
                "or --insecure for a loopback address"
            )


class Door:
    """The bound socket. `endpoints` are where it listens, ports filled in. Raises ArenaError, ValueError, OSError when it cannot."""

    def __init__(self, endpoint: str, doorway: Doorway, page_size: int, clients_max: int) -> None:
        doorway.check(endpoint)
        self.connections_max = _connections_max(clients_max)
        self.endpoints: list[str] = []
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self._admission: Admission | None = None
        self.socket.monitor(_MONITOR, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self.monitor = self._context.socket(zmq.PAIR)
        self.monitor.setsockopt(zmq.RCVHWM, CROWD_MAX - _QUEUE)
        self.monitor.connect(_MONITOR)
        try:
            pair = curve.load_pair(doorway.curve_key) if doorway.curve_key else None
            self._set_bounds(page_size)
            tcp = [one for one in (endpoint, *doorway.listen) if is_tcp(one)]
            if not is_tcp(endpoint):
                self._bind(endpoint)
                socket_path(endpoint).chmod(0o600)
            if tcp:
                self._admission = Admission(self._context, doorway.authorized)
                self._let_in_over_tcp(pair)
            for one in tcp:
                self.socket.setsockopt(zmq.IPV6, int(tcp_address(one)[0].startswith("[")))
                self._bind(one)
        except BaseException:
            self.close()
            raise

    def _set_bounds(self, page_size: int) -> None:
        window = window_of(page_size)
        self.socket.setsockopt(zmq.LINGER, 200)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a full pipe is told, not passed over in silence
        self.socket.setsockopt(
            zmq.MAXMSGSIZE, max(page_size, messages.HEADER_BYTES_MAX)
        )  # of a frame; a longer one ends its connection
        self.socket.setsockopt(zmq.HANDSHAKE_IVL, curve.HANDSHAKE_MS)  # a half-open peer has this long
        self.socket.setsockopt(zmq.BACKLOG, BACKLOG)
        self.socket.setsockopt(zmq.RCVHWM, 2 * window)
        # libzmq learns in batches of half of this how much a peer has read, so the rest must hold a window and its
        # refusals.
        self.socket.setsockopt(zmq.SNDHWM, 4 * window)

    def _let_in_over_tcp(self, pair: curve.KeyPair | None) -> None:
        curve.watch(self.socket)
        if pair is not None:
            curve.need_curve()
            self.socket.curve_server = True
            self.socket.curve_publickey = pair.public.encode()
            self.socket.curve_secretkey = pair.secret.encode()
            self.socket.zap_domain = b"gcma"  # without one ZeroMQ would let in whoever has any key

    def _bind(self, endpoint: str) -> None:
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ArenaError(error.errno, f"cannot listen on {endpoint}: {error.strerror}") from None
        self.endpoints.append(self.socket.getsockopt_string(zmq.LAST_ENDPOINT))

    @property
    def admission(self) -> Admission | None:
        """Who may do what over TCP; None: nobody comes that way."""
        return self._admission

    def receive(self) -> tuple[bytes, list[Frame], Sender, int]:
        """One message that is there: its peer's address, its frames, who sent it, and by which connection. Of a message with
        too many frames one more than allowed is kept, to be refused for it; a peer that sends very many has to come again.
        Raises zmq.Again when there is none.
        """
        peer = self.socket.recv(_NOBLOCK)
        # A page stays in ZeroMQ's memory until a worker has stored it.
        first = frame = self.socket.recv(copy=False)
        frames: list[Frame] = [first.bytes]
        count = 1
        while frame.more:  # ZeroMQ has no way to pass over the rest of a message
            frame = self.socket.recv(copy=False)
            count += 1
            if count <= FRAMES_MAX + 1:
                frames.append(frame.buffer)
        fd = int(_told(first, "__fd") or -1)  # what zmq.SRCFD reads, and an error where there is none
        if count > FRAMES_ENDED:
            log.warning("a message of %d frames: ended its connection", count)
            self.end([fd])
        key = _told(first, "User-Id") if self._admission is not None else ""  # what Admission has answered: the key
        return peer, frames, _sender(_told(first, "Peer-Address"), key), fd

    def changes(self) -> Iterator[tuple[bool, int]]:
        """Connections that have come (True) and gone since, in order, by descriptor; at most CHANGES_MAX."""
        for _ in range(CHANGES_MAX):
            try:
                event, value = _EVENT.unpack(self.monitor.recv_multipart(zmq.NOBLOCK)[0])
            except zmq.Again:
                return
            yield event == _ACCEPTED, value

    def end(self, fds: list[int]) -> None:
        """Ends these connections; ZeroMQ finds them at their end, and closes them. One that has ended meanwhile may have left its
        number to another file: that is no socket, or another peer's connection, which comes again. (The listening sockets
        were never anything else.)
        """
        for fd in fds:
            try:
                with sockets.socket(fileno=os.dup(fd)) as connection:
                    connection.shutdown(sockets.SHUT_RDWR)
            except OSError:
                log.debug("connection %d had ended by itself", fd)

    def close(self) -> None:
        """Sends what is still to be sent, for a moment, and closes the socket."""
        for endpoint in self.endpoints:
            self.socket.unbind(endpoint)
        # ZeroMQ's thread may wait for room in the queue, with a lock that the next call needs. Nobody new comes, so there is room.
        while list(self.changes()):
            pass
        self.socket.monitor(None, 0)
        self.monitor.close(0)
        self.socket.close()
        if self._admission is not None:
            self._admission.close()
        self._context.term()


def _told(frame: zmq.Frame, name: str) -> str:
    """What ZeroMQ knows of a frame's sender; empty: nothing, as of a peer that speaks the first versions of its protocol."""
    try:
        return str(frame.get(name))
    except zmq.ZMQError:
        return ""


@functools.lru_cache(maxsize=1024)
def _sender(address: str, key: str) -> Sender:
    """Who sends from `address`, in ZeroMQ's words; of another user's process on ipc nothing counts but that it is none of ours."""
    if address.startswith(_LOCAL):
        uid, _gid, pid = address.removeprefix(_LOCAL).split(":")
        if int(uid) in (0, os.getuid()):
            return Sender(pid=int(pid))
    return Sender(remote=True, key=key)


def _connections_max(clients_max: int) -> int:
    """A client needs one connection, two while it connects again; operators some. All of them, with a crowd that is not known yet,
    have descriptors.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * clients_max + 256
    room = soft - DESCRIPTORS_OWN - clients_max - CROWD_MAX
    if soft != resource.RLIM_INFINITY and room < wanted:
        log.warning(
            "%d descriptors are few: at most %d connections (raise the hard limit, `ulimit -Hn`)",
            soft,
            max(room, clients_max),
        )
        return max(room, clients_max)
    return wanted
