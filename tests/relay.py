"""Somebody between a client and a broker on TCP: who listens, and cuts the wire."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from types import TracebackType
from typing import Self

from gcma_shm.endpoint import tcp_address


class Relay:
    """Passes on what comes to `endpoint`, and keeps a copy."""

    def __init__(self, to: str) -> None:
        self._to = tcp_address(to)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self.seen = bytearray()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._told = os.eventfd(0)
        self._selector.register(self._told, selectors.EVENT_READ)
        self._ending = False
        self._cut = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def cut(self) -> None:
        """Ends all connections; new ones may come."""
        self._cut.clear()
        os.eventfd_write(self._told, 1)
        assert self._cut.wait(20)

    def _run(self) -> None:
        while not self._ending:
            for key, _ in self._selector.select():
                if key.fileobj is self._listening:
                    self._pair(self._listening.accept()[0], socket.create_connection(self._to))
                elif key.fileobj == self._told:
                    os.eventfd_read(self._told)
                    for one in list(self._pairs):
                        self._drop(one)
                    self._cut.set()
                elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._pairs:
                    self._pass(key.fileobj)

    def _pair(self, near: socket.socket, far: socket.socket) -> None:
        self._pairs |= {near: far, far: near}
        for one in (near, far):
            self._selector.register(one, selectors.EVENT_READ)

    def _pass(self, one: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if came := one.recv(1 << 16):
                self.seen += came
                self._pairs[one].sendall(came)
                return
        self._drop(one)

    def _drop(self, one: socket.socket) -> None:
        for end in (one, self._pairs.get(one)):
            if end is not None and end in self._pairs:
                self._selector.unregister(end)
                del self._pairs[end]
                end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending = True
        os.eventfd_write(self._told, 1)
        self._thread.join()
        for one in list(self._pairs):  # of somebody who came again while the others were cut
            self._drop(one)
        self._selector.close()
        self._listening.close()
        os.close(self._told)
