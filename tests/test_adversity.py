"""Peers that no client would be: they say nothing, or half, or too much, or never listen. Others are served meanwhile, and what the broker
spent on them comes back.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import gcma_shm
from gcma_shm import Swap, messages
from gcma_shm.broker.door import FRAMES_ENDED
from gcma_shm.broker.growth import growth_max, private_bytes
from gcma_shm.endpoint import socket_path
from tests.processes import WAIT_S, Broker, broker, descriptors, eventually
from tests.zmtp import GREETING, LONG, MORE, Raw, frame, hello, ready

CLIENTS = 8
PAGE = b"p-gcma--" * 512  # no four bytes over and over, or it would take no page
ENOUGH = 20  # operations of others that go through meanwhile
DESCRIPTORS = 8192  # of this process, for its crowds
pytestmark = pytest.mark.timeout(600)


@dataclass
class Place:
    broker: Broker
    swap: Swap
    mapped: Swap
    descriptors: int = 0
    bytes: int = 0

    def private_bytes(self) -> int:
        _size, resident, shared, *_ = Path(f"/proc/{self.broker.pid}/statm").read_text().split()
        return (int(resident) - int(shared)) * 4096

    def serves(self) -> None:
        """Others are served: pages by message and in shared memory, and what the control loop decides."""
        for number in range(ENOUGH):
            for swap in (self.swap, self.mapped):
                swap.store(number % 10, PAGE)
                assert swap.load(number % 10) == PAGE
        batch = bytearray(10 * 4096 + messages.BATCH_BYTES)  # of two messages
        for swap in (self.swap, self.mapped):
            assert swap.load_many([n % 10 for n in range(len(batch) // 4096)], batch) == [True] * (len(batch) // 4096)
            assert batch == PAGE * (len(batch) // 4096)
        with gcma_shm.connect(self.broker.endpoint, timeout=WAIT_S) as another, another.alloc_contig(1 << 16) as buffer:
            assert buffer.nbytes == 1 << 16

    def serves_one(self) -> None:
        """A page, after whatever was sent before."""
        assert self.swap.load(0) == PAGE

    def life(self) -> int:
        """Of the type that all use."""
        with gcma_shm.connect(self.broker.endpoint, mapped=False, timeout=WAIT_S) as client:
            return int(client.stats()["types"]["0"]["life"])

    def recovers(self) -> None:
        """Descriptors and memory are back, and nobody is left whom nobody knows."""
        assert eventually(lambda: descriptors(self.broker.pid) <= self.descriptors), descriptors(self.broker.pid)
        assert eventually(lambda: self.private_bytes() - self.bytes < 24 << 20), self.private_bytes()
        assert self.broker.process.poll() is None


@contextlib.contextmanager
def many_descriptors() -> Iterator[None]:
    """This process may have as many as its crowds need, where it may have more than it has: often 1024 are the beginning."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(DESCRIPTORS, hard)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def place() -> Iterator[Place]:
    endpoint = f"ipc://{os.environ['XDG_RUNTIME_DIR']}/a"
    with (
        broker(endpoint, "--clients", str(CLIENTS), "--log-level", "error") as running,
        gcma_shm.connect(endpoint, mapped=False, timeout=WAIT_S) as client,
        gcma_shm.connect(endpoint, timeout=WAIT_S) as mapped,
        many_descriptors(),
    ):
        place = Place(running, client.swap(0, 100, "behind"), mapped.swap(0, 100, "behind"))
        place.serves()
        assert eventually(lambda: set(client.stats()["clients"]) == {"0", "1", str(client.number), str(mapped.number)})
        place.descriptors, place.bytes = descriptors(running.pid) + 1, place.private_bytes()
        yield place
        place.serves()


def test_half_open_peers(place: Place) -> None:
    """They are ended within the bound of a handshake, though they go on living."""
    halves = [b"", b"\xff", GREETING[:11], GREETING, GREETING + ready()[:5]]
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Raw(place.broker.endpoint)) for _ in halves]
        for peer, half in zip(peers, halves, strict=True):
            peer.socket.sendall(half)
        place.serves()
        assert all(peer.is_ended() for peer in peers)
        place.recovers()


def test_peers_that_speak_another_language(place: Place) -> None:
    """To ZeroMQ some of it is its protocol's first version, so they stay until they go, or are too many."""
    with contextlib.ExitStack() as stack:
        for said in (b"GET / HTTP/1.1\r\n\r\n", bytes(200), os.urandom(500), b"\x01\x00" * 100):
            stack.enter_context(Raw(place.broker.endpoint)).socket.sendall(said)
        place.serves()
        first = stack.enter_context(Raw(place.broker.endpoint))  # whom neither the kernel nor a key is asked about
        header = bytes(messages.encode_request(messages.Request(1, "areas", {}))[0])
        first.socket.sendall(b"\x01\x00" + bytes([len(header) + 1, 0]) + header)
        answer = b""
        while b"Forbidden" not in answer:
            more = first.socket.recv(100)
            assert more, answer
            answer += more
            assert len(answer) < 1000
    place.recovers()


def test_cut_in_the_middle_of_a_message(place: Place) -> None:
    page = frame(PAGE)
    for half in (b"", page[:1], page[:9], page[:100], frame(b"header", MORE), frame(b"header", MORE) + page[:-1]):
        for _ in range(5):
            with Raw(place.broker.endpoint).greet() as raw:
                raw.socket.sendall(half)
    place.serves()
    place.recovers()


def test_ten_thousand_requests_without_reading_a_reply(place: Place) -> None:
    request = messages.encode_request(messages.Request(1, "areas", {}))[0]
    with Raw(place.broker.endpoint).greet() as raw:
        hello(raw)
        many = frame(bytes(request)) * 100
        for _ in range(100):
            raw.socket.sendall(many)
        place.serves()
        assert eventually(lambda: place.swap.load(0) == PAGE)
        assert place.private_bytes() - place.bytes < growth_max(4096, CLIENTS)
    place.recovers()


def test_a_slow_reader(place: Place) -> None:
    """It asks for pages, and reads a few bytes of them now and then."""
    client = gcma_shm.connect(place.broker.endpoint, mapped=False)
    life = client.stats()["types"]["0"]["life"]
    client.close()
    place.swap.store(0, PAGE)
    load = bytes(messages.encode_request(messages.Request(7, "load", {"type": 0, "life": life, "offset": 0}))[0])
    with Raw(place.broker.endpoint) as raw:
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.greet()
        hello(raw)
        for _ in range(50):
            raw.socket.sendall(frame(load) * 50)
            assert raw.take(10)
        place.serves()
        assert place.private_bytes() - place.bytes < growth_max(4096, CLIENTS)
    place.recovers()


def test_batches_that_are_asked_for_and_never_read(place: Place) -> None:
    """Asking is cheap, and an answer has 512 KiB: what is kept for one who does not read is bounded all the same."""
    life = place.life()
    batch = messages.batch_max(4096)
    offsets = [n % 100 for n in range(batch)]
    place.swap.store_many(offsets, PAGE * batch)
    wanted = {"type": 0, "life": life, "offsets": messages.pack_offsets(offsets)}
    load = bytes(messages.encode_request(messages.Request(7, "load_many", wanted))[0])
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            raw = stack.enter_context(Raw(place.broker.endpoint))
            raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.greet()
            hello(raw)
            for _ in range(30):
                raw.socket.sendall(frame(load) * 10)
        place.serves()
        kept = 4 * (messages.BATCHES + 1) * messages.BATCH_BYTES
        assert place.private_bytes() - place.bytes < kept + (24 << 20)
    place.recovers()


def test_who_sends_batches_without_a_pause_does_not_keep_others(place: Place) -> None:
    """They are more than may be under way, so most are refused; others are served meanwhile, from all of the same workers."""
    life = place.life()
    batch = messages.batch_max(4096)
    wanted = {"type": 0, "life": life, "offsets": messages.pack_offsets([20 + n % 80 for n in range(batch)])}
    header = bytes(messages.encode_request(messages.Request(7, "store_many", wanted))[0])
    message = frame(header, MORE) + frame(os.urandom(4096) * batch)
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(Raw(place.broker.endpoint).greet()) for _ in range(4)]
        for raw in crowd:
            hello(raw)
        stop = threading.Event()

        def flood(raw: Raw) -> None:
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    raw.socket.sendall(message)

        def drain(raw: Raw) -> None:
            with contextlib.suppress(OSError):
                while raw.socket.recv(1 << 16):
                    pass

        threads = [threading.Thread(target=act, args=(raw,)) for raw in crowd for act in (flood, drain)]
        for thread in threads:
            thread.start()
        try:
            place.serves()
        finally:
            stop.set()
            for raw in crowd:
                raw.socket.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(WAIT_S)
    place.recovers()


def test_a_frame_of_a_gigabyte(place: Place) -> None:
    """Its head is enough: the connection ends before any of it is read, and nothing is allocated."""
    for flags in (LONG, LONG | MORE):
        for length in (1 << 30, 1 << 62, (1 << 64) - 1, messages.HEADER_BYTES_MAX + 1):
            with Raw(place.broker.endpoint).greet() as raw:
                raw.socket.sendall(bytes([flags]) + struct.pack(">Q", length) + bytes(100))
                assert raw.is_ended()
    assert place.private_bytes() - place.bytes < 24 << 20, "never more than that"
    place.serves()
    place.recovers()


def test_a_thousand_connections_at_once(place: Place) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(1000):
            raw = stack.enter_context(Raw(place.broker.endpoint))
            if number % 3:
                raw.socket.sendall(GREETING + ready() if number % 2 else b"\xff")
        place.serves()
        bound = place.descriptors + 2 * CLIENTS + 256 + 8
        assert eventually(lambda: descriptors(place.broker.pid) <= bound), "the oldest that said nothing are ended"
    place.recovers()


def test_more_connections_than_there_are_descriptors(place: Place) -> None:
    """ZeroMQ ends its process when it finds none; so it does not come to that."""
    files_max = 2700
    resource.prlimit(place.broker.pid, resource.RLIMIT_NOFILE, (files_max, files_max))
    crowd: list[socket.socket] = []
    path = str(socket_path(place.broker.endpoint))
    try:
        for number in range(2 * files_max):
            crowd.append(socket.socket(socket.AF_UNIX))
            crowd[-1].connect(path)  # waits while the backlog is full
            if number % 500 == 0:
                place.serves()
        place.serves()
    finally:
        for one in crowd:
            one.close()
    place.recovers()


def test_a_message_without_end(place: Place) -> None:
    """ZeroMQ keeps its frames, whatever their number: whoever sends such a message is ended when the broker has grown by its bound."""
    bound = growth_max(4096, CLIENTS)
    for part in (bytes(1 << 20), b"x" * 200):
        chunk = frame(part, MORE) * max((1 << 18) // len(part), 1)
        with Raw(place.broker.endpoint).greet() as raw, pytest.raises(OSError):
            hello(raw)  # it has a session, so it is not the first to be blamed
            for _ in range(50 * bound // len(chunk)):
                raw.socket.sendall(chunk)
        assert eventually(lambda: place.private_bytes() - place.bytes < 24 << 20)
        place.serves()
    place.recovers()


def test_a_message_of_very_many_frames(place: Place) -> None:
    with Raw(place.broker.endpoint).greet() as raw:
        raw.send(*[b""] * 100)
        raw.request(5, "ping")
        assert b"HelloNeeded" in raw.receive(), "a few too many are only refused"
        raw.socket.sendall(frame(b"", MORE) * FRAMES_ENDED + frame(b""))
        assert raw.is_ended()
    place.serves()
    place.recovers()


def test_an_address_that_is_another_ones(place: Place) -> None:
    """A peer says itself what its address is. While the other one is connected it is refused, and afterwards it has no session."""
    with Raw(place.broker.endpoint).greet(b"mine") as raw, Raw(place.broker.endpoint) as thief:
        hello(raw)
        thief.socket.sendall(GREETING + ready(b"mine"))
        thief.take(64)
        thief.receive()
        thief.request(9, "bye")
        raw.request(2, "ping")
        assert b"\xa2ok" in raw.receive()
        place.serves()
    place.recovers()


def test_sessions_are_not_collected(place: Place) -> None:
    """A hundred sessions of one living process, each left without a word: there are records for seven."""
    for _ in range(100):
        with Raw(place.broker.endpoint).greet() as raw:
            hello(raw)
        place.serves_one()
    place.recovers()


def test_coming_and_going(place: Place) -> None:
    for number in range(300):
        with Raw(place.broker.endpoint).greet(b"%d" % (number % 3) if number % 2 else b"") as raw:
            raw.request(number, "ping")
    place.serves()
    place.recovers()


def test_how_large_this_process_is() -> None:
    before = private_bytes()
    memory = bytearray(64 << 20)
    memory[::4096] = b"x" * (len(memory) // 4096)
    assert private_bytes() - before > 60 << 20
    assert growth_max(2 << 20, 256) > growth_max(4096, 256) > growth_max(4096, 8) > 64 << 20
