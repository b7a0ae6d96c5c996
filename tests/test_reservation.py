"""Reservations in workers' hands: promised, lent to the cache, claimed without a message, in turn, and given back however their holders end."""

from __future__ import annotations

import contextlib
import gc
import mmap
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

import gcma_shm
from gcma_shm import (
    ArenaError,
    ArenaExhausted,
    BrokerUnavailable,
    BufferExists,
    Client,
    NoSuchArea,
    NoSuchBuffer,
    QuotaExceeded,
    Reservation,
    StaleHandle,
    layout,
)
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.swap import Swap
from tests.processes import WAIT_S, Said, eventually, forked, in_fork, stands_still

PAGE = 4096
SLOTS = 2000  # twice what the arena of these tests has room for
STOPS_MAX = 5000  # attempts to stop a broker in the middle of a copy
LOOKS_MAX = 2000  # whether it is in one, before each of them


def page_of(value: int) -> bytes:
    return (value + 1).to_bytes(8, "little") * (PAGE // 8)


def figure(client: Client, name: str) -> int:
    return sum(getattr(area, name) for area in client.areas())


def whole(client: Client) -> int:
    return client.areas()[0].largest_free


def fill(client: Client) -> Swap:
    """Stores into every slot, and loads some: the cache wants all of the area that it can have."""
    swap = client.swap(0, SLOTS, "behind")
    for n in range(SLOTS):
        swap.store(n, page_of(n))
        swap.load(max(n - 5, 0))
    return swap


def fill_until_lent(client: Client) -> Swap:
    def is_lent() -> bool:
        fill(client)
        return figure(client, "lent") > 0

    assert eventually(is_lent)
    return client.swap(0, SLOTS, "behind")


def all_there(swap: Swap) -> bool:
    return all(swap.load(n) == page_of(n) for n in range(SLOTS))


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"


def filling(client: Client) -> int:
    """The page that the broker is just copying to, and 1; 0: none."""
    assert client._plane is not None
    return client._plane.read(layout.FILLING_AT)


@contextlib.contextmanager
def stopped(client: EmbeddedClient, in_copy: bool = False) -> Iterator[bool]:
    """The broker is stopped meanwhile, not in the middle of a copy; `in_copy`: in one, as far as it can be caught there. Tells whether it is."""
    pid = client.broker_pid
    try:
        for _ in range(STOPS_MAX):
            # One that was woken and is stopped again at once has not had a turn in between: it would be where it was.
            for _ in range(LOOKS_MAX):
                if bool(filling(client)) == in_copy:
                    break
            os.kill(pid, signal.SIGSTOP)
            assert eventually(lambda: stands_still(pid))
            if bool(filling(client)) == in_copy:
                break
            os.kill(pid, signal.SIGCONT)
        yield bool(filling(client))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def churning(client: Client, workers: int = 2) -> Iterator[mmap.mmap]:
    """Forked workers with clients of their own that store and load at full speed. The map counts, a word each, their rounds;
    a load that returns anything but a page of its slot ends in a word of ones.
    """
    counts = mmap.mmap(-1, PAGE)
    swap = client.swap(0, SLOTS, "behind")
    for n in range(SLOTS):
        swap.store(n, page_of(n))

    def work(said: Said, worker: int) -> None:
        os.nice(5)
        with gcma_shm.connect(client.endpoint) as own, memoryview(counts).cast("Q") as rounds:
            mine = own.swap(0, SLOTS, "behind")
            said.say()
            while True:
                for n in range(worker, SLOTS, workers):
                    mine.store(n, page_of(n))
                    other = n * 7919 % SLOTS
                    if mine.load(other) != page_of(other):
                        rounds[worker] = (1 << 64) - 1
                        return
                    if n % 100 < workers:
                        rounds[worker] += 1

    with contextlib.ExitStack() as children:
        for worker in range(workers):
            child = children.enter_context(forked(lambda said, worker=worker: work(said, worker)))  # type: ignore[misc]
            child.receive()
        yield counts
        with memoryview(counts).cast("Q") as rounds:
            assert (1 << 64) - 1 not in rounds.tolist(), "a load returned what was never stored there"
    counts.close()


def rounds_of(counts: mmap.mmap) -> int:
    with memoryview(counts).cast("Q") as rounds:
        found = rounds.tolist()
    assert (1 << 64) - 1 not in found, "a load returned what was never stored there"
    return sum(found)


@contextlib.contextmanager
def impatient(client: Client, timeout: float) -> Iterator[None]:
    """What waits for a broker that will not answer waits no longer than that; all else has the time that it takes."""
    before, client._channel.timeout = client._channel.timeout, timeout
    try:
        yield
    finally:
        client._channel.timeout = before


@pytest.fixture
def client() -> Iterator[EmbeddedClient]:
    """Smaller than everybody's, so that it is full at once: about 900 pages in one area."""
    with gcma_shm.embedded("4M", timeout=20) as owner:
        yield owner


# --- what it is


def test_what_it_says_of_itself(client: EmbeddedClient) -> None:
    reservation = client.reserve(PAGE + 1, name="mine")
    told = reservation.nbytes, reservation.area, reservation.name, reservation.released
    assert told == (2 * PAGE, "default", "mine", False)
    assert "8192 bytes" in repr(reservation)
    with reservation.claim() as buffer:
        assert (buffer.nbytes, buffer.area, buffer.offset) == (2 * PAGE, "default", reservation.offset)
        assert len(buffer.view) == buffer.nbytes
    reservation.release()
    assert reservation.released
    assert "released" in repr(reservation)


def test_promised_lent_claimed_and_lent_again(client: EmbeddedClient) -> None:
    size = whole(client)
    reservation = client.reserve(size)
    (area,) = client.areas()
    assert (area.reserved, area.held, area.largest_free) == (size, 0, 0)
    swap = fill_until_lent(client)
    assert all_there(swap)

    buffer = reservation.claim()
    (area,) = client.areas()
    assert (area.reserved, area.held, area.lent, area.free) == (size, size, 0, 0)
    assert all_there(swap), "right after the claim"
    with buffer.view as view:
        view[:] = b"\xbb" * size
        fill(client)
        assert all_there(swap), "while it is claimed"
        assert view == b"\xbb" * size

    buffer.free()
    (area,) = client.areas()
    assert (area.reserved, area.held) == (size, 0)
    assert all_there(swap), "after it was freed"
    fill_until_lent(client)
    assert all_there(swap), "with the cache back"
    reservation.release()
    assert (figure(client, "reserved"), whole(client)) == (0, size)
    assert all_there(swap)


def test_its_place_does_not_change(client: EmbeddedClient) -> None:
    reservation = client.reserve(10 * PAGE)
    others = [client.alloc_contig(PAGE) for _ in range(5)]
    for round_ in range(5):
        with reservation.claim() as buffer:
            assert buffer.offset == reservation.offset
        others[round_].free()


def test_what_is_reserved_is_nobody_elses(client: EmbeddedClient) -> None:
    reservation = client.reserve(whole(client) - 3 * PAGE)
    assert client.areas()[0].largest_free == 3 * PAGE
    with pytest.raises(ArenaExhausted) as raised:
        client.alloc_contig(4 * PAGE)
    assert raised.value.holders == {client.number: reservation.nbytes}
    with pytest.raises(ArenaExhausted):
        client.reserve(4 * PAGE)
    first = client.alloc_contig(3 * PAGE)
    with reservation.claim() as second, first.view as a, second.view as b:
        a[:], b[:] = b"a" * len(a), b"b" * len(b)
        assert a == b"a" * len(a)


def test_alignment_and_exact_place(client: EmbeddedClient) -> None:
    for align in (1, PAGE, 64 * PAGE, 1 << 20):
        with client.reserve(PAGE), client.reserve(PAGE, align=align) as aligned:
            assert aligned.offset * PAGE % align == 0
    with client.reserve(PAGE, "default", offset=17) as there:
        assert there.offset == 17
        with pytest.raises(ArenaExhausted):
            client.alloc_contig(PAGE, "default", offset=17)
        with pytest.raises(ArenaExhausted):
            client.reserve(3 * PAGE, "default", offset=16)
        with client.reserve(PAGE, "default", offset=16), client.reserve(PAGE, "default", offset=18):
            pass
    assert figure(client, "reserved") == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"nbytes": 0}, ValueError),
        ({"nbytes": "4K"}, TypeError),
        ({"nbytes": 2**60}, ArenaExhausted),
        ({"area": "nowhere"}, NoSuchArea),
        ({"align": 3 * PAGE}, ValueError),
        ({"offset": 1, "align": 2 * PAGE, "area": "default"}, ValueError),
        ({"name": ""}, ValueError),
        ({"name": 7}, TypeError),
        ({"timeout": -1}, ValueError),
    ],
    ids=str,
)
def test_misuse(client: EmbeddedClient, options: dict[str, Any], error: Any) -> None:
    with pytest.raises(error):
        client.reserve(**({"nbytes": PAGE} | options))
    assert figure(client, "reserved") == 0


def test_a_client_by_messages_has_none(client: EmbeddedClient) -> None:
    with gcma_shm.connect(client.endpoint, mapped=False) as other, pytest.raises(ArenaError, match="map"):
        other.reserve(PAGE)


# --- no message


def test_neither_claim_nor_free_is_a_request(client: EmbeddedClient) -> None:
    reservation = client.reserve(whole(client))
    fill(client)

    def asked() -> dict[str, int]:
        """But for the questions whether it is there still, of who waits for its answer for long."""
        requests: dict[str, int] = client.stats()["broker"]["requests"]
        return {operation: count for operation, count in requests.items() if operation != "ping"}

    before = asked()
    for _ in range(20):
        reservation.claim().free()
    assert asked() == before | {"stats": before["stats"] + 1}


def test_a_stopped_broker_is_not_waited_for(client: EmbeddedClient) -> None:
    size = whole(client)
    reservation = client.reserve(size)
    swap = fill_until_lent(client)
    with stopped(client) as in_copy:
        assert not in_copy
        for round_ in range(20):
            with reservation.claim() as buffer, buffer.view as view:
                view[:] = bytes([round_]) * size
                assert all(swap.load(n) == page_of(n) for n in range(round_, SLOTS, 20))
                assert view == bytes([round_]) * size
        assert all_there(swap)
        assert is_stopped(client.broker_pid)
    fill_until_lent(client)
    assert all_there(swap)


def test_a_killed_broker_is_not_needed() -> None:
    with gcma_shm.embedded("4M", timeout=WAIT_S) as client:
        size = whole(client)
        reservation = client.reserve(size)
        swap = fill_until_lent(client)
        swap.sync()
        os.kill(client.broker_pid, signal.SIGKILL)
        for round_ in range(10):
            with reservation.claim() as buffer, buffer.view as view:
                view[:] = bytes([round_]) * size
                assert all(swap.load(n) == page_of(n) for n in range(round_, SLOTS, 10))
                assert view == bytes([round_]) * size
        assert all_there(swap)


def test_a_broker_killed_in_its_copy_is_recognised() -> None:
    """Stopped in the copy of a page into the range it is waited for, within the bound; killed there it is not."""
    with gcma_shm.embedded("4M", timeout=WAIT_S) as client:
        size = whole(client)
        swap = client.swap(0, SLOTS, "behind")
        with churning(client):
            reservation = client.reserve(size)
            with stopped(client, in_copy=True) as in_copy:
                if in_copy:  # nearly always
                    with impatient(client, 1.0), pytest.raises(BrokerUnavailable, match="stopped"):
                        reservation.claim()
                os.kill(client.broker_pid, signal.SIGKILL)
            assert bool(filling(client)) == in_copy, "the copy goes on for ever"
            for round_ in range(5):
                with reservation.claim() as buffer, buffer.view as view:
                    view[:] = bytes([round_]) * size
                    assert all_there(swap)
                    assert view == bytes([round_]) * size
        assert all_there(swap)


def test_a_broker_stopped_in_its_copy_goes_on(client: EmbeddedClient) -> None:
    with gcma_shm.connect(client.endpoint, timeout=WAIT_S) as other, churning(client) as counts:
        reservation = other.reserve(whole(client))
        with stopped(client, in_copy=True) as in_copy:
            if in_copy:
                with impatient(other, 0.3), pytest.raises(BrokerUnavailable, match="stopped"):
                    reservation.claim()
        seen = rounds_of(counts)
        with reservation.claim() as buffer, buffer.view as view:
            view[:] = b"\xcc" * len(view)
            assert eventually(lambda: rounds_of(counts) > seen + 5)
            assert view == b"\xcc" * len(view)


# --- the bytes


def test_a_claimed_ranges_bytes_never_change_while_workers_churn(client: EmbeddedClient) -> None:
    with churning(client) as counts:
        reservation = client.reserve(whole(client) - 50 * PAGE)
        for round_ in range(30):
            seen = rounds_of(counts)
            expected = bytes([round_ + 1]) * reservation.nbytes
            with reservation.claim() as buffer, buffer.view as view:
                view[:] = expected
                assert view == expected
                assert eventually(lambda seen=seen: rounds_of(counts) > seen + 2)  # type: ignore[misc]
                assert view == expected
        assert eventually(lambda: figure(client, "lent") > 0)
    assert all_there(client.swap(0, SLOTS, "behind"))


def test_old_content_is_never_a_page_of_the_cache(client: EmbeddedClient) -> None:
    """Slots whose pages were in the range, never loaded in between: they must be read from the file after the range was lent again."""
    reservation = client.reserve(whole(client))
    for round_ in range(5):
        swap = fill_until_lent(client)
        with reservation.claim() as buffer, buffer.view as view:
            view[:] = page_of(5_000_000 + round_) * (reservation.nbytes // PAGE)
        assert all_there(swap)


# --- giving back


def test_a_scope_and_a_second_free(client: EmbeddedClient) -> None:
    with client.reserve(3 * PAGE) as reservation:
        with reservation.claim() as buffer:
            assert figure(client, "held") == 3 * PAGE
        assert buffer.freed
        buffer.free()
        assert figure(client, "held") == 0
        again = reservation.claim()
        buffer.free()  # of the claim before: no effect on this one
        assert not again.freed
        assert figure(client, "held") == 3 * PAGE
        with pytest.raises(ArenaExhausted):
            reservation.claim()
        again.free()
    assert reservation.released
    assert figure(client, "reserved") == 0
    reservation.release()
    with pytest.raises(StaleHandle):
        reservation.claim()
    with pytest.raises(StaleHandle):
        pickle.dumps(reservation)
    with pytest.raises(StaleHandle):
        _ = again.view
    with pytest.raises(StaleHandle):
        pickle.dumps(again)


def test_free_and_release_are_refused_while_a_view_or_array_lives(client: EmbeddedClient) -> None:
    reservation = client.reserve(PAGE)
    buffer = reservation.claim()
    view, array = buffer.view, buffer.numpy(10)
    part = array[2:5]
    for refused in (buffer.free, reservation.release):
        with pytest.raises(BufferError, match="alive"):
            refused()
    view.release()
    del array
    for refused in (buffer.free, reservation.release):
        with pytest.raises(BufferError, match="alive"):
            refused()
    part[:] = 7
    assert part.tolist() == [7] * 3
    assert figure(client, "held") == PAGE
    assert (buffer.freed, reservation.released) == (False, False)
    del part
    reservation.release()
    assert buffer.freed
    assert figure(client, "reserved") == figure(client, "held") == 0


def test_release_frees_what_is_claimed(client: EmbeddedClient) -> None:
    size = whole(client)
    reservation = client.reserve(size)
    buffer = reservation.claim()
    reservation.release()
    assert buffer.freed
    assert whole(client) == size
    client.alloc_contig(size).free()


def test_an_array_keeps_the_memory_of_what_is_forgotten(client: EmbeddedClient) -> None:
    size = whole(client)
    array = client.reserve(size).claim().numpy(size)
    gc.collect()
    array[:] = 7
    swap = fill(client)
    (area,) = client.areas()
    assert (area.held, area.reserved, area.lent) == (size, size, 0)
    assert (array == 7).all()
    assert all_there(swap)
    del array
    gc.collect()
    assert eventually(lambda: figure(client, "reserved") == 0), "nothing refers to the reservation any more"
    fill_until_lent(client)
    assert all_there(swap)


def test_an_array_keeps_the_claim_and_its_end_lends_the_range(client: EmbeddedClient) -> None:
    size = whole(client)
    reservation = client.reserve(size)
    array = reservation.claim().numpy(size)
    gc.collect()
    array[:] = 9
    fill(client)
    assert (array == 9).all()
    assert figure(client, "held") == size
    with pytest.raises(ArenaExhausted):
        reservation.claim()
    with pytest.raises(BufferError):
        reservation.release()
    del array
    gc.collect()
    assert figure(client, "held") == 0
    fill_until_lent(client)
    reservation.claim().free()


def test_a_forgotten_claim_and_a_forgotten_reservation(client: EmbeddedClient) -> None:
    reservation = client.reserve(PAGE)
    cycle: list[object] = [reservation.claim()]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert figure(client, "held") == 0
    reservation.claim().free()
    del reservation
    gc.collect()
    assert eventually(lambda: figure(client, "reserved") == 0)
    for _ in range(50):  # the whole of it each time
        client.reserve(whole(client)).claim()
    gc.collect()
    assert eventually(lambda: figure(client, "reserved") == 0)


def test_close_is_refused_while_a_view_lives(client: EmbeddedClient) -> None:
    other = gcma_shm.connect(client.endpoint)
    reservation = other.reserve(PAGE)
    view = reservation.claim().view
    with pytest.raises(BufferError):
        other.close()
    assert not other.closed
    view.release()
    buffer = reservation.claim() if figure(client, "held") == 0 else None
    other.close()
    assert reservation.released
    assert buffer is None or buffer.freed
    with pytest.raises(StaleHandle):
        reservation.claim()
    reservation.release()
    assert figure(client, "reserved") == figure(client, "held") == 0


def test_close_gives_everything_back(client: EmbeddedClient) -> None:
    size = whole(client)
    with gcma_shm.connect(client.endpoint) as other:
        reservations = [other.reserve(n * PAGE) for n in range(1, 6)]
        buffers = [reservation.claim() for reservation in reservations[:3]]
        assert (figure(client, "reserved"), figure(client, "held")) == (15 * PAGE, 6 * PAGE)
    assert (figure(client, "reserved"), figure(client, "held"), whole(client)) == (0, 0, size)
    assert all(buffer.freed for buffer in buffers)
    swap = fill(client)
    assert all_there(swap)


# --- names and quotas


def test_names(client: EmbeddedClient) -> None:
    reservation = client.reserve(2 * PAGE, name="frames")
    with pytest.raises(BufferExists):
        client.reserve(PAGE, name="frames")
    with pytest.raises(BufferExists):
        client.alloc_contig(PAGE, name="frames")
    (told,) = client.names()
    assert (told.name, told.nbytes, told.reservation, told.holders) == ("frames", 2 * PAGE, True, 1)
    with gcma_shm.connect(client.endpoint) as other:
        with pytest.raises(TypeError, match="attach_reservation"):
            other.attach("frames")
        theirs = other.attach_reservation("frames")
        assert (theirs.nbytes, theirs.offset, theirs.name) == (2 * PAGE, reservation.offset, "frames")
        assert client.names()[0].holders == 2
        reservation.release()
        assert client.names()[0].holders == 1
        theirs.claim().free()
    assert client.names() == []
    with pytest.raises(NoSuchBuffer):
        client.attach_reservation("frames")
    client.reserve(PAGE, name="frames").release()


def test_a_buffers_name_is_no_reservations(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE, name="frames")
    with gcma_shm.connect(client.endpoint) as other:
        with pytest.raises(TypeError, match="attach"):
            other.attach_reservation("frames")
        buffer.free()
        assert figure(client, "held") == 0, "nothing is held after the refusal"


def test_quotas_count_what_is_promised(client: EmbeddedClient) -> None:
    assert client.quota(10 * PAGE).held == 0
    reservation = client.reserve(6 * PAGE)
    assert (client.quota().held, client.quota().quota) == (6 * PAGE, 10 * PAGE)
    for ask in (client.reserve, client.alloc_contig):
        with pytest.raises(QuotaExceeded):
            ask(5 * PAGE)
    with reservation.claim():
        assert client.quota().held == 6 * PAGE, "a claim is no second promise"
    buffer = client.alloc_contig(4 * PAGE)
    with pytest.raises(QuotaExceeded):
        client.reserve(1)
    reservation.release()
    assert client.quota().held == 4 * PAGE
    buffer.free()


# --- areas


@pytest.mark.parametrize("how", ["cache=off", "drained", "drained while claimed"])
def test_an_area_that_is_not_lent(how: str) -> None:
    with gcma_shm.embedded(
        "4M", areas={"pure": f"1M{',cache=off' if how == 'cache=off' else ''}", "other": "1M"}
    ) as client:
        size = 1 << 20
        reservation = client.reserve(size, "pure")
        swap = fill_until_lent(client)
        first = reservation.claim() if how == "drained while claimed" else None
        if how != "cache=off":
            client.drain_area("pure")

        def pure() -> gcma_shm.AreaInfo:
            return next(area for area in client.areas() if area.name == "pure")

        assert pure().lent == 0
        if first is not None:
            with first.view as view:
                view[:] = b"\xdd" * size
                fill(client)
                assert view == b"\xdd" * size
            first.free()
        for round_ in range(3):
            with reservation.claim() as buffer, buffer.view as view:
                assert pure().held == size
                view[:] = bytes([round_]) * size
                fill(client)
                assert view == bytes([round_]) * size
            fill(client)
            assert (pure().held, pure().reserved) == (0, size)
            assert eventually(lambda: pure().lent == 0)
            assert all_there(swap)
        if how != "cache=off":
            client.resume_area("pure")

            def is_lent() -> bool:
                fill(client)
                return pure().lent > 0

            assert eventually(is_lent)
            with reservation.claim() as buffer, buffer.view as view:
                view[:] = b"\xee" * size
                assert all_there(swap)
        reservation.release()
        assert pure().largest_free == size
        assert all_there(swap)


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
            fill(client)
            running.tell()
            running.receive()
            with pytest.raises(ArenaExhausted):
                reservation.claim()
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(reservation.claim, WAIT_S)
                running.kill()
                with waiting.result(WAIT_S) as buffer, buffer.view as view:
                    swap = fill(client)
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
    swap = fill_until_lent(client)
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
            swap = fill(client)
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
            swap = fill(client)
            assert figure(client, "held") == size, "the parent has it"
            with buffer.view as view:
                assert view == b"\xbb" * size
            buffer.free()
        assert figure(client, "held") == 0
        assert figure(client, "reserved") == size
        fill_until_lent(client)
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
        fill(client)
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
        swap = fill(client)
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

    with forked(child) as running, stopped(client):
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
