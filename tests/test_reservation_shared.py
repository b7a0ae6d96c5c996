"""Reservations of several: claimed in turn, held by forked children, and given back however their holders end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import pytest

import gcma_shm
from gcma_shm import ArenaExhausted, Reservation
from gcma_shm.clients.embedded import EmbeddedClient
from tests.client import page_of
from tests.lending import PAGE, broker_stopped, figure, use_fully, use_until_lent, whole
from tests.processes import WAIT_S, Said, eventually, forked, in_fork
from tests.using_areas import all_there

pytestmark = pytest.mark.arena("small")


# --- in turn


def test_in_turn_in_one_process(client: EmbeddedClient) -> None:
    reservation = client.reserve(PAGE)
    buffer = reservation.claim()
    with pytest.raises(ArenaExhausted) as raised:
        reservation.claim(timeout=0.01)
    assert raised.value.holders == {client.number: PAGE}
    assert raised.value.requested == PAGE
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reservation.claim, None)
        buffer.free()
        waiting.result(WAIT_S).free()
    assert figure(client, "held") == 0


def test_threads_claim_in_turn(client: EmbeddedClient) -> None:
    reservation = client.reserve(20 * PAGE)
    inside: list[int] = []

    def work(n: int) -> None:
        for round_ in range(25):
            with reservation.claim(timeout=WAIT_S) as buffer, buffer.view as view:
                inside.append(n)
                assert inside == [n], "two claims at once"
                view[:] = page_of(n * 100 + round_) * 20
                assert view == page_of(n * 100 + round_) * 20
                inside.remove(n)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, n) for n in range(4)]:
            done.result(2 * WAIT_S)
    assert figure(client, "held") == 0


def claim_in_turn(talk: Connection) -> None:
    """A worker of any start method: claims what it is sent, says so, frees it when it is told."""
    reservation: Reservation = talk.recv()
    while True:
        buffer = reservation.claim(timeout=WAIT_S)
        with buffer.view as view:
            found = bytes(view[:4])
            view[:4] = b"them"
        talk.send(found)
        if talk.recv() == "release":
            buffer.free()
            reservation.release()
            talk.send("released")
            talk.recv()
            return
        buffer.free()
        talk.send("freed")
        talk.recv()


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_shared_with_a_worker(client: EmbeddedClient, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    worker = context.Process(target=claim_in_turn, args=(theirs,))
    worker.start()
    theirs.close()
    try:
        size = whole(client)
        reservation = client.reserve(size)
        ours.send(reservation)
        for _ in range(3):
            ours.recv()
            with pytest.raises(ArenaExhausted) as raised:
                reservation.claim()
            ((number, nbytes),) = raised.value.holders.items()
            assert nbytes == size
            assert client.stats()["clients"][str(number)]["pid"] == worker.pid
            ours.send("free")
            with reservation.claim(timeout=WAIT_S) as buffer, buffer.view as view:
                assert bytes(view[:4]) == b"them"
            assert ours.recv() == "freed"
            ours.send("again")
        ours.recv()
        reservation.release()
        assert (figure(client, "reserved"), figure(client, "held")) == (size, size), "the worker holds it still"
        ours.send("release")
        assert ours.recv() == "released"
        assert (figure(client, "reserved"), whole(client)) == (0, size)
        ours.send("end")
    finally:
        worker.join(WAIT_S)
        if worker.is_alive():
            worker.kill()
            worker.join()
        ours.close()
    assert worker.exitcode == 0


def test_by_name_and_in_turn_with_waiting(client: EmbeddedClient) -> None:
    size = whole(client)

    def child(said: Said) -> None:
        with gcma_shm.connect(client.endpoint) as own:
            said.hear()
            theirs = own.attach_reservation("shared")
            buffer = theirs.claim()
            with buffer.view as view:
                view[:5] = b"child"
            said.say(own.number)
            said.hear()
            buffer.free()
            said.say()
            said.hear()

    with forked(child) as running:
        reservation = client.reserve(size, name="shared")
        running.tell()
        number = running.receive()
        with pytest.raises(ArenaExhausted) as raised:
            reservation.claim(timeout=0.01)
        assert raised.value.holders == {number: size}
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(reservation.claim, WAIT_S)
            running.tell()
            with waiting.result(WAIT_S) as buffer, buffer.view as view:
                assert bytes(view[:5]) == b"child"
        running.receive()


def test_a_killed_claimers_range_comes_back_to_the_others(client: EmbeddedClient) -> None:
    size = whole(client)

    def child(said: Said) -> None:
        own = gcma_shm.connect(client.endpoint)
        said.hear()
        with own.attach_reservation("shared").claim().view as view:
            view[:] = b"\xdd" * size
            said.say()
            said.hear()

    for _ in range(3):
        with forked(child) as running:
            reservation = client.reserve(size, name="shared")
            use_fully(client)
            running.tell()
            running.receive()
            with pytest.raises(ArenaExhausted):
                reservation.claim()
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(reservation.claim, WAIT_S)
                running.kill()
                with waiting.result(WAIT_S) as buffer, buffer.view as view:
                    swap = use_fully(client)
                    assert all_there(swap)
                    view[:] = b"\xee" * size
                    assert all_there(swap)
            assert figure(client, "held") == 0
            reservation.release()
            assert whole(client) == size


def test_a_holders_death_releases(client: EmbeddedClient) -> None:
    size = whole(client)

    def child(said: Said) -> None:
        own = gcma_shm.connect(client.endpoint)
        reservations = [own.reserve(size // 2), own.reserve(10 * PAGE, name="named")]
        buffer = reservations[0].claim()
        said.say(buffer.nbytes)
        said.hear()

    with forked(child) as running:
        held = running.receive()
        assert figure(client, "held") == held
        assert figure(client, "reserved") == held + 10 * PAGE
        running.kill()
        assert eventually(lambda: figure(client, "reserved") == 0)
    assert (figure(client, "held"), whole(client), client.names()) == (0, size, [])
    swap = use_until_lent(client)
    assert all_there(swap)


# --- fork


def test_a_child_holds_its_parents_reservation(client: EmbeddedClient) -> None:
    size = whole(client)
    reservation = client.reserve(size)

    def child(said: Said) -> None:
        said.hear()
        with reservation.claim() as buffer, buffer.view as view:
            view[:5] = b"child"
        said.say()
        said.hear()
        reservation.release()

    with forked(child) as running:
        reservation.release()
        assert figure(client, "reserved") == size
        running.tell()
        running.receive()
        running.tell()
        running.receive()
        assert (figure(client, "reserved"), whole(client)) == (0, size)


@pytest.mark.parametrize("first", ["parent", "child"])
def test_a_fork_with_a_live_claim(client: EmbeddedClient, first: str) -> None:
    size = whole(client)
    reservation = client.reserve(size)
    buffer = reservation.claim()
    with buffer.view as view:
        view[:] = b"\xaa" * size

    def child(said: Said) -> None:
        client.areas()
        with buffer.view as view:
            said.say(bytes(view) == b"\xaa" * size)
            view[:] = b"\xbb" * size
            said.say()
            while said.hear() == "look":
                said.say(bytes(view) == b"\xbb" * size)
        buffer.free()
        said.say()
        said.hear()

    with forked(child) as running:
        assert running.receive() is True
        running.receive()
        if first == "parent":
            buffer.free()
            swap = use_fully(client)
            assert figure(client, "held") == size, "the child has it"
            with pytest.raises(ArenaExhausted):
                reservation.claim()
            running.tell("look")
            assert running.receive() is True
            running.tell("free")
            running.receive()
        else:
            running.tell("free")
            running.receive()
            swap = use_fully(client)
            assert figure(client, "held") == size, "the parent has it"
            with buffer.view as view:
                assert view == b"\xbb" * size
            buffer.free()
        assert figure(client, "held") == 0
        assert figure(client, "reserved") == size
        use_until_lent(client)
        with reservation.claim() as again, again.view as view:
            view[:] = b"\xcc" * size
            assert all_there(swap)
        assert all_there(swap)


@pytest.mark.parametrize("first", ["parent", "child"])
def test_a_child_that_never_asked_for_anything_frees_its_part(client: EmbeddedClient, first: str) -> None:
    """Its free is its first word to the broker."""
    reservation = client.reserve(PAGE)
    buffer = reservation.claim()

    def child(said: Said) -> None:
        said.hear()
        buffer.free()
        said.say()
        said.hear()

    with forked(child) as running:
        if first == "parent":
            buffer.free()
        running.tell()
        running.receive()
        buffer.free()
        assert figure(client, "held") == 0
        reservation.claim().free()


def test_a_childs_death_leaves_its_parents_claim(client: EmbeddedClient) -> None:
    reservation = client.reserve(10 * PAGE)
    buffer = reservation.claim()

    def child(said: Said) -> None:
        said.say()
        said.hear()

    with forked(child) as running:
        running.receive()
        running.kill()
    assert eventually(lambda: client.stats()["broker"]["clients"] == 1)
    with buffer.view as view:
        view[:] = b"\xaa" * len(view)
        use_fully(client)
        assert view == b"\xaa" * len(view)
    assert figure(client, "held") == 10 * PAGE
    buffer.free()
    assert figure(client, "held") == 0
    reservation.claim().free()


def test_a_parents_death_leaves_its_childs_claim(client: EmbeddedClient) -> None:
    size = 100 * PAGE

    def parent(said: Said) -> None:
        own = gcma_shm.connect(client.endpoint)
        reservation = own.reserve(size)
        buffer = reservation.claim()
        with buffer.view as view:
            view[:] = page_of(9) * 100

        def child(heard: Said) -> None:
            heard.say()
            with contextlib.suppress(EOFError):  # until the parent has died
                heard.hear()
            said.hear()
            with buffer.view as view:
                said.say(bytes(view) == page_of(9) * 100)
            said.hear()
            buffer.free()
            said.say(figure(own, "held"))
            said.hear()
            reservation.claim().free()
            said.say()
            said.hear()

        with forked(child) as running:
            running.receive()
            said.say()
            os.kill(os.getpid(), signal.SIGKILL)

    with forked(parent) as running:
        running.receive()
        assert running.wait() == -signal.SIGKILL
        # This one, and the grandchild by both of the clients that it inherited.
        assert eventually(lambda: client.stats()["broker"]["clients"] == 3)
        swap = use_fully(client)
        running.tell()
        assert running.receive() is True
        assert figure(client, "held") == size
        running.tell()
        assert running.receive() == 0
        running.tell()
        running.receive()
        assert all_there(swap)
        running.tell()
        assert eventually(lambda: figure(client, "reserved") == 0)


def test_a_fork_between_claims_shares_nothing(client: EmbeddedClient) -> None:
    """What is claimed after the fork is the claimer's alone, and lent again without the broker."""
    reservation = client.reserve(10 * PAGE)
    reservation.claim().free()

    def child(said: Said) -> list[int]:
        said.hear()
        found = []
        for _ in range(3):
            with reservation.claim() as buffer:
                found.append(buffer.nbytes)
        return found

    with forked(child) as running, broker_stopped(client):
        running.tell()
        assert running.receive() == [10 * PAGE] * 3
        reservation.claim().free()


def test_a_fork_while_a_thread_claims(client: EmbeddedClient) -> None:
    reservation = client.reserve(10 * PAGE)
    stop = threading.Event()
    failures: list[BaseException] = []

    def busy() -> None:
        try:
            while not stop.is_set():
                with reservation.claim(timeout=WAIT_S) as buffer, buffer.view as view:
                    view[:4] = b"busy"
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(10):
            assert in_fork(lambda _: len(client.areas())) == 1
    finally:
        stop.set()
        thread.join(WAIT_S)
    assert not failures
    assert eventually(lambda: client.stats()["broker"]["clients"] == 1)
    assert eventually(lambda: figure(client, "held") == 0)
    with reservation.claim(timeout=WAIT_S):
        pass
