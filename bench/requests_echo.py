"""A bare ZeroMQ server and client for `requests.py`: the same frames with the same msgpack headers, and nothing done about them."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import msgpack
import zmq

LINGER_MS = 0
STOP = "stop"
PLACE = {"buffer": 1 << 24, "area": "default", "offset": 10_000, "first": 20_000, "nbytes": 1 << 16}
RESULTS: dict[str, dict[str, Any]] = {
    "alloc_contig": PLACE,
    "load": {"hit": True},
    "load_many": {"hits": b"\1", "receipt": 1 << 60},
}

Wanted = tuple[str, dict[str, Any], tuple[bytes | memoryview, ...]]


def make_echo(
    _index: int, stack: ExitStack, endpoint: str, page_size: int, cores: Sequence[int], copies: bool
) -> Callable[[], None]:
    """A ROUTER in another process. `copies`: it makes the bytes of each page that it sends, and copies those that it gets."""
    os.sched_setaffinity(0, cores)
    context = stack.enter_context(zmq.Context())
    socket = stack.enter_context(context.socket(zmq.ROUTER))
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.bind(endpoint)
    pages = bytearray(os.urandom(4 << 20))
    whole = memoryview(pages)
    kept = bytes(pages)

    def serve() -> None:
        ats = itertools.cycle(range(0, len(pages), 1 << 18))
        while True:
            peer, header = socket.recv(), socket.recv(copy=False)
            frame = socket.recv(copy=False) if header.more else None
            _version, number, operation, parameters = msgpack.unpackb(header.buffer)
            if operation == STOP:
                socket.send_multipart([peer, b""])
                return
            size = len(parameters["offsets"]) // 8 * page_size if "offsets" in parameters else page_size
            at = next(ats)
            if copies and frame is not None:
                whole[at : at + size] = frame.buffer
            reply = [peer, msgpack.packb([1, number, "ok", RESULTS.get(operation, {})])]
            if operation in ("load", "load_many"):
                reply.append(
                    bytes(whole[at : at + size]) if copies else kept[:size] if size <= page_size else whole[:size]
                )
            socket.send_multipart(reply, copy=len(reply) < 3)

    return serve


class Bare:
    """A DEALER that speaks the protocol by hand, to the echo or to a broker."""

    def __init__(self, stack: ExitStack, endpoint: str) -> None:
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

    def times(self, wanted: Sequence[Wanted], count: int) -> list[int]:
        """Nanoseconds of `count` rounds of these, one request after another."""
        clock, times = time.perf_counter_ns, []
        for _ in range(count):
            begun = clock()
            for operation, parameters, pages in wanted:
                self.request(operation, parameters, *pages)
            times.append(clock() - begun)
        return times

    def rate(self, wanted: Wanted, in_flight: int, count: int, out: memoryview | None = None) -> float:
        """Replies a second, so many under way. `out`: where the page of each is copied to."""
        operation, parameters, pages = wanted
        socket, sent, receipt = self._socket, deque[None](), 0
        begun = time.perf_counter()
        for number in range(count + in_flight):
            if number < count:
                if operation == "load_many":
                    parameters = parameters | {"receipt": receipt}
                socket.send_multipart([msgpack.packb([1, next(self._numbers), operation, parameters]), *pages])
                sent.append(None)
            if number >= in_flight:
                header = socket.recv(copy=False)
                frame = socket.recv(copy=False) if header.more else None
                _version, _number, status, results = msgpack.unpackb(header.buffer)
                assert status == "ok", results
                receipt = results.get("receipt", 0)
                if out is not None and frame is not None:
                    out[: len(frame)] = frame.buffer
                sent.popleft()
        assert not sent
        return count / (time.perf_counter() - begun)
