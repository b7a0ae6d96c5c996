"""What `gcma area` and `gcma quota` ask of a broker that runs: requests that need no session."""

from __future__ import annotations

from typing import Any

import zmq

from gcma_shm import curve, messages
from gcma_shm.curve import Credentials
from gcma_shm.endpoint import check_endpoint, is_tcp, refuse_strangers, socket_path
from gcma_shm.errors import BrokerUnavailable
from gcma_shm.messages import Request

TIMEOUT_MS = 5000


def ask(
    endpoint: str, operation: str, parameters: dict[str, Any], credentials: Credentials | None = None
) -> dict[str, Any]:
    """The results of one request. Raises what the broker answers, BrokerUnavailable, ArenaError, ValueError for a malformed
    endpoint.
    """
    check_endpoint(endpoint)
    if not is_tcp(endpoint) and not socket_path(endpoint).exists():
        raise BrokerUnavailable(f"no broker listens on {endpoint}")
    refuse_strangers(endpoint)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, TIMEOUT_MS)
        if is_tcp(endpoint):
            curve.prepare(socket, endpoint, credentials)
        socket.connect(endpoint)
        socket.send_multipart(messages.encode_request(Request(1, operation, parameters)))
        try:
            reply = messages.decode_reply(socket.recv_multipart())
        except zmq.Again:
            raise BrokerUnavailable(f"no answer from the broker on {endpoint} to {operation}") from None
    if reply.status != "ok":
        raise messages.reply_error(reply)
    return reply.results
