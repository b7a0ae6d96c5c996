"""Requests that a broker took with it, or that outlast its absence: answered by the next one, never done twice."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import gcma_shm
from gcma_shm import layout
from gcma_shm.errors import BrokerUnavailable
from gcma_shm.messages import Request
from gcma_shm.records import Records
from tests.client import filled_with
from tests.patience import has_unread, impatient
from tests.processes import WAIT_S, broker, eventually, stop
from tests.takeover import AREAS, MIB, PAGE, Late, held_by_area, killed_and_restarted


def test_a_request_waits_through_a_restart_if_asked_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than its timeout."""
    clock = Late()
    monkeypatch.setattr("gcma_shm.clients.channel.time", clock)
    with broker(endpoint, *AREAS) as first:
        patient = gcma_shm.connect(endpoint, timeout=WAIT_S, wait_for_broker=4 * WAIT_S)
        quick = gcma_shm.connect(endpoint, timeout=WAIT_S)
        by_messages = gcma_shm.connect(endpoint, mapped=False, timeout=WAIT_S, wait_for_broker=4 * WAIT_S)
        swap = by_messages.swap(0, 10)
        swap.store(1, filled_with(1))
        first.stop(signal.SIGKILL)
        with impatient(quick), pytest.raises(BrokerUnavailable):
            quick.alloc_contig(PAGE)
        with ThreadPoolExecutor(2) as pool:
            asking = {client._channel: client._channel._number for client in (patient, by_messages)}
            waiting = pool.submit(patient.alloc_contig, MIB, area="a")
            loading = pool.submit(swap.load, 1)
            assert eventually(lambda: all(channel._number > number for channel, number in asking.items()))
            clock.late_s = WAIT_S + 1
            with broker(endpoint, *AREAS):
                with waiting.result(WAIT_S) as buffer:
                    assert buffer.nbytes == MIB
                assert loading.result(WAIT_S) == filled_with(1)
                quick.alloc_contig(PAGE).free()
                for client in (patient, quick, by_messages):
                    client.close()


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "messages"])
def test_a_request_that_the_broker_took_with_it(endpoint: str, mapped: bool) -> None:
    """Sent to a stopped broker, which is killed then: the next one answers it, without waiting for its bound."""
    with broker(endpoint, *AREAS) as first:
        client = gcma_shm.connect(endpoint, mapped=mapped, timeout=WAIT_S)
        stop(first.pid)
        with ThreadPoolExecutor(1) as pool:
            begun = time.monotonic()
            asked = pool.submit(client.alloc_contig, MIB, area="a") if mapped else pool.submit(client.swap, 0, 10)
            assert eventually(lambda: has_unread(endpoint))
            with killed_and_restarted(first):
                got = asked.result(WAIT_S)
                assert time.monotonic() - begun < WAIT_S / 2, "it did not wait until its time was over"
                if isinstance(got, gcma_shm.Buffer):
                    assert held_by_area(client) == {"a": MIB, "b": 0}
                    got.free()
                client.close()


def test_a_page_that_the_broker_took_with_it_is_not_stored_twice(endpoint: str) -> None:
    with broker(endpoint, *AREAS) as first:
        client = gcma_shm.connect(endpoint, mapped=False, timeout=WAIT_S)
        swap = client.swap(0, 10)
        stop(first.pid)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(swap.store, 1, filled_with(1))
            assert eventually(lambda: has_unread(endpoint))
            with killed_and_restarted(first):
                with pytest.raises(BrokerUnavailable, match="may have been done"):
                    asked.result(WAIT_S)
                swap.store(1, filled_with(2))
                assert swap.load(1) == filled_with(2)
                batch = bytearray(4 * PAGE)
                assert swap.load_many(range(4), batch) == [False, True, False, False]
                client.close()


def test_a_batch_that_the_broker_took_with_it_tells_what_is_done(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a long batch: what counts as stored is there afterwards, and nothing was stored twice."""
    slots, go_on = 6000, threading.Event()
    with broker(endpoint, *AREAS) as first:
        client = gcma_shm.connect(endpoint, mapped=False, timeout=WAIT_S)
        swap, other = client.swap(0, slots), gcma_shm.connect(endpoint)
        seen = other.swap(0, slots)
        send, sent = client._channel._send, itertools.count()

        def send_half(request: Request, deadline: float) -> None:
            """All of it takes a few hundredths of a second: the second half is not sent before the broker stands still."""
            if request.operation == "store_many" and next(sent) >= slots // client._channel.greeting["batch"] // 2:
                assert go_on.wait(WAIT_S)
            send(request, deadline)

        monkeypatch.setattr(client._channel, "_send", send_half)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(swap.store_many, range(slots), b"".join(map(filled_with, range(slots))))
            assert eventually(lambda: 100 in seen)
            stop(first.pid)
            go_on.set()
            assert eventually(lambda: has_unread(endpoint))
            first.stop(signal.SIGKILL)
            assert other._plane is not None
            records = Records(other._plane)
            stored = records.counters(layout.BROKER)["stores"]
            with killed_and_restarted(first):
                with pytest.raises(BrokerUnavailable, match="may have been done") as raised:
                    asked.result(WAIT_S)
                done = raised.value.done
                assert done % client._channel.greeting["batch"] == 0
                assert done < slots
                out = bytearray(slots * PAGE)
                hits = swap.load_many(range(slots), out)
                assert all(hits[:done])
                assert 100 < sum(hits) < slots
                assert 0 < stored <= sum(hits), "something was stored twice"
                assert records.counters(layout.BROKER)["stores"] == stored, "the next broker was asked once more"
                for n, hit in enumerate(hits):
                    assert not hit or out[n * PAGE : (n + 1) * PAGE] == filled_with(n)
                client.close()
                other.close()


def test_a_place_in_line_is_taken_again(endpoint: str) -> None:
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client, ThreadPoolExecutor(1) as pool:
        everything = client.alloc_contig(4 * MIB, area="a")
        with gcma_shm.connect(endpoint) as other:
            waiting = pool.submit(other.alloc_contig, MIB, area="a", timeout=WAIT_S)
            assert eventually(lambda: client.stats()["broker"]["in_line"] == 1)
            with killed_and_restarted(first):
                assert eventually(lambda: client.stats()["broker"]["in_line"] == 1)
                everything.free()
                with waiting.result(WAIT_S) as buffer:
                    assert buffer.nbytes == MIB
                assert held_by_area(client) == {"a": 0, "b": 0}


def test_the_first_question_to_a_new_broker_may_be_for_ones_own_quota(endpoint: str) -> None:
    """It is answered without a session, too, but for whom?"""
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client:
        client.quota(MIB)
        with killed_and_restarted(first):
            assert client.quota() == gcma_shm.QuotaInfo(0, MIB)


def test_a_request_under_way_when_the_broker_goes_for_longer_than_the_timeout(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is asked whether it knows it before it is given up."""
    clock = Late()
    monkeypatch.setattr("gcma_shm.clients.channel.time", clock)
    with broker(endpoint) as first:
        client = gcma_shm.connect(endpoint, timeout=WAIT_S, wait_for_broker=4 * WAIT_S)
        channel = client._channel
        stop(first.pid)
        with ThreadPoolExecutor(1) as thread:
            asking = thread.submit(client.alloc_contig, PAGE)
            assert eventually(lambda: has_unread(endpoint))
            first.stop(signal.SIGKILL)
            assert eventually(lambda: channel._away)
            clock.late_s = WAIT_S + 1
            with broker(endpoint):
                asking.result(WAIT_S).free()
                assert held_by_area(client)["default"] == 0
                client.close()


def test_what_no_broker_comes_for_has_an_end(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Late()
    monkeypatch.setattr("gcma_shm.clients.channel.time", clock)
    with broker(endpoint) as first:
        client = gcma_shm.connect(endpoint, timeout=WAIT_S, wait_for_broker=WAIT_S)
        channel = client._channel
        stop(first.pid)
        with ThreadPoolExecutor(1) as thread:
            asking = thread.submit(client.areas)
            assert eventually(lambda: has_unread(endpoint))
            first.stop(signal.SIGKILL)
            assert eventually(lambda: channel._away)
            clock.late_s = 2 * WAIT_S + 1
            with pytest.raises(BrokerUnavailable):
                asking.result(WAIT_S)
        channel.timeout = 0.1  # nobody hears the goodbye
        client.close()
