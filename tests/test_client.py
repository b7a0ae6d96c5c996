"""Clients in threads, in forked children and their children, in workers of every start method, and after a death."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, cast

import pytest
import zmq

import gcma_shm
from gcma_shm import ArenaExhausted, BrokerUnavailable, Client, Closed, GcmaError
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.endpoint import arena_name
from gcma_shm.records import Records
from tests.invariants import check_at_rest
from tests.patience import impatient
from tests.processes import WAIT_S, Said, broker, descriptors, eventually, forked, in_fork, start_python, stopped

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # tests here fork on purpose

PAGE = 4096


def page_of(value: int) -> bytes:
    return (value + 1).to_bytes(8, "little") * (PAGE // 8)


def held(client: Client) -> int:
    return sum(area.held for area in client.areas())


def clients(client: Client) -> int:
    return int(client.stats()["broker"]["clients"])


@pytest.fixture(params=[True, False], ids=["mapped", "messages"])
def either(request: pytest.FixtureRequest, client: EmbeddedClient) -> Iterator[Client]:
    with gcma_shm.connect(client.endpoint, mapped=request.param) as found:
        yield found


# --- one process


def test_what_it_says_of_itself(client: EmbeddedClient, either: Client) -> None:
    assert either.page_size == PAGE
    assert either.endpoint == client.endpoint
    assert str(either.number) in repr(either)
    assert either.number != client.number
    assert not either.closed
    either.close()
    assert "closed" in repr(either)


def test_areas_add_up(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(10 * PAGE)
    swap = client.swap(0, 5000)
    for n in range(5000):
        swap.store(n, page_of(n))
    for area in client.areas():
        assert area.size == area.held + area.lent + area.free
        assert area.held == buffer.nbytes
        assert area.largest_free == area.size - area.held
        assert area.free >= 0


def test_stats_have_stable_keys(client: EmbeddedClient, either: Client) -> None:
    swap = either.swap(0, 10)
    swap.store(1, page_of(1))
    swap.load(1)
    stats = client.stats()
    assert set(stats) >= {"arena", "areas", "types", "counters", "clients", "broker"}
    assert stats["counters"]["stores"] == 1
    assert stats["counters"]["hits_nursery"] == 1
    assert stats["types"]["0"] == {"slots": 10, "life": 1, "write": "through", "share": 100}
    assert str(client.number) in stats["clients"]
    assert stats["broker"]["requests"]["hello"] == 2


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_timeout_that_is_none(client: EmbeddedClient, timeout: float) -> None:
    with pytest.raises(ValueError):
        gcma_shm.connect(client.endpoint, timeout=timeout)


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1", "tcp://127.0.0.1:*", "nonsense", "ipc://relative"])
def test_an_endpoint_that_is_none(endpoint: str) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        gcma_shm.connect(endpoint)


def test_prefault(client: EmbeddedClient) -> None:
    with (
        gcma_shm.connect(client.endpoint, prefault=True) as other,
        other.alloc_contig(PAGE) as buffer,
        buffer.view as view,
    ):
        view[0] = 1


def test_the_environment_names_the_broker(client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCMA_ENDPOINT", client.endpoint)
    with gcma_shm.connect() as other:
        assert other.endpoint == client.endpoint


def test_an_arena_that_may_not_be_mapped(client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise gcma_shm.ArenaError("another container's")

    monkeypatch.setattr("gcma_shm.clients.member.open_arena", refuse)
    with gcma_shm.connect(client.endpoint) as other:
        assert not other.mapped
        swap = other.swap(0, 10)
        swap.store(1, page_of(1))
        assert client.swap(0, 10).load(1) == page_of(1)
    with pytest.raises(gcma_shm.ArenaError):
        gcma_shm.connect(client.endpoint, mapped=True)
    assert clients(client) == 1


def test_no_descriptor_is_left_open(client: EmbeddedClient) -> None:
    def once(mapped: bool) -> None:
        with gcma_shm.connect(client.endpoint, mapped=mapped) as other:
            swap = other.swap(0, 10)
            swap.store(1, page_of(1))
            if mapped:
                other.alloc_contig(PAGE).free()

    once(True)
    gc.collect()
    before = descriptors()
    for n in range(10):
        once(n % 2 == 0)
    gc.collect()
    assert descriptors() <= before


# --- threads


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Runs `work(n)` in `count` threads at once and raises what any of them raised."""
    errors: list[BaseException] = []

    def run(n: int) -> None:
        try:
            work(n)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("write", ["through", "behind"])
def test_threads_share_a_client(client: EmbeddedClient, either: Client, write: Any) -> None:
    """More threads than one client may hold grants; each has slots of its own and one that all fight for."""
    swap = either.swap(0, 1000, write)

    def work(n: int) -> None:
        for round_ in range(20):
            for offset in range(10):
                swap.store(n * 10 + offset, page_of(n * 1000 + round_))
            swap.store(999, page_of(n))
            found = swap.load(999)
            assert found is not None
            assert found in [page_of(m) for m in range(12)]
            swap.store_many(range(n * 10, n * 10 + 4), page_of(n * 1000 + round_) * 4)
            out = bytearray(10 * PAGE)
            assert swap.load_many(range(n * 10, n * 10 + 10), out) == [True] * 10
            assert out == page_of(n * 1000 + round_) * 10

    in_threads(12, work)
    assert len(swap) == 121
    swap.sync()
    check_at_rest(arena_name(client.endpoint))


def test_threads_allocate_and_free(client: EmbeddedClient) -> None:
    def work(n: int) -> None:
        for round_ in range(30):
            with client.alloc_contig((n + 1) * PAGE) as buffer, buffer.view as view:
                view[:] = page_of(n * 100 + round_) * (n + 1)
                assert view == page_of(n * 100 + round_) * (n + 1)

    in_threads(8, work)
    assert held(client) == 0
    check_at_rest(arena_name(client.endpoint))


class Courteous:
    """A lock whose giver steps back: whoever waits has it next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        self._lock.release()
        time.sleep(0.002)  # not to wait for anything: the others' turn

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def test_nobody_comes_between_the_goodbye_and_the_end(client: EmbeddedClient, either: Client) -> None:
    """A request that did would introduce the client again, under a number that is another's to have by then."""
    either._channel.lock = cast(Any, Courteous())
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            while True:
                either.areas()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    either.close()
    for thread in threads:
        thread.join(WAIT_S)
    assert [type(error) for error in errors] == [Closed] * 3, errors
    assert clients(client) == 1


def test_a_client_closed_while_threads_use_it(client: EmbeddedClient, either: Client) -> None:
    """Each call is served whole or refused with Closed; nothing is torn, and nothing stays granted."""
    swap = either.swap(0, 100, "behind")
    started = threading.Barrier(5)

    def work(n: int) -> None:
        if n == 4:
            started.wait()
            either.close()
            return
        swap.store(n, page_of(n))
        started.wait()
        try:
            while True:
                swap.store(n, page_of(n))
                assert swap.load(n) == page_of(n)
        except Closed:
            pass

    in_threads(5, work)
    assert client.swap(0, 100, "behind").load(1) == page_of(1)
    check_at_rest(arena_name(client.endpoint))


# --- fork


def test_a_child_uses_what_it_inherited(client: EmbeddedClient, either: Client) -> None:
    swap = either.swap(0, 100)
    swap.store(1, page_of(1))

    def child(_: Said) -> list[Any]:
        found: list[Any] = [swap.load(1), len(swap)]
        swap.store(2, page_of(2))
        found.append(either.swap(1, 10, "behind").load(0))
        found.append(len(either.areas()))
        if either.mapped:
            with either.alloc_contig(PAGE) as buffer:
                found.append(buffer.nbytes)
        either.close()
        try:
            swap.load(1)
        except Closed:
            found.append("closed")
        return found

    expected: list[Any] = [page_of(1), 1, None, 1]
    assert in_fork(child) == [*expected, *([PAGE] if either.mapped else []), "closed"]
    assert swap.load(2) == page_of(2), "the parent goes on"
    assert either.areas()
    assert eventually(lambda: clients(client) == 2)


def test_a_child_is_a_client_of_its_own(client: EmbeddedClient) -> None:
    swap = client.swap(0, 10)

    def child(said: Said) -> int:
        swap.store(1, page_of(1))
        said.say(client.number)
        said.hear()
        return 0

    with forked(child) as running:
        number = running.receive()
        assert number != client.number
        assert eventually(lambda: client.stats()["clients"].get(str(number), {}).get("pid") == running.pid)
        assert client.stats()["clients"][str(number)]["stores"] == 1
        running.tell()
        running.receive()
        running.wait()
    assert eventually(lambda: clients(client) == 1)
    assert client.stats()["counters"]["stores"] == 1, "its counts outlive it"


def test_a_child_holds_the_parents_buffer_from_the_fork_on(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(client.areas()[0].largest_free)
    with buffer.view as view:
        view[:5] = b"ours!"

    def child(said: Said) -> bytes:
        said.hear()
        with buffer.view as view:
            found = bytes(view[:5])
            view[:5] = b"mine!"
        said.say(found)
        said.hear()
        buffer.free()
        return b""

    with forked(child) as running:
        buffer.free()
        with pytest.raises(ArenaExhausted):
            client.alloc_contig(PAGE)
        running.tell()
        assert running.receive() == b"ours!"
        with pytest.raises(ArenaExhausted):
            client.alloc_contig(PAGE)
        running.tell()
        running.receive()
        assert held(client) == 0, "the last holder has freed it"
    client.alloc_contig(PAGE)


def test_a_childs_end_gives_back_its_hold_alone(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE)

    def child(said: Said) -> None:
        said.say()
        said.hear()

    with forked(child) as running:
        running.receive()
        assert clients(client) == 2
        running.kill()
        assert eventually(lambda: clients(client) == 1)
        assert held(client) == PAGE
        with buffer.view as view:
            view[:] = page_of(1)
    buffer.free()
    assert held(client) == 0


def test_a_childs_own_buffers_die_with_it(client: EmbeddedClient) -> None:
    def child(said: Said) -> None:
        mine = client.alloc_contig(10 * PAGE)
        said.say(mine.nbytes)
        said.hear()

    with forked(child) as running:
        assert running.receive() == held(client) == 10 * PAGE
        running.kill()
        assert eventually(lambda: held(client) == 0)


def test_the_parents_end_leaves_the_childs_hold(client: EmbeddedClient) -> None:
    """The parent is killed at once after the fork; its child, and that one's, still have the memory."""

    def parent(said: Said) -> None:
        mine = gcma_shm.connect(client.endpoint)
        buffer = mine.alloc_contig(3 * PAGE)
        with buffer.view as view:
            view[:] = page_of(9) * 3

        def grandchild(heard: Said) -> None:
            heard.say()
            heard.hear()

        def child(heard: Said) -> None:
            heard.say()
            with contextlib.suppress(EOFError):  # until the parent has died
                heard.hear()
            with buffer.view as view:
                said.say(bytes(view) == page_of(9) * 3)
            with forked(grandchild) as own:
                own.receive()
                said.say(held(mine))
            said.hear()

        with forked(child) as own:
            own.receive()
            said.say("forked")
            os.kill(os.getpid(), signal.SIGKILL)

    with forked(parent) as running:
        assert running.receive() == "forked"
        assert running.wait() == -signal.SIGKILL
        assert running.receive() is True
        assert running.receive() == 3 * PAGE
        assert held(client) == 3 * PAGE
        running.tell()
        assert eventually(lambda: held(client) == 0)
        assert eventually(lambda: clients(client) == 1)


def test_grandchildren_hold_as_well(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE)

    def grandchild(said: Said) -> None:
        said.say()
        said.hear()
        buffer.free()

    def child(said: Said) -> None:
        with forked(grandchild) as mine:
            mine.receive()
            buffer.free()
            said.say()
            said.hear()
            mine.tell()
            mine.receive()
            mine.wait()

    with forked(child) as running:
        running.receive()
        buffer.free()
        assert held(client) == PAGE
        running.tell()
        running.receive()
        assert eventually(lambda: held(client) == 0)


def test_an_array_keeps_the_childs_memory_when_the_buffer_is_forgotten(client: EmbeddedClient) -> None:
    """The child asks the broker for something, which says what it holds; the array's memory must be among that."""
    arrays = [client.alloc_contig(PAGE).numpy(PAGE)]
    gc.collect()

    def child(said: Said) -> list[int]:
        client.areas()
        said.say()
        said.hear()
        whole = client.alloc_contig(client.areas()[0].largest_free, zero=True)
        values = arrays[0].tolist()
        whole.free()
        return list(values)

    with forked(child) as running:
        arrays[0][:] = 7
        running.receive()
        arrays.clear()
        gc.collect()
        assert held(client) == PAGE, "the child's array is alive"
        running.tell()
        assert running.receive() == [7] * PAGE


def test_a_fork_from_a_thread_while_others_work(client: EmbeddedClient) -> None:
    swap = client.swap(0, 100, "behind")
    stop = threading.Event()
    failures: list[BaseException] = []

    def busy(n: int) -> None:
        try:
            while not stop.is_set():
                swap.store(n, page_of(n))
                assert swap.load(n) == page_of(n)
                client.alloc_contig(PAGE).free()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=busy, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    try:
        for n in range(10):

            def child(_: Said, n: int = n) -> bool:
                for _round in range(50):
                    swap.store(50 + n, page_of(n))
                client.alloc_contig(PAGE).free()
                return swap.load(50 + n) == page_of(n) and len(client.areas()) == 1

            assert in_fork(child)
    finally:
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)
    assert not failures
    assert eventually(lambda: clients(client) == 1)
    assert eventually(lambda: held(client) == 0)
    check_at_rest(arena_name(client.endpoint))


def test_a_fork_when_no_record_is_free() -> None:
    """The fork itself is nobody's to refuse: the child is simply no client."""
    with gcma_shm.embedded("4M", clients=3) as client, gcma_shm.connect(client.endpoint, mapped=False):
        swap = client.swap(0, 10)
        swap.store(1, page_of(1))

        def child(_: Said) -> list[str]:
            found = []
            for call in (lambda: swap.load(1), client.areas, lambda: client.alloc_contig(PAGE)):
                try:
                    call()
                except Closed:
                    found.append("closed")
            return found

        assert in_fork(child) == ["closed"] * 3
        assert swap.load(1) == page_of(1)


# --- workers of every start method


def worker(endpoint: str, offset: int) -> bool:
    with gcma_shm.connect(endpoint) as client, client.alloc_contig(PAGE) as buffer, buffer.view as view:
        view[:] = page_of(offset)
        swap = client.swap(0, 100)
        swap.store(offset, bytes(view))
        return swap.load(0) == page_of(0)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers(client: EmbeddedClient, method: str) -> None:
    swap = client.swap(0, 100)
    swap.store(0, page_of(0))
    context = multiprocessing.get_context(method)
    with context.Pool(3) as pool:
        assert all(pool.starmap(worker, [(client.endpoint, n) for n in range(1, 20)]))
        pool.close()
        pool.join()
    if method == "forkserver":
        forkserver._forkserver._stop()  # type: ignore[attr-defined] # its socket is in this test's directory
    assert all(swap.load(n) == page_of(n) for n in range(20))
    assert eventually(lambda: clients(client) == 1)
    assert held(client) == 0


_inherited: list[Any] = []


def forked_worker(n: int) -> bool:
    client, swap, buffer = _inherited
    swap.store(n, bytes(buffer.view))
    return len(client.areas()) == 1 and swap.load(n) == page_of(77)


def test_forked_workers_go_on_with_the_parents_objects(client: EmbeddedClient) -> None:
    swap, buffer = client.swap(0, 100), client.alloc_contig(PAGE)
    with buffer.view as view:
        view[:] = page_of(77)
    _inherited[:] = client, swap, buffer
    try:
        with multiprocessing.get_context("fork").Pool(3) as pool:
            assert all(pool.map(forked_worker, range(20)))
            pool.close()
            pool.join()
    finally:
        _inherited.clear()
    assert len(swap) == 20
    buffer.free()
    assert eventually(lambda: held(client) == 0)


# --- death


def test_a_killed_clients_buffers_come_back_and_its_record_is_used_again(client: EmbeddedClient) -> None:
    code = (
        "import sys, gcma_shm\n"
        f"client = gcma_shm.connect({client.endpoint!r})\n"
        "swap = client.swap(0, 100, 'behind')\n"
        "for n in range(100): swap.store(n, (n + 1).to_bytes(8, 'little') * 512)\n"
        "buffer = client.alloc_contig(client.areas()[0].largest_free)\n"
        "print(client.number, flush=True)\n"
        "sys.stdin.read()\n"
    )
    numbers = []
    plane = client._plane
    assert plane is not None
    for _ in range(3):
        process = start_python(code)
        assert process.stdout is not None
        assert process.stdin is not None
        numbers.append(int(process.stdout.readline()))
        assert held(client) == client.areas()[0].size
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()
        assert eventually(lambda: held(client) == 0)
        assert eventually(lambda: clients(client) == 1)
        assert eventually(lambda: [record.number for record in Records(plane).used()] == [client.number]), "buried"
        swap = client.swap(0, 100, "behind")
        assert all(swap.load(n) == page_of(n) for n in range(100)), "no stored value is lost"
        check_at_rest(arena_name(client.endpoint))
    assert len(set(numbers)) == 1, "the record is used again"


def test_a_client_killed_in_the_middle_of_stores(client: EmbeddedClient) -> None:
    def child(said: Said) -> None:
        swap = client.swap(0, 1000)
        said.say()
        n = 0
        while True:
            n += 1
            swap.store(n % 1000, page_of(n % 1000))

    for _ in range(5):
        with forked(child) as running:
            running.receive()
            assert eventually(lambda: client.stats()["counters"]["stores"] > 100)
            running.kill()
        assert eventually(lambda: clients(client) == 1)
        swap = client.swap(0, 1000)
        for n in range(1000):
            assert swap.load(n) in (None, page_of(n))
        swap.sync(WAIT_S)
        check_at_rest(arena_name(client.endpoint))


def test_a_broker_that_is_stopped_makes_requests_fail_and_pages_go_on(client: EmbeddedClient) -> None:
    with gcma_shm.connect(client.endpoint, timeout=WAIT_S) as other:
        swap = other.swap(0, 3000)
        with stopped(client.broker_pid):
            with impatient(other):
                with pytest.raises(BrokerUnavailable, match="areas"):
                    other.areas()
                with pytest.raises(BrokerUnavailable):
                    other.alloc_contig(PAGE)
            for n in range(3000):  # several times the nursery, with nobody who sweeps
                swap.store(n, page_of(n))
            assert all(swap.load(n) == page_of(n) for n in range(3000))
        other.areas()
        assert eventually(lambda: held(other) == 0), "the buffer whose answer nobody waited for is given back"
    check_at_rest(arena_name(client.endpoint))


def test_a_spill_directory_on_request(tmp_path: Path) -> None:
    with gcma_shm.embedded("4M", spill_dir=tmp_path / "here") as client:
        client.swap(5, 10)
        (file,) = (tmp_path / "here").rglob("005.*")
        assert file.parent.stat().st_mode & 0o777 == 0o700
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("sent", [True, False])
def test_close_does_not_wait_behind_those_who_wait_for_another_broker(sent: bool) -> None:
    endpoint, for_ever = f"ipc://{tempfile.gettempdir()}/b/broker", 1e5
    with broker(endpoint) as first:
        client = gcma_shm.connect(endpoint, timeout=for_ever, wait_for_broker=for_ever)
        told: list[type[BaseException]] = []

        def ask() -> None:
            try:
                client.areas()
            except GcmaError as error:
                told.append(type(error))

        asking = threading.Thread(target=ask, daemon=True)
        os.kill(first.pid, signal.SIGSTOP)
        if not sent:
            first.stop(signal.SIGKILL)
            assert eventually(lambda: not client._channel._socket.poll(0, zmq.POLLOUT))
        asking.start()
        assert eventually(client._channel.lock.locked)
        if sent:
            first.stop(signal.SIGKILL)
        closing = threading.Thread(target=client.close, daemon=True)
        closing.start()
        closing.join(WAIT_S)
        assert not closing.is_alive()
        asking.join(WAIT_S)
        assert told == [BrokerUnavailable]
    with broker(endpoint):  # which finds the arena, and leaves nothing
        pass
