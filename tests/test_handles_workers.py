"""Buffers on their way to workers of every start method: pickled, handed over, claimed and shared."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

import pytest

import gcma_shm
from gcma_shm import ArenaExhausted, Buffer, QuotaExceeded, StaleHandle
from gcma_shm.clients import handles
from gcma_shm.clients.embedded import EmbeddedClient
from tests.client import PAGE, clients, held
from tests.processes import WAIT_S, Said, eventually, forked
from tests.using_areas import fill_until_lent

pytestmark = pytest.mark.arena("small")

HAND_OVERS_MAX = 1024  # of one buffer, as the docstring of the table says


# --- workers of every start method


def receive(talk: Connection, queue: Any, endpoint: str | None) -> None:
    """A worker: gets a buffer, reads and writes, and frees it when it is told."""
    own = gcma_shm.connect(endpoint) if endpoint else None
    buffer: Buffer = queue.get() if queue is not None else talk.recv()
    with buffer.view as view:
        found = bytes(view[:5])
        view[5:10] = b"there"
    talk.send((found, buffer.nbytes, buffer.area, buffer.offset, buffer.name))
    while talk.recv() == "look":
        with buffer.view as view:
            talk.send(bytes(view[:10]))
    buffer.free()
    talk.send("freed")
    talk.recv()
    if own is not None:
        own.close()


class Worker:
    """A process that runs `receive`."""

    def __init__(self, method: str, by_queue: bool, endpoint: str | None) -> None:
        context: Any = multiprocessing.get_context(method)
        self.talk, theirs = context.Pipe()
        self.queue = context.Queue() if by_queue else None
        self.process = context.Process(target=receive, args=(theirs, self.queue, endpoint))
        self.process.start()
        theirs.close()

    def send(self, buffer: object) -> None:
        (self.queue.put if self.queue is not None else self.talk.send)(buffer)

    def hear(self) -> Any:
        assert self.talk.poll(WAIT_S), "the worker says nothing"
        return self.talk.recv()

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()
        self.talk.close()
        if self.queue is not None:
            self.queue.close()
            self.queue.join_thread()


@pytest.fixture
def workers() -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(method: str = "spawn", by_queue: bool = False, endpoint: str | None = None) -> Worker:
        made.append(Worker(method, by_queue, endpoint))
        return made[-1]

    yield make
    for worker in made:
        worker.end()
    forkserver._forkserver._stop()  # type: ignore[attr-defined] # its socket is in this test's directory


@pytest.mark.parametrize("by_queue", [True, False], ids=["queue", "pipe"])
@pytest.mark.parametrize("connected", [True, False], ids=["connected", "by itself"])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_pickled_to_a_worker(
    client: EmbeddedClient, workers: Callable[..., Worker], method: str, connected: bool, by_queue: bool
) -> None:
    worker = workers(method, by_queue, client.endpoint if connected else None)
    buffer = client.alloc_contig(3 * PAGE, name="frame")
    with buffer.view as view:
        view[:5] = b"hello"
        worker.send(buffer)
        assert worker.hear() == (b"hello", 3 * PAGE, "default", buffer.offset, "frame")
        assert bytes(view[:10]) == b"hellothere"
        assert clients(client) == 2, "one client, whoever connected"
        view[:5] = b"HELLO"
    worker.talk.send("look")
    assert worker.hear() == b"HELLOthere"
    buffer.free()
    assert held(client) == 3 * PAGE, "the worker holds it"
    worker.talk.send("look")
    assert worker.hear() == b"HELLOthere"
    worker.talk.send("free")
    assert worker.hear() == "freed"
    assert held(client) == 0
    worker.talk.send("end")
    worker.process.join(WAIT_S)
    assert worker.process.exitcode == 0


@pytest.mark.parametrize("killed", ["first", "last"])
def test_the_memory_is_free_when_the_last_holder_died(
    client: EmbeddedClient, workers: Callable[..., Worker], killed: str
) -> None:
    worker = workers()
    buffer = client.alloc_contig(3 * PAGE)
    worker.send(buffer)
    worker.hear()
    if killed == "first":
        worker.process.kill()
        assert eventually(lambda: clients(client) == 1)
        assert held(client) == 3 * PAGE
        with buffer.view as view:
            assert bytes(view[5:10]) == b"there"
        buffer.free()
    else:
        buffer.free()
        assert held(client) == 3 * PAGE
        worker.process.kill()
        assert eventually(lambda: clients(client) == 1)
    assert held(client) == 0


def test_a_worker_that_forgets_it_holds_nothing_and_stays_connected(client: EmbeddedClient) -> None:
    """It connected by itself, and the next handle needs no session of its own."""

    def child(said: Said) -> None:
        client.close()
        for _ in range(2):
            buffer = pickle.loads(said.hear())
            said.say(buffer.nbytes)
            said.hear()
            del buffer
            gc.collect()
            mine = handles.client_of(client.endpoint, arena_id)
            mine.stats()  # what was dropped is told with any request
            said.say((mine.number, mine._generation))
        said.hear()

    arena_id, sessions = client.arena_id, set()
    with forked(child) as running:
        for _ in range(2):
            buffer = client.alloc_contig(PAGE)
            running.tell(pickle.dumps(buffer))
            assert running.receive() == PAGE
            # The record that it inherited and closed without a word may be found by its lock alone, within a second.
            assert eventually(lambda: clients(client) == 2)
            running.tell()
            sessions.add(running.receive())
            buffer.free()
            assert held(client) == 0
        assert len(sessions) == 1
        running.tell()
    assert eventually(lambda: clients(client) == 1)


# --- handed over


def test_the_sender_frees_before_anybody_attaches(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(3 * PAGE)
    with buffer.view as view:
        view[:5] = b"hello"
    data = pickle.dumps(buffer.hand_over())
    buffer.free()
    assert held(client) == 3 * PAGE, "the handle holds it"
    whole = client.areas()[0].largest_free
    with client.alloc_contig(whole, zero=True), pytest.raises(ArenaExhausted):
        client.alloc_contig(3 * PAGE)
    got = pickle.loads(data)
    assert isinstance(got, Buffer)
    with got.view as view:
        assert bytes(view[:5]) == b"hello"
    assert (got.nbytes, got.offset) == (3 * PAGE, buffer.offset)
    got.free()
    assert held(client) == 0, "attached once, it holds nothing"
    with pytest.raises(StaleHandle):
        pickle.loads(data)


@pytest.mark.parametrize("how", ["killed", "closed"])
def test_the_sender_ends_before_anybody_attaches(client: EmbeddedClient, how: str) -> None:
    def child(said: Said) -> None:
        own = gcma_shm.connect(client.endpoint)
        buffer = own.alloc_contig(3 * PAGE)
        with buffer.view as view:
            view[:5] = b"hello"
        said.say(pickle.dumps(buffer.hand_over()))
        if how == "closed":
            own.close()
            said.say()
        said.hear()

    with forked(child) as running:
        data = running.receive()
        if how == "closed":
            running.receive()
        running.kill()
    assert eventually(lambda: clients(client) == 1)
    assert held(client) == 3 * PAGE
    with pickle.loads(data) as buffer, buffer.view as view:
        assert bytes(view[:5]) == b"hello"
    assert held(client) == 0


def test_to_a_worker(client: EmbeddedClient, workers: Callable[..., Worker]) -> None:
    worker = workers("spawn", True)
    buffer = client.alloc_contig(3 * PAGE)
    with buffer.view as view:
        view[:5] = b"hello"
    handle = buffer.hand_over()
    buffer.free()
    worker.send(handle)
    assert worker.hear()[0] == b"hello"
    assert held(client) == 3 * PAGE
    worker.talk.send("free")
    worker.hear()
    assert held(client) == 0


def test_its_time_is_over(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE)
    short, long = buffer.hand_over(timeout=0.01), buffer.hand_over(timeout=600)
    data = pickle.dumps(short)
    buffer.free()
    assert held(client) == PAGE
    long.attach().free()
    assert eventually(lambda: held(client) == 0)
    with pytest.raises(StaleHandle):
        pickle.loads(data)
    with pytest.raises(StaleHandle):
        long.attach()


def test_time_over_disturbs_no_holder(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE)
    other = client.alloc_contig(PAGE)
    handle = buffer.hand_over(timeout=0.01)
    other.hand_over(timeout=0.01)
    other.free()
    assert eventually(lambda: held(client) == PAGE), "those of one round end together"
    assert not buffer.freed
    with handle.attach() as late:  # it holds nothing any more, and the buffer is there
        buffer.free()
        assert late.nbytes == held(client)
    assert held(client) == 0


def test_attached_once_ends_the_token(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE)
    handle = buffer.hand_over()
    first, second = handle.attach(client), client.attach(handle)
    buffer.free()
    first.free()
    assert held(client) == PAGE, "the second was attached while it was there"
    second.free()
    assert held(client) == 0


def test_several_under_way(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE)
    handles = [pickle.dumps(buffer.hand_over()) for _ in range(5)]
    buffer.free()
    for data in handles:
        assert held(client) == PAGE
        pickle.loads(data).free()
    assert held(client) == 0


def test_a_bound_on_handles_under_way(client: EmbeddedClient) -> None:
    with client.alloc_contig(PAGE) as buffer:
        # None is over before the last is made.
        handles = [buffer.hand_over(timeout=3600) for _ in range(HAND_OVERS_MAX)]
        with pytest.raises(QuotaExceeded):
            buffer.hand_over()
        handles.pop().attach().free()
        handles.append(buffer.hand_over(timeout=3600))
    for handle in handles:
        handle.attach().free()
    assert held(client) == 0


@pytest.mark.parametrize(
    ("timeout", "error"), [(-1, ValueError), (float("nan"), ValueError), (1e9, ValueError), ("1", TypeError)]
)
def test_a_time_that_is_none(client: EmbeddedClient, timeout: Any, error: type[Exception]) -> None:
    with client.alloc_contig(PAGE) as buffer, pytest.raises(error):
        buffer.hand_over(timeout)
    assert held(client) == 0


# --- claimed buffers


@pytest.mark.parametrize("first", ["claimer", "worker"])
def test_a_claimed_buffer_has_co_claimers(client: EmbeddedClient, workers: Callable[..., Worker], first: str) -> None:
    worker = workers()
    size = client.areas()[0].largest_free
    reservation = client.reserve(size)
    buffer = reservation.claim()
    with buffer.view as view:
        view[:5] = b"hello"
    worker.send(buffer)
    assert worker.hear()[0] == b"hello"
    if first == "claimer":
        buffer.free()
        assert held(client) == size
        with pytest.raises(ArenaExhausted):
            reservation.claim()
        worker.talk.send("look")
        assert worker.hear() == b"hellothere"
        worker.talk.send("free")
        worker.hear()
    else:
        worker.talk.send("free")
        worker.hear()
        assert held(client) == size
        with buffer.view as view:
            assert bytes(view[:10]) == b"hellothere"
        buffer.free()
    assert held(client) == 0, "the last free lends"
    fill_until_lent(client, "default")
    reservation.claim().free()
    reservation.release()
    assert client.areas()[0].largest_free == size


@pytest.mark.parametrize("killed", ["first", "last"])
def test_a_co_claimers_death(client: EmbeddedClient, workers: Callable[..., Worker], killed: str) -> None:
    worker = workers()
    reservation = client.reserve(10 * PAGE)
    buffer = reservation.claim()
    worker.send(buffer)
    worker.hear()
    if killed == "last":
        buffer.free()
        assert held(client) == 10 * PAGE
    worker.process.kill()
    assert eventually(lambda: clients(client) == 1)
    if killed == "first":
        assert held(client) == 10 * PAGE
        with buffer.view as view:
            assert bytes(view[5:10]) == b"there"
        buffer.free()
    assert held(client) == 0
    reservation.claim().free()


def test_the_claimers_death_leaves_its_co_claimers_memory(client: EmbeddedClient) -> None:
    def child(said: Said) -> None:
        own = gcma_shm.connect(client.endpoint)
        buffer = own.reserve(10 * PAGE).claim()
        with buffer.view as view:
            view[:5] = b"hello"
            said.say(pickle.dumps(buffer))
            said.hear()

    with forked(child) as running:
        buffer = pickle.loads(running.receive())
        running.kill()
    assert eventually(lambda: clients(client) == 1)
    with buffer.view as view:
        fill_until_lent(client, "default")
        assert bytes(view[:5]) == b"hello"
    (area,) = client.areas()
    assert (area.held, area.reserved) == (10 * PAGE, 10 * PAGE)
    buffer.free()
    (area,) = client.areas()
    assert (area.held, area.reserved) == (0, 0), "the reservation had no other holder"


def test_release_leaves_a_co_claimers_memory(client: EmbeddedClient) -> None:
    with gcma_shm.connect(client.endpoint) as other:
        reservation = client.reserve(10 * PAGE)
        buffer = reservation.claim()
        with buffer.view as view:
            view[:5] = b"hello"
        theirs = buffer.hand_over().attach(other)
        reservation.release()
        assert buffer.freed
        with theirs.view as view:
            fill_until_lent(client, "default")
            assert bytes(view[:5]) == b"hello"
        assert client.areas()[0].reserved == 10 * PAGE
        theirs.free()
        assert client.areas()[0].reserved == 0


@pytest.mark.parametrize("attached", [True, False])
def test_a_claimed_buffer_is_handed_over(client: EmbeddedClient, attached: bool) -> None:
    reservation = client.reserve(10 * PAGE)
    buffer = reservation.claim()
    with buffer.view as view:
        view[:5] = b"hello"
    data = pickle.dumps(buffer.hand_over(timeout=600 if attached else 0.01))
    buffer.free()
    if attached:
        assert held(client) == 10 * PAGE, "the handle holds the claim"
        with pytest.raises(ArenaExhausted):
            reservation.claim()
        with pickle.loads(data) as got, got.view as view:
            fill_until_lent(client, "default")
            assert bytes(view[:5]) == b"hello"
    assert eventually(lambda: held(client) == 0)
    with reservation.claim():
        with pytest.raises(StaleHandle):  # of the claim before
            pickle.loads(data)
        assert held(client) == 10 * PAGE
    reservation.claim().free()


def test_a_claim_that_is_over(client: EmbeddedClient) -> None:
    reservation = client.reserve(10 * PAGE)
    buffer = reservation.claim()
    data = pickle.dumps(buffer)
    buffer.free()
    with pytest.raises(StaleHandle):
        pickle.loads(data)
    with reservation.claim() as again, pytest.raises(StaleHandle):
        pickle.loads(data)
    assert again.freed
    reservation.release()
    with pytest.raises(StaleHandle):
        pickle.loads(data)
    assert client.areas()[0].reserved == 0


@pytest.mark.parametrize("first", ["claimed", "attached"])
def test_a_claimed_buffer_twice_in_one_process(client: EmbeddedClient, first: str) -> None:
    reservation = client.reserve(10 * PAGE)
    one = reservation.claim()
    two = pickle.loads(pickle.dumps(one))
    ends = [one, two] if first == "claimed" else [two, one]
    ends[0].free()
    assert held(client) == 10 * PAGE
    with pytest.raises(ArenaExhausted):
        reservation.claim()
    with ends[1].view as view:
        view[:5] = b"hello"
    ends[1].free()
    assert held(client) == 0
    reservation.claim().free()
