"""A bare ZeroMQ server and client for `requests.py`: the same frames with the same msgpack headers, and nothing done about them."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import msgpack
import zmq

from gcma_shm import messages

LINGER_MS = 0
STOP = "stop"
PLACE = {"buffer": 1 << 24, "area": "default", "offset": 10_000, "first": 20_000, "nbytes": 1 << 16}
RESULTS: dict[str, dict[str, Any]] = {
    "alloc_contig": PLACE,
    "load": {"hit": True},
    "load_many": {"hits": b"\1" * 8, "receipt": 1 << 60},
}
SOURCE_BYTES = 4 << 20  # where the echo's pages come from and go to, like a small arena

Wanted = tuple[str, dict[str, Any], tuple[bytes | memoryview, ...]]


def make_echo(_index: int, stack: ExitStack, endpoint: str, page_size: int, copies: bool) -> Callable[[], None]:
    """A ROUTER in another process. `copies`: it makes new bytes of each page that it sends, and copies what it gets."""
    os.setsid()  # as a broker: Linux may share processors among sessions first, and then within each
    context = stack.enter_context(zmq.Context())
    socket = stack.enter_context(context.socket(zmq.ROUTER))
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.bind(endpoint)
    arena = memoryview(bytearray(os.urandom(SOURCE_BYTES)))
    same: dict[int, bytes] = {}

    def pages_of(at: int, size: int) -> bytes:
        if not copies and size in same:
            return same[size]
        same[size] = bytes(arena[at : at + size])
        return same[size]

    def serve() -> None:
        places = itertools.cycle(range(0, SOURCE_BYTES, messages.BATCH_BYTES))
        while True:
            peer, header = socket.recv(), socket.recv()  # small ones are quicker copied
            frames = socket.recv_multipart(copy=False) if socket.get(zmq.RCVMORE) else []
            _version, number, operation, parameters = msgpack.unpackb(header)
            if operation == STOP:
                socket.send_multipart([peer, b""])
                return
            size = len(parameters["offsets"]) // 8 * page_size if "offsets" in parameters else page_size
            at = next(places)
            if copies and frames:
                arena[at : at + size] = frames[0].buffer
            reply: list[Any] = [peer, msgpack.packb([1, number, "ok", RESULTS.get(operation, {})])]
            if operation in ("load", "load_many"):
                reply.append(pages_of(at, size))
            socket.send_multipart(reply, copy=size < 128 << 10)

    return serve


class Bare:
    """A DEALER that speaks the protocol by hand, to the echo or to a broker."""

    def __init__(self, stack: ExitStack, endpoint: str) -> None:
        self.endpoint = endpoint
        context = stack.enter_context(zmq.Context())
        self._socket = stack.enter_context(context.socket(zmq.DEALER))
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.connect(endpoint)
        self._numbers = itertools.count(1)

    def request(self, operation: str, parameters: dict[str, Any], *pages: bytes | memoryview) -> Any:
        """One request, and the results."""
        self._socket.send_multipart([msgpack.packb([1, next(self._numbers), operation, parameters]), *pages])
        _version, _number, status, results = msgpack.unpackb(self._socket.recv_multipart()[0])
        assert status == "ok", results
        return results

    def stop(self) -> None:
        """Ends the echo's `serve`."""
        self._socket.send_multipart([msgpack.packb([1, next(self._numbers), STOP, {}])])
        self._socket.recv_multipart()

    def times(self, wanted: list[Wanted], count: int) -> list[int]:
        """Nanoseconds of `count` rounds of these, one request after another."""
        clock, times = time.perf_counter_ns, []
        for _ in range(count):
            begun = clock()
            for operation, parameters, pages in wanted:
                self.request(operation, parameters, *pages)
            times.append(clock() - begun)
        return times

    def seconds(self, wanted: Wanted, in_flight: int, count: int, out: memoryview | None = None) -> float:
        """Of so many requests, `in_flight` ahead of their replies. `out`: where the pages of each reply are copied to."""
        operation, parameters, pages = wanted
        socket, receipt = self._socket, 0
        begun = time.perf_counter()
        for number in range(count + in_flight):
            if number >= in_flight:
                header, *frames = socket.recv_multipart(copy=False)
                _version, _number, status, results = msgpack.unpackb(header.buffer)
                assert status == "ok", results
                receipt = results.get("receipt", 0)
                if out is not None and frames:
                    out[: len(frames[0])] = frames[0].buffer
            if number < count:
                if operation == "load_many":
                    parameters = parameters | {"receipt": receipt}
                socket.send_multipart([msgpack.packb([1, next(self._numbers), operation, parameters]), *pages])
        return time.perf_counter() - begun
