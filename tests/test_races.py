"""What threads, forks, signals and a stopped broker do to each other's buffers and claims at the worst of moments."""

from __future__ import annotations

import contextlib
import gc
import pickle
import random
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import pytest

import gcma_shm
from gcma_shm import ArenaExhausted, BrokerUnavailable, Buffer, Client, QuotaExceeded, Reservation, StaleHandle
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.handles import load_buffer
from gcma_shm.endpoint import arena_name
from tests.client import held, reserved
from tests.invariants import check_at_rest
from tests.patience import impatient
from tests.processes import WAIT_S, Said, eventually, forked, in_fork, stopped

PAGE = 4096
MIB = 1 << 20
SIZE = 8 * MIB
RACES = 100  # rounds of each kind
INTERRUPTS = 3000


def is_there(client: Client, offset: int, nbytes: int = SIZE) -> bool:
    """Whether that range is to be had."""
    try:
        client.alloc_contig(nbytes, offset=offset).free()
    except ArenaExhausted:
        return False
    return True


@pytest.fixture
def client() -> Iterator[EmbeddedClient]:
    """With one area of 32 MiB."""
    with gcma_shm.embedded("64M", areas={"a": "32M"}, timeout=20) as owner:
        yield owner


@pytest.fixture
def _switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


# --- one's own handles


def keeps_its_memory(client: Client, second: Buffer, place: int) -> None:
    """Nobody else gets the range of `second` until it is freed; it is the last to hold it."""
    with second.view as view:
        view[:4] = b"mine"
        assert not is_there(client, place)
        assert not is_there(client, 0, 32 * MIB)
        assert (bytes(view[:4]), held(client)) == (b"mine", SIZE)
    second.free()
    assert held(client) == 0
    assert is_there(client, place)


def test_own_handle_of_a_claim_outlives_the_release(client: EmbeddedClient) -> None:
    reservation = client.reserve(SIZE)
    first = reservation.claim()
    second: Buffer = pickle.loads(pickle.dumps(first))
    with second.view as view:
        view[:4] = b"mine"
        first.free()
        reservation.release()
        assert bytes(view[:4]) == b"mine"
    assert not second.freed
    keeps_its_memory(client, second, reservation.offset)


def test_own_handle_of_a_claim_outlives_the_collection(client: EmbeddedClient) -> None:
    reservation = client.reserve(SIZE)
    first = reservation.claim()
    second: Buffer = pickle.loads(pickle.dumps(first))
    place = reservation.offset
    del first, reservation
    gc.collect()
    keeps_its_memory(client, second, place)


def test_own_handle_of_a_claim_keeps_the_reservation_from_being_claimed(client: EmbeddedClient) -> None:
    with client.reserve(SIZE) as reservation:
        first = reservation.claim()
        second: Buffer = pickle.loads(pickle.dumps(first))
        first.free()
        with pytest.raises(ArenaExhausted):
            reservation.claim()
        second.free()
        reservation.claim(timeout=WAIT_S).free()
    assert (held(client), reserved(client)) == (0, 0)


# --- threads


@pytest.mark.usefixtures("_switching")
def test_release_against_claim(client: EmbeddedClient) -> None:
    mine, theirs = b"m" * SIZE, b"t" * SIZE
    outcomes = set()

    def claim(reservation: Reservation, go: threading.Barrier, done: threading.Event) -> str:
        go.wait(WAIT_S)
        try:
            buffer = reservation.claim()
            view = buffer.view  # a release frees what is claimed and not viewed
        except StaleHandle:
            return "stale"
        with view:
            view[:] = mine
            assert done.wait(WAIT_S)
            same = view == mine
        buffer.free()
        return "kept" if same else "changed"

    with ThreadPoolExecutor(1) as pool:
        for _ in range(RACES):
            reservation, go, done = client.reserve(SIZE), threading.Barrier(2), threading.Event()
            claiming = pool.submit(claim, reservation, go, done)
            try:
                go.wait(WAIT_S)
                try:
                    reservation.release()
                except BufferError:
                    assert not is_there(client, reservation.offset)
                    wanted = "kept"
                else:
                    with client.alloc_contig(SIZE, offset=reservation.offset) as other, other.view as view:
                        view[:] = theirs
                        done.set()
                        outcome = claiming.result(WAIT_S)
                        assert view == theirs
                    wanted = "stale"
            finally:
                done.set()
            outcome = claiming.result(WAIT_S)
            assert outcome == wanted
            outcomes.add(outcome)
            reservation.release()
    assert outcomes
    assert (held(client), reserved(client)) == (0, 0)
    check_at_rest(arena_name(client.endpoint))


@pytest.mark.usefixtures("_switching")
def test_release_against_free(client: EmbeddedClient) -> None:
    def free(buffer: Buffer, go: threading.Barrier) -> None:
        go.wait(WAIT_S)
        buffer.free()

    with ThreadPoolExecutor(1) as pool:
        for _ in range(RACES):
            reservation, go = client.reserve(32 * MIB), threading.Barrier(2)
            freeing = pool.submit(free, reservation.claim(), go)
            go.wait(WAIT_S)
            reservation.release()
            with client.alloc_contig(PAGE, offset=reservation.offset) as other, other.view as view:
                view[:] = b"t" * PAGE
                freeing.result(WAIT_S)
                assert view == b"t" * PAGE
                assert held(client) == PAGE
    assert (held(client), reserved(client)) == (0, 0)
    check_at_rest(arena_name(client.endpoint))


@pytest.mark.usefixtures("_switching")
def test_free_against_the_first_view() -> None:
    def look(buffer: Buffer, go: threading.Barrier) -> memoryview | None:
        go.wait(WAIT_S)
        try:
            return buffer.view
        except StaleHandle:
            return None

    with gcma_shm.embedded("96M", areas={"a": "64M"}, timeout=20) as owner, ThreadPoolExecutor(1) as pool:
        for _ in range(20):
            with gcma_shm.connect(owner.endpoint, timeout=20) as own:  # a mapping that nobody has touched yet
                buffer, go = own.alloc_contig(64 * MIB), threading.Barrier(2)
                looking = pool.submit(look, buffer, go)
                go.wait(WAIT_S)
                try:
                    buffer.free()
                except BufferError:
                    view = looking.result(WAIT_S)
                    assert view is not None, "neither"
                    assert not buffer.freed
                    assert held(owner) == 64 * MIB
                    view[-1:] = b"m"
                    view.release()
                    buffer.free()
                else:
                    assert looking.result(WAIT_S) is None, "both"
                assert held(owner) == 0


def test_sole_holders_claims_against_a_drain(client: EmbeddedClient) -> None:
    stop = threading.Event()

    def drain() -> int:
        rounds = 0
        with gcma_shm.connect(client.endpoint, timeout=20) as other:
            while not stop.is_set() or not rounds:
                other.drain_area("a")
                other.resume_area("a")
                rounds += 1
        return rounds

    with client.reserve(32 * MIB) as reservation, ThreadPoolExecutor(1) as pool:
        draining = pool.submit(drain)
        try:
            for _ in range(200):
                reservation.claim().free()  # ArenaExhausted here is the failure
        finally:
            stop.set()
        assert draining.result(WAIT_S)
        assert held(client) == 0


# --- signals


class Interrupted(BaseException):
    """What a signal handler raises."""


class Interrupts:
    """`after` some seconds the handler raises, and `come` is true. (It may raise where nothing can be raised: in a finalizer.)"""

    def __init__(self) -> None:
        self.come = False

    def after(self, seconds: float) -> None:
        self.come = False
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def handle(self, _number: int, _frame: FrameType | None) -> None:
        self.come = True
        raise Interrupted


@pytest.fixture
def interrupts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Interrupts]:
    found = Interrupts()
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    before = signal.signal(signal.SIGALRM, found.handle)
    try:
        yield found
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.timeout(600, method="thread")  # its signal is ours here
def test_claims_that_signals_interrupt(client: EmbeddedClient, interrupts: Interrupts) -> None:
    chance = random.Random(1)
    reservation = client.reserve(MIB)
    for _ in range(INTERRUPTS):
        buffer: Buffer | None = None
        with contextlib.suppress(Interrupted):
            interrupts.after(chance.uniform(2e-5, 2e-4))
            while not interrupts.come:
                buffer = reservation.claim()
                buffer.free()
        buffer = None
        with reservation.claim() as buffer:
            assert buffer.nbytes == MIB
    del buffer
    reservation.release()
    assert eventually(lambda: (held(client), reserved(client)) == (0, 0))
    check_at_rest(arena_name(client.endpoint))


@pytest.mark.timeout(600, method="thread")  # its signal is ours here
def test_allocations_that_signals_interrupt(client: EmbeddedClient, interrupts: Interrupts) -> None:
    chance = random.Random(2)
    with gcma_shm.connect(client.endpoint, timeout=20) as other:
        for _ in range(INTERRUPTS // 3):
            buffer: Buffer | None = None
            with contextlib.suppress(Interrupted):
                interrupts.after(chance.uniform(2e-5, 1e-3))
                while not interrupts.come:
                    buffer = other.alloc_contig(PAGE)
                    buffer.free()
            buffer = None
            assert other.areas()[0].size == 32 * MIB
        with other.alloc_contig(PAGE) as buffer:
            assert buffer.nbytes == PAGE
        assert eventually(lambda: held(other) == 0)
    assert eventually(lambda: held(client) == 0)
    assert is_there(client, 0, 32 * MIB)
    check_at_rest(arena_name(client.endpoint))


# --- forks


def test_a_child_from_before_the_claim_has_no_part_in_it(client: EmbeddedClient) -> None:
    def wait(said: Said) -> None:
        said.hear()

    with client.reserve(SIZE) as reservation, forked(wait) as before:
        buffer = reservation.claim()
        with forked(wait) as after:
            assert held(client) == SIZE
            buffer.free()
            with pytest.raises(ArenaExhausted):
                reservation.claim()
            after.kill()
        reservation.claim(timeout=WAIT_S).free()
        before.tell()
        assert before.wait() == 0
        reservation.claim(timeout=WAIT_S).free()
    assert eventually(lambda: (held(client), reserved(client)) == (0, 0))


def test_an_interrupt_before_a_fork_leaves_no_lock_held(
    client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[type[BaseException]] = []

    def interrupted() -> None:
        raise KeyboardInterrupt

    with client.reserve(SIZE) as reservation:
        with monkeypatch.context() as patched:
            patched.setattr(sys, "unraisablehook", lambda unraisable: raised.append(unraisable.exc_type))
            patched.setattr(client._claims, "share", interrupted)
            assert in_fork(lambda _: True)
        assert raised == [KeyboardInterrupt]
        claims = client._claims
        assert claims is not None
        assert not client._channel.lock.locked()
        assert not claims.lock.locked()
        reservation.claim().free()
        client.alloc_contig(PAGE).free()

        def use(_: Said) -> int:
            reservation.claim().free()
            with client.alloc_contig(PAGE) as buffer:
                return buffer.nbytes

        assert in_fork(use) == PAGE
        reservation.claim(timeout=WAIT_S).free()
    assert eventually(lambda: (held(client), reserved(client)) == (0, 0))


# --- a stopped broker


@pytest.mark.parametrize("goes_on", [True, False], ids=["that_goes_on", "that_says_no_more"])
def test_a_request_whose_ticket_never_arrived(client: EmbeddedClient, goes_on: bool) -> None:
    everything = client.alloc_contig(32 * MIB)
    with gcma_shm.connect(client.endpoint, timeout=WAIT_S) as other, ThreadPoolExecutor(1) as pool:
        with stopped(client.broker_pid), impatient(other), pytest.raises(BrokerUnavailable):
            other.alloc_contig(16 * MIB, timeout=None)
        if goes_on:
            other.areas()
        following = pool.submit(client.alloc_contig, 32 * MIB, timeout=WAIT_S)
        assert eventually(lambda: client.stats()["broker"]["in_line"] > 0)
        everything.free()
        with following.result(2 * WAIT_S) as buffer:
            assert buffer.nbytes == held(client) == 32 * MIB
        assert eventually(lambda: client.stats()["broker"]["in_line"] == 0)
        assert client.quota(client=other.number).held == 0
        assert held(client) == 0


def test_a_claim_attached_to_too_late_is_given_back(client: EmbeddedClient) -> None:
    with (
        client.reserve(MIB) as reservation,
        gcma_shm.connect(client.endpoint, timeout=WAIT_S) as other,
        reservation.claim() as buffer,
    ):
        arguments = buffer.__reduce__()[1]
        assert isinstance(arguments, tuple)
        (reference,) = arguments
        with stopped(client.broker_pid), impatient(other), pytest.raises(BrokerUnavailable):
            load_buffer(reference, other)
        for _ in range(2):  # the first takes the reply, the second gives back what it says
            other.areas()
        assert client.quota(client=other.number).held == 0
        buffer.free()
        reservation.claim(timeout=WAIT_S).free()
    assert (held(client), reserved(client)) == (0, 0)


# --- quotas


@pytest.mark.parametrize("size", [MIB, PAGE])
def test_handing_over_does_not_bypass_the_quota(client: EmbeddedClient, size: int) -> None:
    with gcma_shm.connect(client.endpoint, timeout=20) as other:
        other.quota(2 * size)
        handles = []
        for _ in range(2):
            with other.alloc_contig(size) as buffer:
                handles.append(buffer.hand_over(600))
        assert other.quota().held == 2 * size
        for _ in range(3):
            with pytest.raises(QuotaExceeded):
                other.alloc_contig(size)
        assert held(client) == 2 * size
        client.attach(handles.pop()).free()
        with other.alloc_contig(size):
            assert other.quota().held == 2 * size
        client.attach(handles.pop()).free()
        assert other.quota().held == 0
    assert eventually(lambda: held(client) == 0)
