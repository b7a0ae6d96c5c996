"""The socket of an asyncio channel: reads whatever comes as soon as it is there, sends now or in order, and is closed without harm to its loop, whoever
drops it, and wherever. Knows no request, and not what a message says.

Everything that the loop keeps refers to it weakly: an idle client can be collected.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import weakref
from typing import Any, Protocol, cast

import zmq
import zmq.asyncio

from gcma_shm import curve
from gcma_shm.clients.channel import GOODBYE_MS, dealer, say_goodbye
from gcma_shm.messages import Frame

MESSAGES_MAX = 64  # that are read in one turn of the loop; others have theirs then
_NOBLOCK = int(zmq.NOBLOCK)


class Reader(Protocol):
    """Whoever is given what comes; owns the socket, which does not keep it."""

    def take(self, frames: Any) -> None:
        """One message."""


class AsyncSocket:
    """Of one event loop, and of the process that made it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        endpoint: str,
        credentials: curve.Credentials | None,
        reader: Reader,
    ) -> None:
        self._loop = loop
        self._reader = weakref.ref(reader)
        self._context, self._plain = dealer(endpoint, credentials)
        # Over a plain socket: an asyncio socket of its own, collected in a forked child, would take the parent's out of the epoll that
        # both have.
        self._socket = zmq.asyncio.Socket.from_socket(self._plain)
        self._part = weakref.finalize(self, _part, os.getpid(), loop, self._plain, self._context)
        self._part.atexit = False  # the broker sees the process end
        self._listen()

    def _listen(self) -> None:
        """Reads what is there, and asks to be called for what comes next."""
        for _ in range(MESSAGES_MAX):
            coming: Any = self._socket.recv_multipart(copy=False)  # a future, typed as any awaitable
            if not coming.done():
                coming.add_done_callback(functools.partial(_heard, weakref.ref(self)))
                return
            try:
                self._pass_on(coming.result())
            except BaseException:  # Ctrl-C, say
                self._listen_soon()
                raise
        self._listen_soon()

    def _listen_soon(self) -> None:
        self._loop.call_soon(functools.partial(_listen_again, weakref.ref(self)))

    def _pass_on(self, frames: Any) -> None:
        if (reader := self._reader()) is not None:
            reader.take(frames)

    def send(self, frames: list[Frame]) -> asyncio.Future[Any]:
        """Sends it, now or when the socket takes it; in order, unless the future is cancelled before."""
        # With a copy, as in Channel: the caller may write there again once this was given up.
        sending: Any = self._socket.send_multipart(frames, copy=True)
        return cast("asyncio.Future[Any]", sending)

    def post(self, frames: list[Frame]) -> bool:
        """Sends it now or never. (pyzmq's `poll` would tell whether there is room, but then forgets to look what else came.)"""
        sending: Any = self._socket.send_multipart(frames, _NOBLOCK)
        if not sending.done() or sending.exception() is not None:
            sending.cancel()
            return False
        return True

    def say_goodbye(self) -> None:
        """Bye, if the socket takes it, and no word about the reply."""
        say_goodbye(self._plain)

    @property
    def closed(self) -> bool:
        """Whether `close` or `forget` was called."""
        return not self._part.alive

    def close(self, linger_ms: int = 0) -> None:
        """A second time has no effect."""
        if self._part.detach() is not None:
            _close(self._loop, self._plain, self._context, linger_ms)

    def forget(self) -> None:
        """In a forked child, where the socket and the loop are the parent's."""
        self._part.detach()
        self._plain.close()  # pyzmq knows that this is not the process that opened it, and touches nothing
        self._context.term()


def _heard(socket: weakref.ref[AsyncSocket], coming: asyncio.Future[Any]) -> None:
    found = socket()
    if found is None or coming.cancelled() or found.closed:
        return
    try:
        found._pass_on(coming.result())
    finally:
        if not found.closed:
            found._listen()


def _listen_again(socket: weakref.ref[AsyncSocket]) -> None:
    found = socket()
    if found is not None and not found.closed:
        found._listen()


def _part(
    pid: int, loop: asyncio.AbstractEventLoop, plain: zmq.Socket[bytes], context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    """For a socket that nobody closed and nobody can reach any more; in the loop's thread, if the loop still runs."""
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
