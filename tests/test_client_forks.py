"""Clients in forked children and their children, and in workers of every start method."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver
from typing import Any

import pytest

import gcma_shm
from gcma_shm import ArenaExhausted, Client, Closed
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.endpoint import arena_name
from tests.client import PAGE, clients, held, page_of
from tests.invariants import check_at_rest
from tests.processes import WAIT_S, Said, eventually, forked, in_fork

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # tests here fork on purpose


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
    assert eventually(lambda: client.stats()["counters"]["stores"] == 1), "its counts outlive it"


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
