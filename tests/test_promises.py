"""What a client may keep from the others, and what it may not, whatever it is stopped, dropped or mistreated in."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import zmq

import gcma_shm
from gcma_shm import layout, messages
from gcma_shm._core import Plane
from gcma_shm.broker.registry import TypeRegistry
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.process import start_time
from gcma_shm.records import Records
from tests.conftest import Bare
from tests.patience import impatient
from tests.processes import stands_still, stopped

WAIT_S = 30.0


@contextmanager
def child(work: Any) -> Iterator[int]:
    """A forked process that does `work` until it is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def until(true: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0)


def pinned(plane: Plane) -> Counter[int]:
    """How many nursery pages each client keeps: granted to it, or claimed by it to be cleaned."""
    g = plane.geometry
    pages: Counter[int] = Counter()
    for page in range(g.nursery_pages):
        life = plane.read(g.life_at + 8 * page)
        if life >> 62 == 1:
            pages[life >> 46 & 0xFFFF] += 1
    for slot in range(g.slots):
        writer = plane.read(g.slots_at + layout.SLOT_BYTES * slot + 8) >> 52
        if writer:
            pages[writer] += 1
    return pages


def test_stopped_clients_keep_no_more_than_their_share() -> None:
    with gcma_shm.embedded("8M", slots=600, clients=12) as client:
        plane = client._plane
        assert plane is not None
        swap = client.swap(0, 400)
        other = client.swap(1, 100, "behind")
        share = plane.geometry.grants_max
        assert share * 12 * 2 <= plane.geometry.nursery_pages
        batch = os.urandom(16 * client.page_size)

        def stored() -> int:
            """Pages stored by the three."""
            records = Records(plane)
            return sum(records.counters(r.number)["stores"] for r in records.used() if r.number != client.number)

        def storing(first: int) -> None:
            while True:
                swap.store_many(range(first, first + 16), batch)

        with child(lambda: storing(0)) as a, child(lambda: storing(100)) as b, child(lambda: storing(200)) as c:
            most = 0
            for round_ in range(40):
                before = stored()
                until(lambda more=before + 20 + 7 * round_: stored() >= more)  # they have run since they were continued
                for pid in (a, b, c):
                    os.kill(pid, signal.SIGSTOP)
                until(lambda: all(map(stands_still, (a, b, c))))  # or what is seen is of several moments
                held = pinned(plane)
                held.pop(layout.BROKER, None)  # it goes on, so what is seen of it is of several moments
                assert all(pages <= share for pages in held.values()), (round_, held, share)
                most = max(most, *held.values(), 0)
                for n in range(200):  # the others go on
                    other.store(n % 100, batch[: client.page_size])
                assert other.load(99) == batch[: client.page_size]
                for pid in (a, b, c):
                    os.kill(pid, signal.SIGCONT)
            assert most > 0, "nobody was ever stopped with a page in hand: this proves nothing"


def test_loading_threads_do_not_keep_others_from_storing(bare: Bare) -> None:
    registry = TypeRegistry(bare.plane, bare.spill_dir)
    swap = registry.declare(0, 100, "behind")
    page = os.urandom(4096)
    swap.store(1, page)
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            assert swap.load(1) == page

    threads = [threading.Thread(target=load) for _ in range(2 * bare.arena.geometry.grants_max + 2)]
    for thread in threads:
        thread.start()
    try:
        for n in range(200):
            swap.store(2 + n % 50, page)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_type_goes_on_after_threads_have_cleaned_its_last_life(bare: Bare) -> None:
    """Direct reclaim by several threads opens and gives back the file of a life; the next life's must be opened then."""
    registry = TypeRegistry(bare.plane, bare.spill_dir)
    page = os.urandom(4096)
    nursery = bare.arena.geometry.nursery_pages
    for _ in range(3):
        swap = registry.declare(1, 3 * nursery, "behind")

        def store(first: int, swap: Any = swap) -> None:
            for n in range(6 * nursery):
                swap.store((first + 7 * n) % (3 * nursery), page)

        threads = [threading.Thread(target=store, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        registry.end(1, swap.life)


def test_the_disk_of_an_ended_type_is_free_at_once(bare: Bare) -> None:
    registry = TypeRegistry(bare.plane, bare.spill_dir)
    swap = registry.declare(0, 64, "through")
    for n in range(64):
        swap.store(n, os.urandom(4096))
    (path,) = bare.spill_dir.glob("000.*")
    with path.open("rb") as still_open:
        assert os.fstat(still_open.fileno()).st_blocks * 512 >= 64 * 4096
        registry.end(0, swap.life)
        assert not path.exists()
        assert os.fstat(still_open.fileno()).st_blocks == 0


def test_a_client_that_nobody_closed_says_goodbye_when_it_is_collected(client: EmbeddedClient) -> None:
    def clients() -> int:
        return int(client.stats()["broker"]["clients"])

    other = gcma_shm.connect(client.endpoint)
    swap = other.swap(3, 10)
    array = other.alloc_contig(4096).numpy(4096)
    del other
    gc.collect()
    assert clients() == 2, "its swap type and its array are in use"
    swap.store(1, b"x-gcma--" * (client.page_size // 8))
    array[:] = 7
    del swap
    gc.collect()
    assert clients() == 2
    del array
    gc.collect()
    until(lambda: clients() == 1)
    until(lambda: client.areas()[0].held == 0)


def test_a_fork_keeps_no_client_from_being_collected(client: EmbeddedClient) -> None:
    other = gcma_shm.connect(client.endpoint)
    begun, begin = os.pipe()

    def wait() -> None:
        os.write(begin, b"x")
        signal.pause()

    with child(wait):
        os.read(begun, 1)
    os.close(begun)
    os.close(begin)
    del other
    gc.collect()
    until(lambda: client.stats()["broker"]["clients"] == 1)


def test_every_process_is_watched_however_descriptors_are_used_again(client: EmbeddedClient) -> None:
    """One client leaves and another comes in one turn of the broker's loop, so that its pidfd gets the number of the last."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def hello(pid: int) -> list[bytes]:
        values = {"pid": pid, "start": start_time(pid), "mapped": True}
        return messages.encode_request(messages.Request(1, "hello", values))  # type: ignore[return-value]

    def dies_with_a_buffer() -> None:
        os.read(go, 1)
        mine = zmq.Context()
        socket = mine.socket(zmq.DEALER)
        socket.connect(client.endpoint)
        socket.send_multipart(hello(os.getpid()))
        socket.send(msgpack.packb([1, 2, "alloc_contig", {"nbytes": 4096}]))
        socket.recv_multipart()
        socket.recv_multipart()
        os.write(told, b"x")
        signal.pause()

    for _ in range(5):
        go, let_go = os.pipe()
        heard, told = os.pipe()
        leaver = context.socket(zmq.DEALER)
        leaver.connect(client.endpoint)
        leaver.send_multipart(hello(os.getpid()))
        leaver.recv_multipart()
        with child(dies_with_a_buffer):
            with stopped(client.broker_pid):
                leaver.send(msgpack.packb([1, 2, "bye", {}]))
                os.write(let_go, b"x")
            os.read(heard, 1)
            assert client.areas()[0].held == client.page_size
        until(lambda: client.areas()[0].held == 0)
        leaver.close()
        for fd in (go, let_go, heard, told):
            os.close(fd)
    context.term()


def test_a_store_by_message_that_was_given_up_never_lands_torn() -> None:
    with (
        gcma_shm.embedded("64M", page_size="1M", slots=8) as owner,
        gcma_shm.connect(owner.endpoint, mapped=False, timeout=WAIT_S) as other,
    ):
        swap = other.swap(0, 4)
        page = bytearray(b"a-gcma--" * (owner.page_size // 8))
        with stopped(owner.broker_pid), impatient(other):
            try:
                swap.store(1, page)
            except gcma_shm.BrokerUnavailable:
                page[:] = b"b-gcma--" * (owner.page_size // 8)
            else:
                raise AssertionError("a stopped broker cannot have answered")
        mapped = owner.swap(0, 4)
        until(lambda: 1 in mapped)
        assert mapped.load(1) == b"a-gcma--" * (owner.page_size // 8)


def test_forks_while_clients_come_and_other_threads_fork(client: EmbeddedClient) -> None:
    """Each child is a client of its own or none, whatever other threads make or fork meanwhile; the parent goes on."""
    swap = client.swap(0, 10)
    swap.store(1, b"x-gcma--" * (client.page_size // 8))
    stop = threading.Event()
    failures: list[int] = []

    def come_and_go() -> None:
        while not stop.is_set():
            gcma_shm.connect(client.endpoint).close()

    def fork() -> None:
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                try:
                    own = client.number != os.getppid() and swap.load(1) == b"x-gcma--" * (client.page_size // 8)
                    with client.alloc_contig(4096):
                        os._exit(0 if own else 1)
                finally:
                    os._exit(2)
            if os.waitpid(pid, 0)[1]:
                failures.append(pid)

    threads = [threading.Thread(target=come_and_go), *(threading.Thread(target=fork) for _ in range(2))]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    stop.set()
    threads[0].join()
    assert not failures
    assert client.areas()
    until(lambda: client.areas()[0].held == 0)
