"""Clients that are killed, and those of a broker that is stopped or killed."""

from __future__ import annotations

import signal
import tempfile
import threading

import pytest
import zmq

import gcma_shm
from gcma_shm import BrokerUnavailable, GcmaError
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.endpoint import arena_name
from gcma_shm.records import Records
from tests.client import PAGE, clients, held, page_of
from tests.invariants import check_at_rest
from tests.patience import has_unread, impatient
from tests.processes import WAIT_S, Said, broker, eventually, forked, start_python, stop, stopped

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # tests here fork on purpose


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
        said.say(client.number)
        n = 0
        while True:
            n += 1
            swap.store(n % 1000, page_of(n % 1000))

    for _ in range(5):
        with forked(child) as running:
            number = str(running.receive())
            assert eventually(lambda: client.stats()["clients"].get(number, {}).get("stores", 0) > 100)  # noqa: B023 - called at once
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
        stop(first.pid)
        if not sent:
            first.stop(signal.SIGKILL)
            assert eventually(lambda: not client._channel._socket.poll(0, zmq.POLLOUT))
        assert not has_unread(endpoint)
        asking.start()
        assert eventually(client._channel.lock.locked)
        if sent:
            assert eventually(lambda: has_unread(endpoint))  # who has the lock may not have sent anything yet
            first.stop(signal.SIGKILL)
        closing = threading.Thread(target=client.close, daemon=True)
        closing.start()
        closing.join(WAIT_S)
        assert not closing.is_alive()
        asking.join(WAIT_S)
        assert told == [BrokerUnavailable]
    with broker(endpoint):  # which finds the arena, and leaves nothing
        pass
