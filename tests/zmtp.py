"""ZeroMQ's wire protocol (ZMTP 3.0, RFC 23) spoken by hand, for peers that no ZeroMQ would be: half a greeting, half a message, a frame
that says it has a gigabyte, a message of endless frames.
"""

from __future__ import annotations

import os
import socket
import struct
from types import TracebackType
from typing import Any, Self

import msgpack

from gcma_shm.endpoint import is_tcp, socket_path, tcp_address
from gcma_shm.process import start_time
from tests.processes import WAIT_S, eventually

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
MORE, LONG, COMMAND = 1, 2, 4


def frame(body: bytes, flags: int = 0) -> bytes:
    """A frame as it travels."""
    if len(body) < 256:
        return bytes([flags, len(body)]) + body
    return bytes([flags | LONG]) + struct.pack(">Q", len(body)) + body


def ready(identity: bytes = b"", kind: bytes = b"DEALER") -> bytes:
    """The command that ends the handshake, in the name of a socket of this kind."""
    metadata = ((b"Socket-Type", kind), (b"Identity", identity))
    pairs = (bytes([len(name)]) + name + struct.pack(">I", len(value)) + value for name, value in metadata)
    return frame(b"\x05READY" + b"".join(pairs), COMMAND)


class Raw:
    """A connection to a broker, of which every byte is the test's."""

    def __init__(self, endpoint: str) -> None:
        if is_tcp(endpoint):
            self.socket = socket.create_connection(tcp_address(endpoint), WAIT_S)
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(str(socket_path(endpoint)))  # waits while the broker's backlog is full
            self.socket.settimeout(WAIT_S)

    def greet(self, identity: bytes = b"") -> Self:
        """The whole handshake."""
        self.socket.sendall(GREETING)
        self.take(64)
        self.socket.sendall(ready(identity))
        self.receive()  # its READY
        return self

    def send(self, *bodies: bytes) -> None:
        """A message of these frames."""
        *first, last = bodies
        self.socket.sendall(b"".join(frame(body, MORE) for body in first) + frame(last))

    def request(self, number: int, operation: str, parameters: dict[str, Any] | None = None) -> None:
        """A request as the protocol has it."""
        packed = msgpack.packb([1, number, operation, parameters or {}])
        assert packed is not None
        self.send(packed)

    def take(self, count: int) -> bytes:
        """So many bytes; fewer when the broker has ended the connection."""
        taken = b""
        try:
            while len(taken) < count and (more := self.socket.recv(count - len(taken))):
                taken += more
        except ConnectionResetError:
            pass
        return taken

    def receive(self) -> bytes:
        """The next frame's body; empty also at the end."""
        head = self.take(2)
        if len(head) < 2:
            return b""
        if head[0] & LONG:
            return self.take(struct.unpack(">Q", head[1:] + self.take(7))[0])
        return self.take(head[1])

    def is_ended(self) -> bool:
        """Waits for the broker to end the connection; False when it does not, within the bound."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """Goes without a word."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def hello(raw: Raw) -> None:
    """Until there is a record: those of sessions that have just ended are being buried."""

    def said() -> bool:
        raw.request(1, "hello", {"pid": os.getpid(), "start": start_time(os.getpid()) or 0, "mapped": False})
        return b"\xa2ok" in raw.receive()

    assert eventually(said)
