"""Requests whose time was over, and what comes after them: they are under way still, and the broker bounds what is."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

import gcma_shm
from gcma_shm import BrokerUnavailable, Client
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.swap import Swap
from gcma_shm.messages import BATCHES
from tests.patience import impatient
from tests.processes import WAIT_S, broker, eventually, stopped

PAGE = 4096


@pytest.fixture
def other(client: EmbeddedClient) -> Iterator[Client]:
    with gcma_shm.connect(client.endpoint, mapped=False, timeout=WAIT_S) as other:
        yield other


@contextlib.contextmanager
def unanswered(pid: int, other: Client, timeout: float = 0.3) -> Iterator[None]:
    """The broker is stopped, and what is asked for has so long; before and after it may take its time."""
    with stopped(pid), impatient(other, timeout=timeout):
        yield


def given_up(client: Client) -> int:
    return len(client._channel._given_up)


@pytest.mark.parametrize("what", ["store_many", "load_many"])
def test_an_immediate_retry_of_a_batch_that_timed_out(client: EmbeddedClient, other: Client, what: str) -> None:
    """Again and again, so that more are under way than may be; each time it is served, or its time is over as well: never refused."""
    swap = other.swap(0, 2000)
    page = os.urandom(PAGE)
    swap.store_many(range(2000), page * 2000)
    memory = bytearray(page * 2000)

    def batch() -> None:
        if what == "store_many":
            swap.store_many(range(2000), memory)
        else:
            assert all(swap.load_many(range(2000), memory))

    for round_ in range(3):
        with unanswered(client.broker_pid, other):
            for _ in range(3):
                with pytest.raises(BrokerUnavailable) as raised:
                    batch()
                assert raised.value.done == 0
                assert given_up(other) == BATCHES, "no more are sent than may be under way"
        batch()
        assert given_up(other) == 0
        assert memory == page * 2000, round_
    assert "ProtocolError" not in client.stats()["broker"]["refusals"]


def test_single_requests_that_timed_out_leave_room_for_the_window_alone(client: EmbeddedClient, other: Client) -> None:
    swap = other.swap(0, 10)
    window = other._channel.greeting["window"]
    page = os.urandom(PAGE)
    swap.store(1, page)
    other._channel._socket.setsockopt(zmq.RCVTIMEO, 1)
    with unanswered(client.broker_pid, other, 0.001):
        for _ in range(window + 5):
            with pytest.raises(BrokerUnavailable):
                swap.load(1)
        assert given_up(other) == window
    assert swap.load(1) == page
    assert given_up(other) == 0
    assert "ProtocolError" not in client.stats()["broker"]["refusals"]


def test_a_batch_that_is_broken_off_in_the_middle(
    client: EmbeddedClient, other: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C, say, with batches under way: the next one is served in full."""
    swap = other.swap(0, 2000, "behind")
    pages = os.urandom(PAGE) * 2000
    swap.store_many(range(2000), pages)
    kind: Any = type(swap)
    lay_out, calls = kind._lay_out, []

    def broken_off(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        lay_out(*arguments)

    monkeypatch.setattr(kind, "_lay_out", broken_off)
    out = bytearray(len(pages))
    for _ in range(3):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            swap.load_many(range(2000), out)
        assert not other._channel.lock.locked()
    monkeypatch.undo()
    assert all(swap.load_many(range(2000), out))
    assert out == pages
    assert "ProtocolError" not in client.stats()["broker"]["refusals"]


def four_given_up(pid: int, other: Client) -> None:
    swap = other.swap(0, 2000)
    with unanswered(pid, other), pytest.raises(BrokerUnavailable):
        swap.load_many(range(2000), bytearray(2000 * PAGE))
    assert given_up(other) == BATCHES


def assert_nothing_of_it_is_left(other: Client, swap: Swap, first: str) -> None:
    """Whoever hears first of the next session."""
    if first == "load":
        assert swap.load(1) is None
        assert given_up(other) == 0
    elif first == "Ctrl-C":
        other._channel._greeted = False
    for _ in range(2):
        assert swap.load_many(range(10), bytearray(10 * PAGE)) == [False] * 10
        assert given_up(other) == 0


@pytest.mark.parametrize("first", ["batch", "load", "Ctrl-C"])
def test_the_next_session_has_nothing_of_what_was_given_up(client: EmbeddedClient, other: Client, first: str) -> None:
    """A lost connection, as far as the broker can tell: the client is not known there any more. The one who hears of it first is a
    batch, a single request, or the hello itself.
    """
    swap = other.swap(0, 2000)
    four_given_up(client.broker_pid, other)
    with other._channel.lock:
        other._channel._close()  # the replies go with the socket
    assert eventually(lambda: str(other.number) not in client.stats()["clients"])
    assert_nothing_of_it_is_left(other, swap, first)
    swap.store_many(range(10), bytes(10 * PAGE))


@pytest.mark.parametrize("first", ["batch", "load", "Ctrl-C"])
def test_the_next_broker_has_nothing_of_what_was_given_up(first: str) -> None:
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    with (
        broker(endpoint) as killed,
        gcma_shm.connect(endpoint, mapped=False, timeout=WAIT_S) as other,
    ):
        swap = other.swap(0, 2000)
        four_given_up(killed.process.pid, other)
        killed.stop(signal.SIGKILL)
        with broker(endpoint):
            assert_nothing_of_it_is_left(other, swap, first)
            assert other._channel._late == 0
            other.close()


def test_what_a_hello_needed_answered_is_not_given_up(
    client: EmbeddedClient, other: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the hello after it finds nobody: nothing more will come for that request."""
    swap = other.swap(0, 10)
    with other._channel.lock:
        other._channel._close()
    assert eventually(lambda: str(other.number) not in client.stats()["clients"])

    def nobody(_deadline: float) -> None:
        raise BrokerUnavailable

    monkeypatch.setattr(other._channel, "_hello", nobody)
    for request in (lambda: swap.load(1), lambda: swap.load_many(range(10), bytearray(10 * PAGE))):
        with pytest.raises(BrokerUnavailable):
            request()
        assert given_up(other) == 0
    monkeypatch.undo()
    assert swap.load(1) is None


def test_a_free_leaves_nothing_late(client: EmbeddedClient) -> None:
    for _ in range(5):
        client.alloc_contig(PAGE).free()
        assert client._channel._late == 0


def test_a_batch_of_large_pages_goes_page_by_page() -> None:
    """Where a batch could hold one page only; an error tells how many were served before it."""
    size = 1 << 20
    with (
        gcma_shm.embedded("32M", page_size=size) as owner,
        gcma_shm.connect(owner.endpoint, mapped=False) as other,
    ):
        swap = other.swap(0, 10)
        pages = os.urandom(3 * size)
        swap.store_many([1, 2, 4], pages)
        out = bytearray(4 * size)
        assert swap.load_many([1, 3, 4, 2], out) == [True, False, True, True]
        assert out == pages[:size] + bytes(size) + pages[2 * size :] + pages[size : 2 * size]
        requests = owner.stats()["broker"]["requests"]
        assert (requests["store"], requests["load"]) == (3, 4)
        assert not {"store_many", "load_many"} & set(requests)
        kind: Any = type(swap)
        sent: list[Any] = []
        request = kind._request

        def failing(self: Any, *arguments: Any) -> Any:
            if len(sent) == 2:
                raise BrokerUnavailable
            sent.append(arguments)
            return request(self, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "_request", failing)
            for batch in (
                lambda: swap.store_many(range(4), bytes(4 * size)),
                lambda: swap.load_many(range(4), bytearray(4 * size)),
            ):
                sent.clear()
                with pytest.raises(BrokerUnavailable) as raised:
                    batch()
                assert raised.value.done == 2
