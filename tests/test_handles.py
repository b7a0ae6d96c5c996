"""Buffers on their way between processes: pickled, handed over, by name; and handles that come too late."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gcma_shm
from gcma_shm import (
    ArenaError,
    ArenaExhausted,
    Buffer,
    BufferExists,
    Client,
    Closed,
    NoSuchBuffer,
    QuotaExceeded,
    StaleHandle,
)
from gcma_shm._core import address_of
from gcma_shm.arena import remove_dead
from gcma_shm.clients import handles
from gcma_shm.clients.channel import WINDOW
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.endpoint import arena_name
from tests.processes import WAIT_S, Said, broker, eventually, forked

PAGE = 4096
HAND_OVERS_MAX = 1024  # of one buffer, as the docstring of the table says


def held(client: Client) -> int:
    return sum(area.held for area in client.areas())


def clients(client: Client) -> int:
    return int(client.stats()["broker"]["clients"])


def fill_until_lent(client: Client) -> None:
    swap = client.swap(0, 2000, "behind")

    def is_lent() -> bool:
        for n in range(2000):
            swap.store(n, (n + 1).to_bytes(8, "little") * (PAGE // 8))
        return sum(area.lent for area in client.areas()) > 0

    assert eventually(is_lent)


@pytest.fixture
def client() -> Iterator[EmbeddedClient]:
    """Smaller than everybody's, so that it is full at once: about 900 pages in one area."""
    with gcma_shm.embedded("4M", timeout=20) as owner:
        yield owner


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


# --- in one process


def test_twice_in_one_process_counts_twice(client: EmbeddedClient) -> None:
    first = client.alloc_contig(PAGE)
    second, third = pickle.loads(pickle.dumps(first)), pickle.loads(pickle.dumps(first))
    with first.view as a, second.view as b:
        a[:5] = b"hello"
        assert bytes(b[:5]) == b"hello"
    first.free()
    first.free()  # twice: no effect on the others' holds
    third.free()
    assert held(client) == PAGE
    with second.view as view:
        assert bytes(view[:5]) == b"hello"
    second.free()
    assert held(client) == 0


def deaf(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the client asks the broker for nothing."""

    def asked(operation: str, *_: Any, **__: Any) -> None:
        raise AssertionError(f"the broker was asked: {operation}")

    monkeypatch.setattr(client._channel, "request", asked)


def test_what_is_held_is_attached_without_a_word_to_the_broker(
    client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = client.alloc_contig(3 * PAGE, name="frames")
    data = pickle.dumps(first)
    with monkeypatch.context() as patch:
        deaf(client, patch)
        second = pickle.loads(data)
    assert (second.nbytes, second.area, second.offset, second.name) == (3 * PAGE, first.area, first.offset, "frames")
    with first.view as a, second.view as b:
        a[-5:] = b"hello"
        assert bytes(b[-5:]) == b"hello"
    first.free()
    with monkeypatch.context() as patch:
        deaf(client, patch)
        third = pickle.loads(data)
    second.free()
    assert held(client) == 3 * PAGE
    third.free()
    assert held(client) == 0
    with pytest.raises(StaleHandle):  # the last hold has ended
        pickle.loads(data)


def test_what_the_parent_held_is_attached_without_a_word_to_the_broker(
    client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = client.alloc_contig(PAGE)
    data = pickle.dumps(buffer)

    def child(said: Said) -> None:
        with monkeypatch.context() as patch:
            deaf(client, patch)
            mine = pickle.loads(data)
        buffer.free()  # what is held again is not inherited: it stays
        said.say()
        said.hear()
        with mine.view as view:
            assert bytes(view[:5]) == b"hello"
        mine.free()
        said.say()
        said.hear()

    with forked(child) as running:
        running.receive()
        with buffer.view as view:
            view[:5] = b"hello"
        buffer.free()
        assert held(client) == PAGE, "the child holds it"
        running.tell()
        running.receive()
        assert held(client) == 0
        running.tell()
        running.receive()


def test_a_hand_over_to_who_holds_it_is_over(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE)
    handle = buffer.hand_over(timeout=600)
    handle.attach(client).free()
    buffer.free()
    assert held(client) == 0, "the handle's own hold has ended"


def test_each_is_refused_for_its_own_views(client: EmbeddedClient) -> None:
    first = client.alloc_contig(PAGE)
    second = pickle.loads(pickle.dumps(first))
    view = second.view
    first.free()
    with pytest.raises(BufferError):
        second.free()
    view.release()
    second.free()
    assert held(client) == 0


def test_threads_load_handles_at_once(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE)
    data = pickle.dumps(buffer)
    with ThreadPoolExecutor(6) as pool:
        loaded = list(pool.map(pickle.loads, [data] * 30))
    assert clients(client) == 1
    buffer.free()
    assert held(client) == PAGE
    for one in loaded:
        one.free()
    assert held(client) == 0


def test_an_array_keeps_what_was_attached(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE)
    array = pickle.loads(pickle.dumps(buffer)).numpy(PAGE)
    gc.collect()
    buffer.free()
    array[:] = 7
    with client.alloc_contig(client.areas()[0].largest_free, zero=True):
        assert (array == 7).all()
    assert held(client) == PAGE
    part = array[10:20]
    del array
    gc.collect()
    assert held(client) == PAGE
    assert part.tolist() == [7] * 10
    del part
    gc.collect()
    assert eventually(lambda: held(client) == 0)


def test_the_makers_array_keeps_the_makers_buffer(client: EmbeddedClient) -> None:
    array = client.alloc_contig(PAGE, name="kept").numpy((2, PAGE // 16), np.float64)
    gc.collect()
    array[:] = 1.5
    with client.attach("kept") as again:
        values = again.numpy((2, PAGE // 16), np.float64)
        assert (values == 1.5).all()
        del values
    assert held(client) == PAGE
    del array
    gc.collect()
    assert eventually(lambda: held(client) == 0)
    assert client.names() == []


def test_a_fork_between_pickling_and_loading(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE)
    data = pickle.dumps(buffer)

    def child(said: Said) -> None:
        mine = pickle.loads(data)  # it holds the inherited one, too
        buffer.free()
        said.say()
        said.hear()
        mine.free()

    with forked(child) as running:
        running.receive()
        buffer.free()
        assert held(client) == PAGE
        running.tell()
        running.receive()
        assert held(client) == 0


# --- stale


def test_too_late(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE)
    data = pickle.dumps(buffer)
    buffer.free()
    with pytest.raises(StaleHandle):
        pickle.loads(data)
    with pytest.raises(StaleHandle):
        pickle.dumps(buffer)
    with pytest.raises(StaleHandle):
        buffer.hand_over()
    assert held(client) == 0


def test_never_the_memory_that_is_there_now(client: EmbeddedClient) -> None:
    """The next buffer has the same place and the same entry of the table; its generation is another."""
    old = client.alloc_contig(PAGE)
    data = pickle.dumps(old)
    place = old.offset
    old.free()
    for _ in range(20):
        with client.alloc_contig(PAGE) as new:
            assert new.offset == place
            assert pickle.dumps(new) != data
            with pytest.raises(StaleHandle):
                pickle.loads(data)
            old.free()
            assert held(client) == PAGE


def test_a_reservation_in_the_place_of_a_buffer(client: EmbeddedClient) -> None:
    old = client.alloc_contig(PAGE)
    data = pickle.dumps(old)
    old.free()
    with client.reserve(PAGE) as reservation, pytest.raises(StaleHandle):
        pickle.loads(data)
    data = pickle.dumps(client.reserve(PAGE))
    gc.collect()
    with client.alloc_contig(PAGE), pytest.raises(StaleHandle):
        pickle.loads(data)
    assert reservation.released


def test_of_another_arena(client: EmbeddedClient) -> None:
    with gcma_shm.embedded("4M") as other:
        ours, theirs = client.alloc_contig(PAGE), other.alloc_contig(2 * PAGE)
        loaded = pickle.loads(pickle.dumps(theirs))
        assert loaded.nbytes == 2 * PAGE, "each by the client of its arena"
        loaded.free()
        handle = theirs.hand_over()
        with pytest.raises(StaleHandle, match="another arena"):
            handle.attach(client)
        with pytest.raises(StaleHandle, match="another arena"):
            client.attach(handle)
        handle.attach(other).free()
        theirs.free()
        assert (held(client), held(other)) == (PAGE, 0)
        ours.free()


def test_of_an_arena_that_has_ended() -> None:
    with gcma_shm.embedded("4M") as other:
        data = pickle.dumps(other.alloc_contig(PAGE))
    with pytest.raises((gcma_shm.BrokerUnavailable, StaleHandle)):
        pickle.loads(data)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_of_a_brokers_former_life(tmp_path: Path, number: int) -> None:
    """The broker on the same endpoint gives out the same place in the same entry, and serves another arena."""
    endpoint = f"ipc://{os.environ['XDG_RUNTIME_DIR']}/former/broker"
    options = ("--spill-dir", str(tmp_path / "spill"))
    with broker(endpoint, *options, size="4M") as first:
        before = gcma_shm.connect(endpoint)
        old = before.alloc_contig(PAGE)
        place, data, claimed = old.offset, pickle.dumps(old), pickle.dumps(before.reserve(PAGE))
        handle = old.hand_over()
        first.stop(number)
    remove_dead(arena_name(endpoint))  # what a clean stop has done already, and a takeover would not
    before.close()
    with broker(endpoint, *options, size="4M"), gcma_shm.connect(endpoint) as now:
        new = now.alloc_contig(PAGE)
        assert new.offset == place
        for attach in (
            lambda: pickle.loads(data),
            lambda: pickle.loads(claimed),
            lambda: pickle.loads(pickle.dumps(handle)),
            lambda: now.attach(handle),
            handle.attach,
        ):
            with pytest.raises(StaleHandle):
                attach()
        assert clients(now) == 1, "no client was left by the attempts"
        assert held(now) == PAGE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_of_a_former_life_whose_client_is_still_there(tmp_path: Path, number: int) -> None:
    endpoint = f"ipc://{os.environ['XDG_RUNTIME_DIR']}/former/broker"
    options = ("--spill-dir", str(tmp_path / "spill"))
    with broker(endpoint, *options, size="4M") as first:
        before = gcma_shm.connect(endpoint, timeout=WAIT_S)
        data = pickle.dumps(before.alloc_contig(PAGE))
        first.stop(number)
    remove_dead(arena_name(endpoint))  # what a clean stop has done already, and a takeover would not
    with broker(endpoint, *options, size="4M"), gcma_shm.connect(endpoint) as now:
        with now.alloc_contig(PAGE), pytest.raises((StaleHandle, Closed)):
            pickle.loads(data)
        before.close()
        assert held(now) == 0


def test_a_client_by_messages_cannot_attach(client: EmbeddedClient) -> None:
    handle = client.alloc_contig(PAGE, name="here").hand_over()
    with gcma_shm.connect(client.endpoint, mapped=False) as other:
        for what in ("here", handle):
            with pytest.raises(ArenaError, match="map"):
                other.attach(what)
    with pytest.raises(TypeError):
        pickle.dumps(client)


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
    fill_until_lent(client)
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
        fill_until_lent(client)
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
            fill_until_lent(client)
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
            fill_until_lent(client)
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


# --- names


def test_by_name(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(3 * PAGE, name="frame/1")
    assert buffer.name == "frame/1"
    assert "frame/1" in repr(buffer)
    with buffer.view as view:
        view[:5] = b"hello"
    with gcma_shm.connect(client.endpoint) as other:
        theirs = other.attach("frame/1")
        assert (theirs.nbytes, theirs.offset, theirs.name) == (3 * PAGE, buffer.offset, "frame/1")
        with theirs.view as view:
            assert bytes(view[:5]) == b"hello"
        for taken in (client, other):
            with pytest.raises(BufferExists, match="frame/1"):
                taken.alloc_contig(PAGE, name="frame/1")
        (told,) = client.names()
        assert (told.name, told.area, told.offset, told.nbytes, told.holders, told.reservation) == (
            "frame/1",
            "default",
            buffer.offset,
            3 * PAGE,
            2,
            False,
        )
        buffer.free()
        assert client.names()[0].holders == 1
        with pytest.raises(BufferExists):
            client.alloc_contig(PAGE, name="frame/1")
    assert client.names() == []
    with pytest.raises(NoSuchBuffer, match="frame/1"):
        client.attach("frame/1")
    with client.alloc_contig(PAGE, name="frame/1"):
        assert [told.nbytes for told in client.names()] == [PAGE]
    assert isinstance(BufferExists("x"), FileExistsError)


def test_names_in_order(client: EmbeddedClient) -> None:
    names = ["b", "a", "B", "é", "10", "9", "日本", "z z"]
    kept = [(client.reserve if n % 3 == 0 else client.alloc_contig)(PAGE, name=name) for n, name in enumerate(names)]
    kept += [client.alloc_contig(PAGE)]
    assert [told.name for told in client.names()] == sorted(names)
    assert [told.name for told in client.names() if told.reservation] == sorted(names[::3])


def test_many_names() -> None:
    """More than one answer holds."""
    with gcma_shm.embedded("160M", slots=1000) as client:
        names = [f"buffer {n:04}" for n in range(2100)]
        kept = []
        try:
            for name in reversed(names):
                kept.append(client.alloc_contig(1, name=name))
        except QuotaExceeded:
            pytest.fail(f"room for {len(kept)} only")
        assert [told.name for told in client.names()] == names


@pytest.mark.parametrize(
    "name", ["x", "x" * 48, "日本語", "a b", "/dev/shm/psm_1", "é" * 24, "'\"\\%s{}", "default", "=,;"]
)
def test_names_of_odd_text(client: EmbeddedClient, name: str) -> None:
    with client.alloc_contig(PAGE, name=name) as buffer, client.attach(name) as again:
        assert buffer.name == again.name == name
        assert [told.name for told in client.names()] == [name]
        loaded = pickle.loads(pickle.dumps(buffer))
        assert loaded.name == name
        loaded.free()
    assert client.names() == []


@pytest.mark.parametrize(
    ("name", "error"),
    [("", ValueError), ("x" * 49, ValueError), ("é" * 25, ValueError), ("a\nb", ValueError), ("a\0", ValueError),
     ("\ud800", ValueError), (b"x", TypeError), (5, TypeError)],
    ids=repr,
)  # fmt: skip
def test_names_that_are_none(client: EmbeddedClient, name: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        client.alloc_contig(PAGE, name=name)
    with pytest.raises(error):
        client.attach(name)
    assert client.names() == []
    assert held(client) == 0


def test_attach_takes_a_name_or_a_handle(client: EmbeddedClient) -> None:
    with client.alloc_contig(PAGE) as buffer:
        for wrong in (None, 7, buffer):
            with pytest.raises(TypeError):
                client.attach(wrong)  # type: ignore[arg-type] # on purpose


def test_quotas_count_what_is_attached(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(10 * PAGE, name="large")
    with gcma_shm.connect(client.endpoint) as other:
        other.quota(9 * PAGE)
        for what in ("large", buffer.hand_over(timeout=0.01)):
            with pytest.raises(QuotaExceeded):
                other.attach(what)
        other.quota(10 * PAGE)
        with other.attach("large"), other.attach("large"):
            assert other.quota().held == 10 * PAGE, "held twice, counted once"
        assert other.quota().held == 0
    buffer.free()
    assert eventually(lambda: held(client) == 0)


# --- several at once


def test_several_are_attached_to_in_the_time_of_one(client: EmbeddedClient) -> None:
    with gcma_shm.connect(client.endpoint, mapped=True) as other:
        buffers = [client.alloc_contig(PAGE) for _ in range(WINDOW + 2)]
        for number, buffer in enumerate(buffers):
            buffer.view[:1] = bytes([number])
        found = other.attach_handles([buffer.reference for buffer in buffers])
        assert [buffer.view[0] for buffer in found] == list(range(WINDOW + 2))
        assert other.attach_handles([]) == []
        for buffer in buffers:
            buffer.free()
        assert other.quota().held == held(client) == (WINDOW + 2) * PAGE
        with other.view_of(found[0].reference) or memoryview(b"") as view:
            assert view.nbytes == PAGE
            with pytest.raises(BufferError):
                found[0].free()
        gone = found[0].reference
        del found, buffer
        assert eventually(lambda: other.stats() is not None and held(client) == 0)
        assert other.view_of(gone) is None


@pytest.mark.parametrize("which", [2, WINDOW + 1])
def test_of_several_one_that_is_gone(client: EmbeddedClient, which: int) -> None:
    """... leaves none of the others attached to, also while somebody has the error."""
    with gcma_shm.connect(client.endpoint, mapped=True) as other:
        buffers = [client.alloc_contig(PAGE) for _ in range(which + 2)]
        references = [buffer.reference for buffer in buffers]
        buffers[which].free()
        with pytest.raises(StaleHandle) as raised:
            other.attach_handles(references)
        assert eventually(lambda: other.quota().held == 0)
        del raised
        assert len(other.attach_handles(references[:2])) == 2, "it goes on"
        with pytest.raises(StaleHandle, match="another arena"):
            other.attach_handles([references[0], references[1]._replace(arena_id=bytes(16))])
        for buffer in buffers:
            buffer.free()
    assert eventually(lambda: held(client) == 0)


def test_several_with_an_interruption(client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between two replies: what was attached to is given back by the hello that follows."""
    with gcma_shm.connect(client.endpoint, mapped=True) as other:
        buffers = [client.alloc_contig(PAGE) for _ in range(3)]
        references = [buffer.reference for buffer in buffers]
        take, taken = other._take, iter((False, True))

        def interrupted(*what: Any) -> Any:
            if next(taken):
                raise KeyboardInterrupt
            return take(*what)

        monkeypatch.setattr(other, "_take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            other.attach_handles(references)
        monkeypatch.setattr(other, "_take", take)
        assert eventually(lambda: other.quota().held == 0)
        assert len(other.attach_handles(references)) == 3
        for buffer in buffers:
            buffer.free()


def test_memory_of_a_freed_buffer_is_not_its_any_more(client: EmbeddedClient) -> None:
    freed = client.alloc_contig(2 * PAGE)
    assert client.locate(address_of(freed), PAGE) == (freed.reference, 0)
    old = freed.reference
    freed.free()
    with client.alloc_contig(PAGE) as buffer:
        assert (buffer.offset, freed.offset) == (0, 0)
        assert client.locate(address_of(buffer), PAGE) == (buffer.reference, 0)
        assert client.view_of(old) is None
