"""Which peer is which client and who is alive; the records that clients write for their children."""

from __future__ import annotations

import os
import select
import signal
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

from gcma_shm import layout
from gcma_shm._core import COUNTERS
from gcma_shm.broker.growth import growth_max
from gcma_shm.broker.registry import TypeRegistry
from gcma_shm.broker.server import Server
from gcma_shm.broker.service import Peer, Service
from gcma_shm.broker.sessions import Client, Sessions
from gcma_shm.broker.stop import StopSignals
from gcma_shm.errors import ProtocolError, QuotaExceeded
from gcma_shm.messages import BATCHES, Reply, Request, encode_request, pack_offsets
from gcma_shm.presence import Presence
from gcma_shm.process import open_pidfd, start_time
from gcma_shm.records import Records, State
from tests.conftest import Bare
from tests.processes import Said, descriptors, forked

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

ME = os.getpid()
MY_START = start_time(ME) or 0


class Kept:
    """Sessions of a bare arena, and what they told of forks."""

    def __init__(self, bare: Bare) -> None:
        self.plane = bare.plane
        self.records = Records(bare.plane)
        self.inherited: list[tuple[int, int]] = []

        def inherit(parent: int, child: int) -> None:
            self.inherited.append((parent, child))

        self.sessions = Sessions(bare.plane, inherit, presence=bare.arena.presence)

    def hello(self, peer: bytes, pid: int = ME, start: int = MY_START, number: int | None = None) -> Client:
        return self.sessions.hello(peer, pid, start, True, number)

    def fork(self, parent: int, presence: Presence | None = None) -> int:
        """What a client does before it forks."""
        number = self.records.take(parent)
        if presence is not None:
            presence.take(number)
            self.plane.write(self.plane.geometry.client_at(number) + layout.CLIENT_LOCKED_AT, 1)
        self.records.fill(number, State.FORKED, 0, 0)
        self.plane.add(layout.FORKS_AT, 1)
        return number

    def end(self, client: Client) -> None:
        self.sessions.forget(client)
        self.sessions.buried(client.number)


@pytest.fixture
def kept(bare: Bare) -> Kept:
    return Kept(bare)


def test_hello(kept: Kept) -> None:
    client = kept.hello(b"a")
    assert client.number > layout.BROKER
    assert kept.sessions.find(b"a") is client
    assert kept.sessions.find(b"b") is None
    record = kept.records.read(client.number)
    assert (record.state, record.pid, record.start, record.parent) == (State.ALIVE, ME, MY_START, layout.BROKER)
    kept.sessions._check()
    assert kept.hello(b"a") is client, "its first hello may have been answered too late"
    assert kept.hello(b"b").number != client.number, "one process may be several clients"
    kept.sessions._check()
    kept.sessions.close()


def test_hello_of_nobody(kept: Kept) -> None:
    with forked(lambda _: None) as child:
        child.receive()
        child.wait()
        for pid, start in ((child.pid, 1), (ME, MY_START + 1), (2**22 + 5, 1)):
            with pytest.raises(ProtocolError, match="no process"):
                kept.hello(b"a", pid, start)
    assert not kept.sessions.clients
    assert not list(kept.records.used())


@pytest.mark.parametrize("pid", [2**31 - 1, 2**31, 2**40])
def test_hello_with_a_number_that_no_process_can_have(kept: Kept, pid: int) -> None:
    with pytest.raises(ProtocolError):
        kept.hello(b"a", pid, 1)


def test_as_many_clients_as_records(kept: Kept, bare: Bare) -> None:
    clients = [kept.hello(bytes([n])) for n in range(bare.arena.geometry.clients_max - 1)]
    before = descriptors()
    for _ in range(3):
        with pytest.raises(QuotaExceeded, match="--clients"):
            kept.hello(b"one more")
    assert descriptors() == before, "a refusal keeps no pidfd"
    kept.end(clients[3])
    again = kept.hello(b"one more")
    assert again.number == clients[3].number, "the record is used again"
    kept.sessions._check()
    kept.sessions.close()
    assert descriptors() == before - len(clients)


def test_hello_again_after_a_lost_socket(kept: Kept) -> None:
    client = kept.hello(b"a")
    again = kept.hello(b"b", number=client.number)
    assert again is client
    assert kept.sessions.find(b"a") is None
    assert kept.sessions.find(b"b") is client
    kept.sessions._check()
    for number, pid, start in (
        (client.number, ME + 1, MY_START),
        (client.number, ME, MY_START + 1),
        (client.number + 1, ME, MY_START),
    ):
        with pytest.raises(ProtocolError):
            kept.hello(b"c", pid, start, number)
    with pytest.raises((ProtocolError, IndexError)):
        kept.hello(b"c", number=4000)
    kept.sessions._check()
    kept.sessions.close()


def test_what_went_to_the_old_address_is_not_waited_for(kept: Kept) -> None:
    client = kept.hello(b"a")
    request = Request(1, "load_many", {})
    for _ in range(BATCHES):
        client.window.leave(client.window.enter(request, 5, paged=True), has_pages=True)
    with pytest.raises(ProtocolError):
        client.window.enter(request, 5, paged=True)
    assert kept.hello(b"a") is client
    assert len(client.window.unread) == BATCHES, "the same address: they may be read yet"
    assert kept.hello(b"b", number=client.number) is client
    entries = [client.window.enter(request, 5, paged=True) for _ in range(BATCHES)]
    assert kept.hello(b"c", number=client.number) is client
    with pytest.raises(ProtocolError):
        client.window.enter(
            request, 5, paged=True
        )  # a worker has them: who comes again and again gets no more than that
    for entry in entries:
        client.window.leave(entry, has_pages=False)
    client.window.enter(request, 5, paged=True)
    client.window.requests = -1
    with pytest.raises(AssertionError, match="twice"):
        kept.sessions._check()
    kept.sessions.close()


@pytest.mark.parametrize("how", ["moved", "lost"])
def test_a_reply_that_reaches_nobody_keeps_no_receipt(bare: Bare, how: str) -> None:
    """Of the service: a worker's answer to an address that the session has left, and one that ZeroMQ does not take."""
    answers: SimpleQueue[tuple[Peer, Reply]] = SimpleQueue()
    registry = TypeRegistry(bare.plane, bare.spill_dir)
    service = Service(bare.plane, bare.arena, registry, str(bare.spill_dir), lambda *answer: answers.put(answer))
    try:
        life = registry.declare(0, 10, "through").life
        registry.find(0, life).store(1, os.urandom(4096))
        client = service.sessions.hello(b"a", ME, MY_START, True, None)
        ask = Request(1, "load_many", {"type": 0, "life": life, "offsets": pack_offsets([1])})
        assert service.request(b"a", encode_request(ask)) is None
        peer, reply = answers.get(timeout=60)
        if how == "moved":
            service.sessions.hello(b"b", ME, MY_START, True, client.number)
        service.answered(peer, reply)
        if how == "lost":
            assert len(client.window.unread) == 1
            service.lost(peer)
        assert not client.window.unread
        service.sessions._check()
    finally:
        service.stop(5.0)


def test_what_the_broker_may_grow_by_goes_with_the_sessions_there_are(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with those that there might be, or one peer's message without end might grow to what is meant for all of them."""
    grown, ended = 0, list[int]()
    monkeypatch.setattr("gcma_shm.broker.server.private_bytes", lambda: grown)
    connections: Any = SimpleNamespace(turn=lambda: None, to_blame=lambda looks: [looks])
    door: Any = SimpleNamespace(socket=None, end=ended.extend)
    with StopSignals() as stop:
        server = Server(door, stop, 4096)
        kept.hello(b"a")
        grown = growth_max(4096, 1)
        for _ in range(2):
            server._look(connections, len(kept.sessions))
        assert not ended
        grown += 1
        server._look(connections, len(kept.sessions))
        assert ended == [1]
        other = kept.hello(b"b")
        server._look(connections, len(kept.sessions))
        kept.end(other)
        server._look(connections, len(kept.sessions))
        assert ended == [1], "what was its may not be freed yet"
        server._look(connections, len(kept.sessions))
        assert ended == [1, 1]
        server.close()
    kept.sessions.close()


def test_the_record_is_used_again_only_after_the_burial(kept: Kept) -> None:
    client = kept.hello(b"a")
    kept.sessions.forget(client)
    assert kept.sessions.find(b"a") is None
    assert kept.records.read(client.number).state is State.DEAD
    assert kept.hello(b"b").number != client.number
    generation = kept.records.read(client.number).generation
    kept.sessions.buried(client.number)
    assert kept.records.read(client.number).generation == generation + 1
    assert kept.hello(b"c").number == client.number
    kept.sessions.close()


def test_the_counts_of_the_departed_are_kept(kept: Kept) -> None:
    client = kept.hello(b"a")
    kept.plane.become(client.number)
    kept.plane.add(kept.plane.geometry.client_at(client.number) + layout.CLIENT_COUNTERS_AT, 41)
    kept.plane.become(layout.BROKER)
    assert kept.sessions.counters()[client.number]["stores"] == 41
    kept.end(client)
    assert kept.sessions.counters()[layout.NOBODY]["stores"] == 41
    again = kept.hello(b"b")
    assert kept.sessions.counters()[again.number]["stores"] == 0
    kept.sessions.close()


def test_a_death_wakes_the_poll(kept: Kept) -> None:
    with forked(lambda said: said.hear()) as child:
        client = kept.hello(b"a", child.pid, start_time(child.pid) or 0)
        poll = select.poll()
        poll.register(client.pidfd, select.POLLIN)
        assert not poll.poll(0)
        child.kill()
        assert poll.poll(60_000)
        assert kept.sessions.by_pidfd[client.pidfd] is client
        kept.end(client)
    assert not kept.sessions.by_pidfd


def test_a_forked_child_inherits_before_it_has_run(kept: Kept) -> None:
    parent = kept.hello(b"a")
    assert kept.sessions.adopt_forked() == []
    number = kept.fork(parent.number)
    assert kept.sessions.adopt_forked() == []
    assert kept.inherited == [(parent.number, number)]
    assert kept.sessions.adopt_forked() == []
    assert kept.inherited == [(parent.number, number)], "once"
    assert kept.sessions.clients[number].pidfd == -1
    kept.sessions._check()
    kept.records.fill(number, State.ALIVE, ME, MY_START)  # the child begins
    assert kept.sessions.adopt_forked() == []
    assert kept.sessions.clients[number].pid == ME
    assert kept.sessions.clients[number].pidfd >= 0
    assert kept.hello(b"b", number=number).number == number
    kept.sessions._check()
    kept.sessions.close()


def test_a_child_that_died_before_anybody_looked(kept: Kept) -> None:
    parent = kept.hello(b"a")
    number = kept.fork(parent.number)
    with forked(lambda _: None) as child:
        start = start_time(child.pid) or 0
        child.receive()
        child.wait()
        kept.records.fill(number, State.ALIVE, child.pid, start)
    (dead,) = kept.sessions.adopt_forked()
    assert dead.number == number
    assert kept.inherited == [(parent.number, number)], "what it held is to be given back in its name"
    kept.end(dead)
    assert kept.sessions.adopt_forked(look_anyway=True) == []
    kept.sessions.close()


def test_grandchildren_come_after_their_parents(kept: Kept) -> None:
    parent = kept.hello(b"a")
    kept.fork(parent.number)
    spare = kept.hello(b"b")  # so that the grandchild's number may be lower than its parent's
    child = kept.fork(parent.number)
    kept.end(spare)
    grandchild = kept.fork(child)
    assert grandchild < child
    kept.sessions.adopt_forked()
    assert kept.inherited.index((parent.number, child)) < kept.inherited.index((child, grandchild))
    kept.sessions._check()
    kept.sessions.close()


def test_a_fork_that_never_came_to_be(kept: Kept, bare: Bare) -> None:
    """Its lock is taken before its record says that it was forked, and goes with the last descriptor of that open file."""
    parent = kept.hello(b"a")
    assert bare.arena.presence is not None
    presence = bare.arena.presence.anew()
    number = kept.fork(parent.number, presence)
    assert kept.sessions.adopt_forked() == []
    presence.close()
    (stillborn,) = kept.sessions.adopt_forked()
    assert stillborn.number == number
    kept.end(stillborn)
    assert kept.records.read(number).state is State.FREE
    kept.sessions.close()


def test_a_client_that_died_on_its_way_to_a_fork(kept: Kept) -> None:
    parent = kept.hello(b"a")
    number = kept.records.take(parent.number)  # TAKEN, and then killed
    assert kept.sessions.adopt_forked(look_anyway=True) == []
    kept.end(parent)
    assert kept.records.read(number).state is State.FREE
    kept.sessions.close()


def test_records_survive_any_content(kept: Kept, bare: Bare) -> None:
    at = bare.arena.geometry.client_at(3)
    for word in (2**64 - 1, 0xFF, 9, 200 << 8 | 77):
        bare.plane.write(at, word)
        assert kept.records.read(3).state is State.DEAD
        assert [record.number for record in kept.records.used()] == [3]
        assert kept.sessions.adopt_forked(look_anyway=True) == []
        client = kept.hello(b"a")
        assert client.number != 3
        kept.end(client)
    for number in (-1, bare.arena.geometry.clients_max + 1):
        with pytest.raises(IndexError):
            kept.records.read(number)


def test_who_a_process_is() -> None:
    assert start_time(ME) == MY_START > 0
    assert start_time(2**22 + 5) is None

    def child(said: Said) -> None:
        said.hear()

    with forked(child) as other:
        start = start_time(other.pid)
        assert start is not None
        assert start >= MY_START
        assert open_pidfd(other.pid, start + 1) is None
        pidfd = open_pidfd(other.pid, start)
        assert pidfd is not None
        os.close(pidfd)
        os.kill(other.pid, signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert start_time(other.pid) is None, "a zombie runs no more"
        assert open_pidfd(other.pid, start) is None
        other.wait()
        assert start_time(other.pid) is None


def test_what_a_client_has_counted_is_counted_also_between_its_end_and_its_burial(kept: Kept) -> None:
    def stores() -> int:
        return sum(counted["stores"] for counted in kept.sessions.counters().values())

    before = stores()
    client = kept.hello(b"a")
    kept.plane.add(kept.records._counter_at(client.number, COUNTERS.index("stores")), 5)
    assert stores() == before + 5
    kept.sessions.forget(client)
    assert stores() == before + 5
    kept.sessions.buried(client.number)
    assert stores() == before + 5
    assert client.number not in kept.sessions.counters()
