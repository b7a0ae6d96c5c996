"""Clients of one process: what they say of themselves, and threads that share them."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import gcma_shm
from gcma_shm import Client, Closed
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.endpoint import arena_name
from tests.client import PAGE, clients, held, page_of
from tests.invariants import check_at_rest
from tests.processes import WAIT_S, descriptors

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # tests here fork on purpose


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


def test_a_spill_directory_on_request(tmp_path: Path) -> None:
    with gcma_shm.embedded("4M", spill_dir=tmp_path / "here") as client:
        client.swap(5, 10)
        (file,) = (tmp_path / "here").rglob("005.*")
        assert file.parent.stat().st_mode & 0o777 == 0o700
    assert not list((tmp_path / "here").iterdir())
