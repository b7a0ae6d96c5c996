"""What `gcma area` and `gcma quota` ask of a broker that runs: one session, by messages, for one request."""

from __future__ import annotations

import os
from typing import Any

import zmq

from gcma_shm import messages
from gcma_shm.endpoint import socket_path
from gcma_shm.errors import BrokerUnavailable
from gcma_shm.messages import Request
from gcma_shm.process import start_time

TIMEOUT_MS = 5000


def ask(endpoint: str, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The results of one request. Raises what the broker answers, BrokerUnavailable, ValueError for a malformed endpoint."""
    if not socket_path(endpoint).exists():
        raise BrokerUnavailable(f"no broker listens on {endpoint}")
    pid = os.getpid()
    hello = {"pid": pid, "start": start_time(pid) or 0, "mapped": False}
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, TIMEOUT_MS)
        socket.setsockopt(zmq.RCVTIMEO, TIMEOUT_MS)
        socket.connect(endpoint)
        results: dict[str, Any] = {}
        for number, (word, values) in enumerate((("hello", hello), (operation, parameters), ("bye", {})), 1):
            socket.send_multipart(messages.encode_request(Request(number, word, values)))
            try:
                reply = messages.decode_reply(socket.recv_multipart())
            except zmq.Again:
                socket.setsockopt(zmq.LINGER, 0)
                raise BrokerUnavailable(f"no answer from the broker on {endpoint} to {word}") from None
            if reply.status != "ok":
                raise messages.reply_error(reply)
            if word == operation:
                results = reply.results
        return results
