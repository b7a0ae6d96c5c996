"""A bare ZeroMQ echo of alloc_contig's messages for `alloc.py`: what the transport alone costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import zmq
from _common import Crew, crew
from alloc_job import Job, Sample

from gcma_shm import messages
from gcma_shm.messages import Reply, Request

WARM_UP = 5  # messages before the one that is timed warm
LINGER_MS = 0


def make_echo(_index: int, stack: ExitStack, endpoint: str) -> Callable[..., Any]:
    """A ROUTER in another process that answers each message with one of the length of our reply."""
    context = stack.enter_context(zmq.Context())
    socket = stack.enter_context(context.socket(zmq.ROUTER))
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.bind(endpoint)
    place = {"buffer": 1 << 24, "area": "default", "offset": 10_000, "first": 20_000, "nbytes": 64 << 20}
    reply = bytes(messages.encode_reply(Reply(1000, "ok", place))[0])

    def serve(count: int) -> None:
        for _ in range(count):
            peer, _request = socket.recv_multipart()
            socket.send_multipart([peer, reply])

    return serve


class Transport:
    """The DEALER's side."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        endpoint = f"ipc://{directory}/echo"
        self._crew = stack.enter_context(crew(1, make_echo, endpoint))
        context = stack.enter_context(zmq.Context())
        self._socket = stack.enter_context(context.socket(zmq.DEALER))
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.connect(endpoint)
        self._request = bytes(messages.encode_request(Request(1000, "alloc_contig", {"nbytes": 64 << 20}))[0])

    def run(self, count: int) -> list[int]:
        """Nanoseconds of each round trip."""
        connection = self._crew.connections[0]
        connection.send((count,))
        times, clock = [], time.perf_counter_ns
        for _ in range(count):
            start = clock()
            self._socket.send_multipart([self._request])
            self._socket.recv_multipart()
            times.append(clock() - start)
        Crew.answer(connection)
        return times


class Echo(Job):
    """One round trip, after a pause or after others."""

    def __init__(self, name: str, transport: Transport, warm: bool) -> None:
        self.name = name
        self._transport = transport
        self._count = WARM_UP + 1 if warm else 1

    @contextmanager
    def ready(self, nbytes: int) -> Iterator[Callable[[], Sample]]:  # noqa: ARG002 - the place among the others counts
        """The last of them. One goes before the pause, as with our jobs, which ask what is lent."""
        self._transport.run(1)
        yield lambda: Sample(self._transport.run(self._count)[-1])
