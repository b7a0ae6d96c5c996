"""Buffers pickled and loaded in one process and its children, several at once, and handles that come too late."""

from __future__ import annotations

import gc
import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gcma_shm
from gcma_shm import ArenaError, Client, Closed, StaleHandle
from gcma_shm._core import address_of
from gcma_shm.arena import remove_dead
from gcma_shm.clients.channel import WINDOW
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.endpoint import arena_name
from tests.client import PAGE, clients, held
from tests.processes import WAIT_S, Said, broker, eventually, forked

pytestmark = pytest.mark.arena("small")


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
