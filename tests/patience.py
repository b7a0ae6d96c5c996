"""How long a client waits: as long as there is for what is to come, so that a busy machine fails nothing; hardly at all where nothing can."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct
import termios
from collections.abc import Iterator
from pathlib import Path

import gcma_shm
from gcma_shm.endpoint import socket_path

IN_VAIN_S = 0.2  # of a request that nobody can answer


@contextlib.contextmanager
def impatient(*clients: gcma_shm.Client, timeout: float = IN_VAIN_S) -> Iterator[None]:
    """Meanwhile requests of these clients wait no longer: their broker has ended, or is stopped."""
    before = [client._channel.timeout for client in clients]
    for client in clients:
        client._channel.timeout = timeout
    try:
        yield
    finally:
        for client, own in zip(clients, before, strict=True):
            client._channel.timeout = own


def has_unread(endpoint: str) -> bool:
    """Whether this process has sent something to the (stopped) broker on `endpoint` that it has not read: not queued here, but sent."""
    path = str(socket_path(endpoint))
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile, or of another kind
            if not stat.S_ISSOCK(descriptor.stat().st_mode):
                continue
            with socket.socket(fileno=os.dup(int(descriptor.name))) as one:
                if one.family == socket.AF_UNIX and one.getpeername() == path:
                    unread = fcntl.ioctl(one, termios.TIOCOUTQ, bytes(4))
                    if struct.unpack("i", unread)[0] > 0:
                        return True
    return False
