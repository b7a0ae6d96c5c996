"""The protocol as docs/protocol.md specifies it, spoken by a client that uses nothing of gcma-shm."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from gcma_shm import errors, messages
from gcma_shm._core import COUNTERS
from gcma_shm.clients.embedded import EmbeddedClient

SPECIFICATION = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()
ANSWER_MS = 20_000


class Stranger:
    """A bare DEALER socket."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)
        self._number = 0

    def send(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def receive(self) -> list[bytes]:
        assert self._socket.poll(ANSWER_MS), "no reply"
        return self._socket.recv_multipart()

    def request(
        self, operation: str, parameters: dict[str, Any] | None = None, *pages: bytes
    ) -> tuple[str, Any, list[bytes]]:
        self._number += 1
        self.send(msgpack.packb([1, self._number, operation, parameters or {}]), *pages)
        header, *rest = self.receive()
        version, number, status, results = msgpack.unpackb(header)
        assert (version, number) == (1, self._number)
        return status, results, rest

    def hello(self) -> dict[str, Any]:
        start = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        status, results, _ = self.request("hello", {"pid": os.getpid(), "start": start, "mapped": False})
        assert status == "ok"
        assert isinstance(results, dict)
        return results

    def close(self) -> None:
        self._socket.close()
        self._context.term()


def page_of(byte: bytes, size: int) -> bytes:
    """No four bytes over and over, or it would take no page."""
    return (byte + b"-gcma--") * (size // 8)


@pytest.fixture
def stranger(client: EmbeddedClient) -> Iterator[Stranger]:
    peer = Stranger(client.endpoint)
    yield peer
    peer.close()


def test_the_bytes_of_the_specification(stranger: Stranger) -> None:
    stranger.hello()
    request, reply = re.findall(r"`((?:[0-9a-f]{2} )+[0-9a-f]{2})`", SPECIFICATION)
    stranger.send(bytes.fromhex(request))
    assert stranger.receive() == [bytes.fromhex(reply)]


def test_the_example_of_the_specification(client: EmbeddedClient) -> None:
    code = SPECIFICATION.split("```python\n")[1].split("```")[0]
    code = code.replace("zmq.Context.instance()", "context").replace(
        "ipc:///run/user/1000/gcma/default", client.endpoint
    )
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    names: dict[str, Any] = {"context": context}
    exec(compile(code, "docs/protocol.md", "exec"), names)
    assert client.swap(3, slots=1000).load(7) == b"gcma-shm" * (client.page_size // 8)
    names["socket"].close()
    context.term()


def test_every_operation_parameter_error_and_counter_is_specified() -> None:
    rows: dict[str, str] = {}
    for row in SPECIFICATION.splitlines():
        if row.startswith("| `"):
            cells = row.split("|")
            as_another = re.match(r" as `(\w+)`", cells[2])
            what = row + rows[as_another[1]] if as_another and as_another[1] in messages.OPERATIONS else row
            rows = dict.fromkeys(re.findall(r"`(\w+)`", cells[1]), what) | rows  # operations come before statistics
    for name, operation in messages.OPERATIONS.items():
        for parameter, meaning in operation.parameters.items():
            assert f"`{parameter}`{'' if meaning.required else '?'}" in rows[name], f"{name}: {parameter}"
    for name in set(errors.__all__) - {"GcmaError", "BrokerUnavailable"}:
        assert f"`{name}`" in SPECIFICATION
    for counter in COUNTERS:
        assert f"`{counter}`" in SPECIFICATION


def test_store_and_load_are_seen_by_mapped_clients(client: EmbeddedClient, stranger: Stranger) -> None:
    size = stranger.hello()["page_size"]
    _, declared, _ = stranger.request("swap_init", {"type": 1, "slots": 10, "write": "behind"})
    slot = {"type": 1, "life": declared["life"], "offset": 4}
    assert stranger.request("load", slot) == ("ok", {"hit": False}, [])
    assert stranger.request("store", slot, page_of(b"a", size)) == ("ok", {}, [])
    swap = client.swap(1, slots=10, write="behind")
    assert swap.load(4) == page_of(b"a", size)
    swap.store(4, page_of(b"b", size))
    assert stranger.request("load", slot) == ("ok", {"hit": True}, [page_of(b"b", size)])
    assert stranger.request("count", {"type": 1, "life": declared["life"]})[1] == {"count": 1}
    assert stranger.request("invalidate_page", slot)[0] == "ok"
    assert swap.load(4) is None


def packed(*offsets: int) -> bytes:
    return b"".join(offset.to_bytes(8, "little") for offset in offsets)


def test_batches_are_seen_by_mapped_clients(client: EmbeddedClient, stranger: Stranger) -> None:
    greeting = stranger.hello()
    size, batch = greeting["page_size"], greeting["batch"]
    _, declared, _ = stranger.request("swap_init", {"type": 1, "slots": 100, "write": "through"})
    life = {"type": 1, "life": declared["life"]}
    pages = [page_of(bytes([n]), size) for n in range(1, 5)]
    offsets = packed(7, 3, 7, 99)
    assert stranger.request("store_many", life | {"offsets": offsets}, b"".join(pages)) == ("ok", {}, [])
    swap = client.swap(1, slots=100, write="through")
    assert [swap.load(n) for n in (3, 7, 99)] == [pages[1], pages[2], pages[3]], "of equal offsets the last wins"
    status, results, found = stranger.request("load_many", life | {"offsets": packed(0, 99, 1, 3, 3)})
    assert (status, results["hits"]) == ("ok", b"\0\1\0\1\1")
    assert found == [pages[3] + pages[1] + pages[1]]
    assert stranger.request("load_many", life | {"offsets": packed(0, 1)}) == ("ok", {"hits": b"\0\0"}, [])
    whole = packed(*[7] * batch)
    assert stranger.request("load_many", life | {"offsets": whole})[2] == [pages[2] * batch]
    for operation, more in (("store_many", [pages[0] * (batch + 1)]), ("load_many", [])):
        status, results, _ = stranger.request(operation, life | {"offsets": packed(*[7] * (batch + 1))}, *more)
        assert status == "ProtocolError"
        assert f"at most {batch}" in results["message"]
        for wrong in (b"", whole[1:], list(range(3))):
            assert stranger.request(operation, life | {"offsets": wrong}, *more)[0] == "ProtocolError"
        for outside in (100, 2**63, 2**64 - 1):
            answer = stranger.request(operation, life | {"offsets": packed(3, outside)}, *[pages[0] * 2 for _ in more])
            assert answer[0] == "IndexError"
    assert swap.load(3) == pages[1], "a batch is refused before it begins"
    swap.invalidate_area()
    for operation, more in (("store_many", [pages[0]]), ("load_many", [])):
        assert stranger.request(operation, life | {"offsets": packed(3)}, *more)[0] == "Closed"


def test_batches_of_loads_whose_replies_nobody_has_read(stranger: Stranger) -> None:
    stranger.hello()
    _, declared, _ = stranger.request("swap_init", {"type": 1, "slots": 10, "write": "behind"})
    some = {"type": 1, "life": declared["life"], "offsets": packed(1, 2)}
    pages = page_of(b"x", 4096) + page_of(b"y", 4096)
    assert stranger.request("store_many", some, pages)[0] == "ok"
    receipts = [stranger.request("load_many", some)[1]["receipt"] for _ in range(messages.BATCHES)]
    for receipt in ({}, {"receipt": receipts[0] ^ 1}):
        status, results, _ = stranger.request("load_many", some | receipt)
        assert status == "ProtocolError"
        assert "receipt" in results["message"]
    assert stranger.request("load_many", some | {"receipt": receipts[-1]})[2] == [pages]


@pytest.mark.parametrize("write", ["through", "behind"])
def test_the_order_of_one_sessions_requests(write: str, stranger: Stranger) -> None:
    """Sent without waiting: what is in memory is served at once, unless a worker has requests of this session, and then by the worker, as
    batches and what is written through are. Each load finds what was stored last before it.
    """
    greeting = stranger.hello()
    size, slots, many = greeting["page_size"], 200, 12
    assert many <= greeting["window"]
    _, declared, _ = stranger.request("swap_init", {"type": 1, "slots": slots, "write": write})
    life = {"type": 1, "life": declared["life"]}
    dice = random.Random(seed := random.randrange(1 << 30))
    values: dict[int, bytes] = {}
    for first in range(1000, 4000, many):
        expected: dict[int, bytes | None] = {}  # by request; of one that is no load None as well
        batches = messages.BATCHES
        for number in range(first, first + many):
            offset = dice.randrange(4) if dice.random() < 0.5 else dice.randrange(slots)
            what = dice.choice(["store", "store", "load", "load", "load", "invalidate_page", "store_many"])
            expected[number], page = None, number.to_bytes(8, "little") * (size // 8)
            if what == "store":
                values[offset] = page
                stranger.send(msgpack.packb([1, number, what, life | {"offset": offset}]), page)
            elif what == "store_many" and batches:
                batches -= 1
                values[offset] = page
                stranger.send(msgpack.packb([1, number, what, life | {"offsets": packed(offset, offset)}]), 2 * page)
            elif what == "invalidate_page":
                values.pop(offset, None)
                stranger.send(msgpack.packb([1, number, what, life | {"offset": offset}]))
            else:
                expected[number] = values.get(offset)
                stranger.send(msgpack.packb([1, number, "load", life | {"offset": offset}]))
        for number in range(first, first + many):
            header, *found = stranger.receive()
            _, answered, status, results = msgpack.unpackb(header)
            page_expected = expected[number]
            assert (answered, status) == (number, "ok"), f"seed {seed}: {results}"
            assert found == ([] if page_expected is None else [page_expected]), f"seed {seed}, request {number}"


def test_hello_is_needed_first_and_again_after_bye(stranger: Stranger) -> None:
    assert stranger.request("ping")[0] == "HelloNeeded"
    stranger.hello()
    assert stranger.request("ping")[0] == "ok"
    assert stranger.request("bye")[0] == "ok"
    assert stranger.request("ping")[0] == "HelloNeeded"


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ([2, 7, "ping", {}], "protocol version 2"),
        ([1, 7, "ping"], "another shape"),
        ([1, 7, "fly", {}], "unknown operation"),
        ([1, 7, "store", {"type": 1}], "store without"),
        ([1, 7, "load", {"type": 1, "life": True, "offset": 0}], "expected an integer"),
        ([1, 7, "load", {"type": 256, "life": 1, "offset": 0}], "expected an integer from 0 to 255"),
        ([1, 7, "load_many", {"type": 1, "life": 1, "offsets": b"1234"}], "8 bytes each"),
        ([1, 7, "ping", {"loud": 1}], "no parameter"),
        ([1, 7, "alloc_contig", {"nbytes": -1}], "expected an integer from 1"),
        ([1, 7, "hello", {"pid": 1, "start": 5, "mapped": False}], "in the name of process 1"),
    ],
)
def test_a_malformed_request_is_answered(stranger: Stranger, header: list[Any], said: str) -> None:
    if header[2] != "hello":
        stranger.hello()
    stranger.send(msgpack.packb(header))
    version, number, status, results = msgpack.unpackb(stranger.receive()[0])
    assert (version, number, status) == (1, 7, "ProtocolError")
    assert said in results["message"]


def test_noise_is_not_answered_and_does_not_disturb(client: EmbeddedClient, stranger: Stranger) -> None:
    for noise in (b"", b"\xc1", b"x" * 1000, msgpack.packb([1, "1", "ping", {}]), msgpack.packb({"number": 1})):
        stranger.send(noise)
    stranger.hello()
    assert stranger.request("ping")[0] == "ok"
    assert client.stats()["broker"]["refusals"] == {"ProtocolError": 5}


def test_a_page_of_another_size_is_refused(stranger: Stranger) -> None:
    size = stranger.hello()["page_size"]
    _, declared, _ = stranger.request("swap_init", {"type": 1, "slots": 10, "write": "behind"})
    slot = {"type": 1, "life": declared["life"], "offset": 4}
    for pages in ((), (b"x" * (size - 1),), (b"x" * size, b"y" * size)):
        status, results, _ = stranger.request("store", slot, *pages)
        assert status == "ProtocolError", results
    assert stranger.request("load", slot)[1] == {"hit": False}


def test_more_requests_than_the_window_are_refused_not_queued(stranger: Stranger) -> None:
    window = stranger.hello()["window"]
    _, declared, _ = stranger.request("swap_init", {"type": 1, "slots": 10, "write": "behind"})
    life = {"type": 1, "life": declared["life"]}
    sent = 2 * window  # what the broker keeps of replies for one peer
    for number in range(1000, 1000 + sent):
        stranger.send(msgpack.packb([1, number, "count", life]))
    statuses = [msgpack.unpackb(stranger.receive()[0])[2] for _ in range(sent)]
    assert set(statuses) <= {"ok", "ProtocolError"}
    assert statuses.count("ok") >= window
    assert stranger.request("ping")[0] == "ok"
