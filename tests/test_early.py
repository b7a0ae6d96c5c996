"""A hello that comes before the record of a client that has left is free: it is said again, for as long as its time is not over."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import pytest
import zmq

import gcma_shm
from gcma_shm import aio
from gcma_shm.broker.registry import TypeRegistry
from gcma_shm.broker.service import Service
from gcma_shm.clients.channel import Channel
from gcma_shm.errors import QuotaExceeded
from gcma_shm.messages import Reply, Request, decode_request, encode_reply, encode_request, reply_error
from gcma_shm.process import start_time
from tests.conftest import Bare
from tests.loops import NEW_LOOP
from tests.processes import WAIT_S, eventually

PAGE = 4096
FOR_EVER = 1 << 30


class Refusing:
    """A broker without a free record, that takes back `returning` of them, one after each hello."""

    def __init__(self) -> None:
        self.endpoint = f"ipc://{tempfile.gettempdir()}/broker"
        self.returning = 0
        self.hellos = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.endpoint)
        self._ending = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ending:
            if not self._socket.poll(10):
                continue
            peer, *frames = self._socket.recv_multipart()
            request = decode_request(frames, PAGE)
            if request.operation == "hello":
                self.hellos += 1
                refusal = {"message": "all records are in use", "returning": self.returning}
                self._socket.send_multipart([peer, *encode_reply(Reply(request.number, "QuotaExceeded", refusal))])
                self.returning = max(self.returning - 1, 0)

    def end(self) -> None:
        self._ending = True
        self._thread.join()
        self._socket.close(0)
        self._context.term()
        Path(self.endpoint.removeprefix("ipc://")).unlink()


@pytest.fixture
def refusing() -> Iterator[Refusing]:
    broker = Refusing()
    yield broker
    broker.end()


class Connects(Protocol):
    def __call__(self, endpoint: str, timeout: float, wait_for_broker: float = 0.0) -> None: ...


@pytest.fixture(params=["blocks", *NEW_LOOP])
def connects(request: pytest.FixtureRequest) -> Connects:
    """By the client that blocks, and by asyncio's in each loop."""

    async def connect(endpoint: str, timeout: float, wait_for_broker: float) -> None:
        client = await aio.connect(endpoint, mapped=False, timeout=timeout, wait_for_broker=wait_for_broker)
        await client.close()

    def awaits(endpoint: str, timeout: float, wait_for_broker: float = 0.0) -> None:
        with asyncio.Runner(loop_factory=NEW_LOOP[request.param]) as runner:
            runner.run(connect(endpoint, timeout, wait_for_broker))

    def blocks(endpoint: str, timeout: float, wait_for_broker: float = 0.0) -> None:
        gcma_shm.connect(endpoint, mapped=False, timeout=timeout, wait_for_broker=wait_for_broker).close()

    return blocks if request.param == "blocks" else awaits


def test_a_hello_is_said_again_while_records_are_about_to_be_free(refusing: Refusing, connects: Connects) -> None:
    refusing.returning = 3
    with pytest.raises(QuotaExceeded, match="all records are in use") as raised:
        connects(refusing.endpoint, WAIT_S)
    assert raised.value.returning == 0
    assert refusing.hellos == 4


def test_a_hello_that_is_early_for_too_long_is_refused(refusing: Refusing, connects: Connects) -> None:
    refusing.returning = FOR_EVER
    for patience in (0.5, 5.0, 30.0):  # until it was long enough for two of them
        with pytest.raises(gcma_shm.GcmaError) as raised:
            connects(refusing.endpoint, patience)
        # Where the last answer came too late, that is told.
        assert isinstance(raised.value, QuotaExceeded | gcma_shm.BrokerUnavailable)
        if refusing.hellos > 1:
            break
    assert refusing.hellos > 1


def test_a_hello_is_said_again_for_as_long_as_its_client_waits_for_a_broker(
    refusing: Refusing, connects: Connects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one takes in what another left, and that may take longer than what `timeout` is for."""
    monkeypatch.setattr("gcma_shm.clients.correspondence.EARLY_S", 0.5)
    refusing.returning = 5
    with pytest.raises(QuotaExceeded) as raised:
        connects(refusing.endpoint, 2.0, wait_for_broker=WAIT_S)
    assert raised.value.returning == 0
    assert refusing.hellos == 6


def test_a_client_that_is_closed_says_no_hello_again(refusing: Refusing) -> None:
    """`close` waits for no more than the hello that is under way."""
    refusing.returning = FOR_EVER
    channel = Channel(refusing.endpoint, 10 * WAIT_S, 0.0, lambda: {"pid": os.getpid(), "start": 0, "mapped": False})
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(channel.request, "ping")
        assert eventually(lambda: refusing.hellos > 1)
        channel.close()
        with pytest.raises(gcma_shm.GcmaError):
            asked.result(WAIT_S)
    assert refusing.returning > 0


def test_who_holds_a_record_and_who_is_about_to_leave_it(bare: Bare) -> None:
    registry = TypeRegistry(bare.plane, bare.spill_dir)
    service = Service(bare.plane, bare.arena, registry, str(bare.spill_dir), lambda *_: None)
    me = {"pid": os.getpid(), "start": start_time(os.getpid()) or 0, "mapped": False}
    busy, burying = threading.Event(), threading.Event()

    def wait() -> None:
        busy.set()
        burying.wait(WAIT_S)

    def ask(peer: bytes, operation: str = "hello") -> Reply:
        reply = service.request(peer, encode_request(Request(1, operation, me if operation == "hello" else {})))
        assert reply is not None
        return reply

    def returning(peer: bytes) -> int:
        error = reply_error(ask(peer))
        assert isinstance(error, QuotaExceeded)
        return error.returning

    try:
        peers = [b"%d" % n for n in range(bare.arena.geometry.clients_max - 1)]
        assert [ask(peer).status for peer in peers] == ["ok"] * len(peers)
        assert returning(b"late") == 0
        service._type_worker.submit(wait)
        assert busy.wait(WAIT_S)
        for gone, peer in enumerate(peers[:2]):
            assert returning(b"late") == gone
            assert ask(peer, "bye").status == "ok"
        assert returning(b"late") == 2
        burying.set()
        assert eventually(lambda: ask(b"late").status == "ok")
    finally:
        burying.set()
        service.stop(5.0)
