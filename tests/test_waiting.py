"""alloc_contig and reserve with timeout=: the line of those who wait for memory, as workers see it."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

import gcma_shm
from gcma_shm import ArenaExhausted, BrokerUnavailable, Buffer, BufferExists, Client, QuotaExceeded
from gcma_shm.broker.line import ASKED_S
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.steps import WAIT_SLICE_S
from tests.client import held
from tests.processes import WAIT_S, Child, Said, eventually, forked, stop

PAGE = 4096
AREA_PAGES = 16
SIZE = AREA_PAGES * PAGE
LINE_MAX_CLIENT = 64  # requests of one client in line


def in_line(client: Client, count: int) -> bool:
    return eventually(lambda: client.stats()["broker"]["in_line"] == count)


def has_lost_its_place(stopping: float) -> bool:
    """Whether a waiter that was stopped then may have been taken for gone since: it comes every second, at the latest."""
    return time.monotonic() - stopping > ASKED_S - 2 * WAIT_SLICE_S


@pytest.fixture
def client() -> Iterator[EmbeddedClient]:
    """One area of 16 pages."""
    with gcma_shm.embedded("4M", areas={"a": SIZE}, clients=12) as owner:
        yield owner


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """For what waits in threads of this process."""
    with ThreadPoolExecutor(8) as threads:
        yield threads


def waiter(client: Client, nbytes: int, **options: Any) -> Callable[[Said], None]:
    """For a forked child: a client of its own that waits for memory when it is told to, says what it got, and frees it when it is told.

    To be forked before what it will wait for is allocated: it would hold that, too.
    """

    def child(said: Said) -> None:
        with gcma_shm.connect(client.endpoint) as own:
            said.say(own.number)
            said.hear()
            with own.alloc_contig(nbytes, timeout=WAIT_S, **options) as buffer:
                said.say((buffer.offset, buffer.nbytes))
                said.hear()
            said.say("freed")
            said.hear()

    return child


# --- served


@pytest.mark.parametrize("timeout", [WAIT_S, None])
def test_served_when_another_thread_frees(
    client: EmbeddedClient, pool: ThreadPoolExecutor, timeout: float | None
) -> None:
    """Of the same client: nobody holds a lock while it waits, and everything else goes on."""
    first = client.alloc_contig(SIZE)
    waiting = pool.submit(client.alloc_contig, SIZE, timeout=timeout)
    assert in_line(client, 1)
    swap = client.swap(0, 100)
    for n in range(100):
        swap.store(n, (n + 1).to_bytes(8, "little") * (PAGE // 8))
    assert not waiting.done()
    first.free()
    with waiting.result(WAIT_S) as buffer:
        assert buffer.nbytes == SIZE
    assert in_line(client, 0)
    assert held(client) == 0


def test_served_at_once_when_there_is_room(client: EmbeddedClient) -> None:
    with client.alloc_contig(SIZE, timeout=None) as buffer:
        assert buffer.nbytes == SIZE
    with client.reserve(SIZE, timeout=1) as reservation:
        assert reservation.nbytes == SIZE


def test_served_by_garbage_collection(client: EmbeddedClient, pool: ThreadPoolExecutor) -> None:
    cycle: list[object] = [client.alloc_contig(SIZE)]
    cycle.append(cycle)
    waiting = pool.submit(client.alloc_contig, SIZE, timeout=WAIT_S)
    assert in_line(client, 1)
    del cycle
    gc.collect()
    waiting.result(WAIT_S).free()


@pytest.mark.parametrize("how", ["killed", "closed"])
def test_served_by_the_end_of_a_holder(client: EmbeddedClient, pool: ThreadPoolExecutor, how: str) -> None:
    def child(said: Said) -> None:
        with gcma_shm.connect(client.endpoint) as own:
            buffer = own.alloc_contig(SIZE)
            said.say(buffer.nbytes)
            said.hear()
        said.say()
        said.hear()

    with forked(child) as running:
        running.receive()
        waiting = pool.submit(client.alloc_contig, SIZE, timeout=WAIT_S)
        assert in_line(client, 1)
        if how == "killed":
            running.kill()
        else:
            running.tell()
        waiting.result(WAIT_S).free()


def test_served_by_the_release_of_a_reservation(client: EmbeddedClient, pool: ThreadPoolExecutor) -> None:
    reservation = client.reserve(SIZE)
    waiting = pool.submit(client.alloc_contig, SIZE, timeout=WAIT_S)
    assert in_line(client, 1)
    reservation.claim().free()
    assert client.stats()["broker"]["in_line"] == 1, "a promise is kept, claimed or not"
    reservation.release()
    waiting.result(WAIT_S).free()


def test_served_by_the_end_of_a_hand_over(client: EmbeddedClient, pool: ThreadPoolExecutor) -> None:
    buffer = client.alloc_contig(SIZE)
    buffer.hand_over(timeout=0.01)
    buffer.free()
    with contextlib.suppress(ArenaExhausted):
        client.alloc_contig(SIZE).free()
    pool.submit(client.alloc_contig, SIZE, timeout=WAIT_S).result(WAIT_S).free()


def test_served_when_an_area_is_resumed(client: EmbeddedClient, pool: ThreadPoolExecutor) -> None:
    client.drain_area("a")
    waiting = pool.submit(client.alloc_contig, SIZE, timeout=WAIT_S)
    assert in_line(client, 1)
    client.resume_area("a")
    waiting.result(WAIT_S).free()


def test_a_reservation_waits_as_well(client: EmbeddedClient, pool: ThreadPoolExecutor) -> None:
    first = client.alloc_contig(SIZE)
    waiting = pool.submit(client.reserve, SIZE, timeout=WAIT_S, name="promised")
    assert in_line(client, 1)
    assert client.names() == []
    first.free()
    with waiting.result(WAIT_S) as reservation:
        assert reservation.name == "promised"
        reservation.claim().free()


def test_what_is_asked_for_is_what_comes(client: EmbeddedClient, pool: ThreadPoolExecutor) -> None:
    with client.alloc_contig(SIZE) as first, first.view as view:
        view[:] = b"\xaa" * SIZE
        exactly = pool.submit(client.alloc_contig, PAGE, "a", offset=7, zero=True, timeout=WAIT_S, name="seven")
        assert in_line(client, 1)
        aligned = pool.submit(client.alloc_contig, PAGE, align=8 * PAGE, timeout=WAIT_S)
        assert in_line(client, 2)
    with exactly.result(WAIT_S) as buffer, buffer.view as view:
        assert (buffer.offset, buffer.name) == (7, "seven")
        assert not any(view)
    with aligned.result(WAIT_S) as buffer:
        assert buffer.offset % 8 == 0


# --- first come, first served


def test_processes_are_served_in_order(client: EmbeddedClient) -> None:
    with contextlib.ExitStack() as children:
        running: list[Child] = []
        for _ in range(3):
            running.append(children.enter_context(forked(waiter(client, SIZE))))
            running[-1].receive()
        first = client.alloc_contig(SIZE)
        for n, child in enumerate(running):
            child.tell()
            assert in_line(client, n + 1)
        first.free()
        for n, child in enumerate(running):
            assert child.receive() == (0, SIZE)
            assert client.stats()["broker"]["in_line"] == 2 - n
            assert held(client) == SIZE
            assert not any(later.talk.poll() for later in running[n + 1 :])
            child.tell()
            assert child.receive() == "freed"
    assert eventually(lambda: held(client) == 0)


def test_threads_are_served_in_order(client: EmbeddedClient, pool: ThreadPoolExecutor) -> None:
    first = client.alloc_contig(SIZE)
    served: list[int] = []

    def wait(n: int) -> None:
        with client.alloc_contig(SIZE, timeout=WAIT_S):
            served.append(n)

    waiting: list[Future[None]] = []
    for n in range(5):
        waiting.append(pool.submit(wait, n))
        assert in_line(client, n + 1)
    first.free()
    for one in waiting:
        one.result(WAIT_S)
    assert served == list(range(5))


def test_a_small_one_passes_where_it_delays_nobody(client: EmbeddedClient, pool: ThreadPoolExecutor) -> None:
    """Pages 6 to 9 are held. Who waits for 12 pages is served when these have gone, whatever is in the last four."""
    middle = client.alloc_contig(4 * PAGE, "a", offset=6)
    large = pool.submit(client.alloc_contig, 12 * PAGE, timeout=WAIT_S)
    assert in_line(client, 1)
    small = client.alloc_contig(4 * PAGE)
    assert small.offset in (0, 12), "at one of the area's ends"
    assert client.areas()[0].largest_free == 6 * PAGE
    for nbytes in (PAGE, 2 * PAGE):
        with pytest.raises(ArenaExhausted, match="wait in line"):
            client.alloc_contig(nbytes)
    middle.free()
    got = large.result(WAIT_S)
    assert held(client) == SIZE
    got.free()
    small.free()


def test_a_small_one_waits_where_it_would_delay(client: EmbeddedClient, pool: ThreadPoolExecutor) -> None:
    """Whichever end is freed first, the eight free pages in the middle are part of the twelve."""
    ends = [client.alloc_contig(4 * PAGE, "a", offset=offset) for offset in (0, 12)]
    large = pool.submit(client.alloc_contig, 12 * PAGE, timeout=WAIT_S)
    assert in_line(client, 1)
    with pytest.raises(ArenaExhausted) as raised:
        client.alloc_contig(PAGE)
    assert raised.value.largest_free == 8 * PAGE
    small = pool.submit(client.alloc_contig, 4 * PAGE, timeout=WAIT_S)
    assert in_line(client, 2)
    assert not small.done()
    ends[0].free()
    got = large.result(WAIT_S)
    assert got.offset == 0
    assert not small.done()
    ends[1].free()
    small.result(WAIT_S).free()
    got.free()


def test_in_another_area_nobody_is_delayed(pool: ThreadPoolExecutor) -> None:
    with gcma_shm.embedded("4M", areas={"a": SIZE, "b": SIZE}) as client:
        first = client.alloc_contig(SIZE, "a")
        waiting = pool.submit(client.alloc_contig, SIZE, "a", timeout=WAIT_S)
        assert in_line(client, 1)
        for _ in range(3):
            assert client.alloc_contig(SIZE).area == "b"
        first.free()
        waiting.result(WAIT_S).free()


def test_who_gives_up_makes_room_for_who_is_behind(client: EmbeddedClient, pool: ThreadPoolExecutor) -> None:
    first = client.alloc_contig(8 * PAGE, "a", offset=0)
    for patience in (0.5, 5.0, 30.0):  # until it was long enough for the other one to stand behind it
        large = pool.submit(client.alloc_contig, SIZE, timeout=patience)
        assert eventually(lambda: client.stats()["broker"]["in_line"] == 1 or large.done())  # noqa: B023 - at once
        small = pool.submit(client.alloc_contig, 8 * PAGE, timeout=WAIT_S)
        assert eventually(lambda: client.stats()["broker"]["in_line"] == 2 or large.done())  # noqa: B023
        was_behind = not large.done()
        with pytest.raises(ArenaExhausted):
            large.result(WAIT_S)
        with small.result(WAIT_S):
            assert held(client) == SIZE
        if was_behind:
            break
    assert was_behind
    first.free()
    assert in_line(client, 0)


# --- leaving the line


def test_time_over(client: EmbeddedClient) -> None:
    with gcma_shm.connect(client.endpoint) as other:
        ours, theirs = client.alloc_contig(10 * PAGE), other.reserve(4 * PAGE)
        with pytest.raises(ArenaExhausted) as raised:
            client.alloc_contig(4 * PAGE, timeout=0.05)
        error = raised.value
        assert error.requested == 4 * PAGE
        assert error.largest_free == client.areas()[0].largest_free == 2 * PAGE
        assert error.holders == {client.number: 10 * PAGE, other.number: 4 * PAGE}
        assert in_line(client, 0)
        theirs.release()
        ours.free()
    assert held(client) == 0


def test_a_killed_waiter_leaves_the_line(client: EmbeddedClient, pool: ThreadPoolExecutor) -> None:
    with forked(waiter(client, SIZE)) as running:
        running.receive()
        first = client.alloc_contig(SIZE)
        running.tell()
        assert in_line(client, 1)
        behind = pool.submit(client.alloc_contig, SIZE, timeout=WAIT_S)
        assert in_line(client, 2)
        running.kill()
        assert in_line(client, 1)
    first.free()
    behind.result(WAIT_S).free()
    assert (held(client), client.stats()["broker"]["in_line"]) == (0, 0)


def test_a_waiter_killed_as_it_is_served(client: EmbeddedClient) -> None:
    for _ in range(5):
        with forked(waiter(client, SIZE)) as running:
            running.receive()
            first = client.alloc_contig(SIZE)
            running.tell()
            assert in_line(client, 1)
            first.free()
            running.kill()
        assert eventually(lambda: held(client) == 0)
        assert in_line(client, 0)


@pytest.mark.parametrize("behind", [False, True])
def test_an_interrupted_waiter_leaves_the_line(client: EmbeddedClient, behind: bool) -> None:
    """Ctrl-C is heard while it waits; then its client is as good as before."""

    def child(said: Said) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with gcma_shm.connect(client.endpoint) as own:
            said.say()
            said.hear()
            try:
                own.alloc_contig(SIZE, timeout=None, name="late")
            except KeyboardInterrupt:
                said.say("interrupted")
            said.hear()
            with own.alloc_contig(PAGE) as buffer:
                said.say(buffer.nbytes)
            said.hear()

    with forked(child) as running, ThreadPoolExecutor(1) as pool:
        running.receive()
        first = client.alloc_contig(SIZE)
        earlier = pool.submit(client.alloc_contig, SIZE, timeout=WAIT_S) if behind else None
        assert in_line(client, int(behind))
        running.tell()
        assert in_line(client, 1 + behind)
        os.kill(running.pid, signal.SIGINT)
        assert running.receive() == "interrupted"
        assert in_line(client, int(behind))
        first.free()
        if earlier is not None:
            earlier.result(WAIT_S).free()
        assert (held(client), client.names()) == (0, [])
        running.tell()
        assert running.receive() == PAGE


def test_a_closed_client_leaves_the_line(client: EmbeddedClient, pool: ThreadPoolExecutor) -> None:
    first = client.alloc_contig(SIZE)
    other = gcma_shm.connect(client.endpoint)
    waiting = pool.submit(other.alloc_contig, SIZE, timeout=WAIT_S)
    assert in_line(client, 1)
    other.close()
    with pytest.raises(gcma_shm.GcmaError):
        waiting.result(WAIT_S)
    assert in_line(client, 0)
    first.free()
    client.alloc_contig(SIZE).free()


def test_a_stopped_waiter_blocks_nobody(client: EmbeddedClient, pool: ThreadPoolExecutor) -> None:
    """It is served in its turn, stopped or not: what it asked for is its own, and nobody waits for more than that."""
    with forked(waiter(client, 8 * PAGE)) as running:
        running.receive()
        first = client.alloc_contig(SIZE)
        running.tell()
        assert in_line(client, 1)
        behind = pool.submit(client.alloc_contig, 8 * PAGE, timeout=WAIT_S)
        assert in_line(client, 2)
        stopping = time.monotonic()
        stop(running.pid)
        first.free()
        behind.result(WAIT_S).free()
        for _ in range(3):
            client.alloc_contig(8 * PAGE, timeout=WAIT_S).free()
        assert held(client) == 8 * PAGE or has_lost_its_place(stopping)
        os.kill(running.pid, signal.SIGCONT)
        assert running.receive()[1] == 8 * PAGE
        running.tell()
        assert running.receive() == "freed"
        assert held(client) == 0


def test_a_stopped_waiter_that_is_killed(client: EmbeddedClient, pool: ThreadPoolExecutor) -> None:
    with forked(waiter(client, SIZE, name="theirs")) as running:
        running.receive()
        first = client.alloc_contig(SIZE)
        running.tell()
        assert in_line(client, 1)
        stopping = time.monotonic()
        stop(running.pid)
        first.free()
        assert held(client) == SIZE or has_lost_its_place(stopping)
        assert [told.name for told in client.names()] == ["theirs"] or has_lost_its_place(stopping)
        behind = pool.submit(client.alloc_contig, SIZE, timeout=WAIT_S)
        assert eventually(lambda: behind.done() or client.stats()["broker"]["in_line"] == 1)
        assert not behind.done() or has_lost_its_place(stopping)
        running.kill()
        behind.result(WAIT_S).free()
    assert client.names() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_broker_that_ends_meanwhile(number: int) -> None:
    with gcma_shm.embedded("4M", areas={"a": SIZE}, timeout=WAIT_S) as client, ThreadPoolExecutor(2) as pool:
        client.alloc_contig(PAGE)
        gc.collect()
        first = client.alloc_contig(SIZE)
        waiting = [pool.submit(client.alloc_contig, SIZE, timeout=None) for _ in range(2)]
        assert in_line(client, 2)
        client._channel.timeout = 1.0  # of what will not be answered
        os.kill(client.broker_pid, number)
        for one in waiting:
            with pytest.raises((BrokerUnavailable, gcma_shm.Closed)):
                one.result(WAIT_S)
        assert not first.freed


def test_a_fork_of_a_client_that_waits(client: EmbeddedClient, pool: ThreadPoolExecutor) -> None:
    """The child did not ask, and gets nothing of it."""
    first = client.alloc_contig(SIZE)
    waiting = pool.submit(client.alloc_contig, SIZE, timeout=WAIT_S)
    assert in_line(client, 1)

    def child(said: Said) -> None:
        first.free()
        said.say(client.stats()["broker"]["in_line"])
        said.hear()

    with forked(child) as running:
        assert running.receive() == 1
        first.free()
        buffer = waiting.result(WAIT_S)
        assert held(client) == SIZE
        buffer.free()
        assert held(client) == 0, "the child does not hold it"


# --- refused


@pytest.mark.parametrize("timeout", [WAIT_S, None])
def test_what_can_never_be_is_not_waited_for(client: EmbeddedClient, timeout: float | None) -> None:
    for ask in (client.alloc_contig, client.reserve):
        with pytest.raises(ArenaExhausted) as raised:
            ask(SIZE + 1, timeout=timeout)
        assert raised.value.requested == SIZE + PAGE
    client.quota(2 * PAGE)
    with pytest.raises(QuotaExceeded):
        client.alloc_contig(3 * PAGE, timeout=timeout)
    assert client.stats()["broker"]["in_line"] == 0


def test_what_a_share_can_never_give_is_not_waited_for(pool: ThreadPoolExecutor) -> None:
    with gcma_shm.embedded("4M", areas={"a": f"{SIZE},share=50"}) as client:
        client.alloc_contig(SIZE // 2, timeout=None).free()
        refused = pool.submit(client.alloc_contig, SIZE // 2 + PAGE, timeout=3)
        assert eventually(lambda: refused.done() or client.stats()["broker"]["in_line"] == 1)
        assert refused.done(), "it waits for what no free can bring"
        assert isinstance(refused.exception(), ArenaExhausted)


def test_a_share_is_waited_for(pool: ThreadPoolExecutor) -> None:
    with gcma_shm.embedded("4M", areas={"a": f"{SIZE},share=50"}) as client:
        first = client.alloc_contig(SIZE // 2)
        waiting = pool.submit(client.alloc_contig, SIZE // 2, timeout=WAIT_S)
        assert in_line(client, 1)
        first.free()
        waiting.result(WAIT_S).free()


@pytest.mark.parametrize("timeout", [-1, float("nan"), 1e9, "1"])
def test_a_timeout_that_is_none(client: EmbeddedClient, timeout: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        client.alloc_contig(PAGE, timeout=timeout)
    assert held(client) == 0


def test_a_line_is_bounded(client: EmbeddedClient) -> None:
    first = client.alloc_contig(SIZE)
    served: list[Buffer] = []
    done = threading.Semaphore(0)

    def wait() -> None:
        with client.alloc_contig(PAGE, timeout=WAIT_S) as buffer:
            served.append(buffer)
        done.release()

    with ThreadPoolExecutor(LINE_MAX_CLIENT) as pool:
        waiting = [pool.submit(wait) for _ in range(LINE_MAX_CLIENT)]
        assert in_line(client, LINE_MAX_CLIENT)
        with pytest.raises(ArenaExhausted, match="the line is full"):
            client.alloc_contig(PAGE, timeout=WAIT_S)
        with gcma_shm.connect(client.endpoint) as other, pytest.raises(ArenaExhausted) as raised:
            other.alloc_contig(PAGE, timeout=0.01)
        assert "the line is full" not in str(raised.value), "the bound is each client's"
        first.free()
        for one in waiting:
            one.result(WAIT_S)
    assert len(served) == LINE_MAX_CLIENT
    assert held(client) == 0


def test_a_name_or_quota_used_up_meanwhile(client: EmbeddedClient, pool: ThreadPoolExecutor) -> None:
    with gcma_shm.connect(client.endpoint) as other:
        first = client.alloc_contig(SIZE)
        named = [pool.submit(who.alloc_contig, PAGE, timeout=WAIT_S, name="one") for who in (client, other)]
        assert in_line(client, 2)
        large = pool.submit(other.alloc_contig, 2 * PAGE, timeout=WAIT_S)
        assert in_line(client, 3)
        other.quota(PAGE)
        first.free()
        assert {type(one.exception(WAIT_S)) for one in named} == {type(None), BufferExists}
        with pytest.raises(QuotaExceeded):
            large.result(WAIT_S)
        for one in named:
            if one.exception() is None:
                one.result().free()
    assert held(client) == 0


def test_nothing_leaks_in_a_crowd(client: EmbeddedClient) -> None:
    """Waiters that give up, are served and free, in threads and processes, against one another."""

    def crowd(said: Said) -> int:
        failures = 0
        with gcma_shm.connect(client.endpoint) as own:
            for n in range(150):
                try:
                    with (
                        own.alloc_contig((n % AREA_PAGES + 1) * PAGE, timeout=0.001 * (n % 7)) as buffer,
                        buffer.view as view,
                    ):
                        word = os.getpid().to_bytes(4, "little") + n.to_bytes(4, "little")
                        view[:] = word * (len(view) // 8)
                        assert bytes(view) == word * (len(view) // 8)
                except ArenaExhausted:
                    failures += 1
        return failures

    with contextlib.ExitStack() as children:
        running = [children.enter_context(forked(crowd)) for _ in range(4)]
        for child in running:
            child.receive()
    assert in_line(client, 0)
    assert held(client) == 0
    client.alloc_contig(SIZE).free()
