"""A broker that is killed and started again on the same arena: what goes on meanwhile, and what the next one finds."""

from __future__ import annotations

import contextlib
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import gcma_shm
from gcma_shm import layout
from gcma_shm.endpoint import arena_name, default_spill_dir
from gcma_shm.errors import ArenaExhausted, BrokerUnavailable, QuotaExceeded
from tests.client import filled_with
from tests.invariants import check_at_rest
from tests.patience import impatient
from tests.processes import WAIT_S, Said, broker, eventually, forked
from tests.takeover import AREAS, MIB, PAGE, held_by_area, killed_and_restarted

SHORT_S = 2.0  # longer than it takes, mostly, to start the next broker


# --- what goes on without a broker


def test_mapped_clients_go_on_without_a_broker_and_with_the_next(endpoint: str) -> None:
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint, timeout=WAIT_S) as client:
        through, behind = client.swap(0, 3000), client.swap(1, 3000, "behind")
        for n in range(1500):
            through.store(n, filled_with(n))
            behind.store(n, filled_with(10_000 + n))
        first.stop(signal.SIGKILL)
        for n in range(1000, 3000):  # far more than the nursery has pages
            through.store(n, filled_with(n))
            behind.store(n, filled_with(10_000 + n))
        through.invalidate_page(7)
        behind.sync()
        with impatient(client), pytest.raises(BrokerUnavailable):
            client.areas()
        with broker(endpoint, *AREAS):
            for n in range(3000):
                assert through.load(n) == (filled_with(n) if n != 7 else None)
                assert behind.load(n) == filled_with(10_000 + n)
            assert (through.type, through.slots) == (0, 3000)
            through.store(7, filled_with(7))
            assert len(client.swap(0, 3000)) == 3000, "declared as it was"
            assert client.stats()["arena"]["epoch"] == 2
            through.invalidate_area()
            assert client.swap(0, 100).load(7) is None
            check_at_rest(arena_name(endpoint), default_spill_dir(endpoint))


@pytest.mark.parametrize("policy", layout.POLICIES)
def test_what_the_cache_held_is_still_in_memory(policy: str, endpoint: str) -> None:
    """And the policy goes on: it is the arena's."""
    with broker(endpoint, *AREAS, "--policy", policy) as first, gcma_shm.connect(endpoint) as client:
        swap = client.swap(0, 1000, "behind")

        def fill() -> bool:
            for n in range(1000):
                swap.store(n, filled_with(n))
                swap.load(n)
            return sum(area.lent for area in client.areas()) > 200 * PAGE

        assert eventually(fill)
        swap.sync()
        lent = {area.name: area.lent for area in client.areas()}
        hits = client.stats()["counters"]
        with killed_and_restarted(first):
            found = {area.name: area.lent for area in client.areas()}
            for name, count in lent.items():
                assert found[name] >= count * 9 // 10, "the cache stays, but for what was swept meanwhile"
            for n in range(1000):
                assert swap.load(n) == filled_with(n)
            after = client.stats()["counters"]
            assert after["hits_area"] > hits["hits_area"]
            assert client.stats()["arena"]["policy"] == policy

            def goes_on() -> bool:
                fill()
                swap.load_many(range(1000), bytearray(1000 * PAGE))
                return bool(client.stats()["counters"]["promotions"] > after["promotions"] + 100)

            assert eventually(goes_on)


# --- what the next one finds


def test_buffers_reservations_names_and_quotas(endpoint: str) -> None:
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client:
        buffer = client.alloc_contig(MIB, area="a", name="frame")
        dropped = client.alloc_contig(MIB, area="a")
        lent, claimed = client.reserve(MIB, area="b", name="promised"), client.reserve(MIB // 2, area="b")
        mine = claimed.claim()
        client.quota(4 * MIB)
        buffer.view[:] = b"f" * MIB
        mine.view[:] = b"c" * mine.nbytes
        numbers = pickle.dumps(buffer)
        with killed_and_restarted(first):
            assert held_by_area(client) == {"a": 2 * MIB, "b": MIB // 2}
            assert buffer.view == b"f" * MIB
            assert mine.view == b"c" * mine.nbytes
            assert [(info.name, info.area, info.reservation) for info in client.names()] == [
                ("frame", "a", False),
                ("promised", "b", True),
            ]
            assert client.quota() == gcma_shm.QuotaInfo(3 * MIB + MIB // 2, 4 * MIB)
            with pytest.raises(QuotaExceeded):
                client.alloc_contig(MIB)
            client.quota(0)
            with pytest.raises(ArenaExhausted):
                client.alloc_contig(2 * MIB, area="a", offset=buffer.offset)
            dropped.free()
            with gcma_shm.connect(endpoint) as other:
                with other.attach("frame") as seen:
                    assert seen.view == b"f" * MIB
                assert pickle.loads(numbers).view == b"f" * MIB
            mine.free()
            with lent.claim() as again:
                again.view[:] = b"x" * MIB
            buffer.free()
            for reservation in (lent, claimed):
                reservation.release()
            assert held_by_area(client) == {"a": 0, "b": 0}
            check_at_rest(arena_name(endpoint))


def test_areas_as_they_were_drained_grown_and_shrunk(endpoint: str) -> None:
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client:
        client.resize_area("a", 3 * MIB)
        client.resize_area("b", 3 * MIB)  # in two parts
        client.drain_area("a")
        buffers = [client.alloc_contig(MIB // 2, area="b") for _ in range(6)]
        places = [(buffer.offset, buffer.area) for buffer in buffers]
        before = [(area.name, area.size, area.held, area.drained) for area in client.areas()]
        with killed_and_restarted(first):
            assert [(area.name, area.size, area.held, area.drained) for area in client.areas()] == before
            with pytest.raises(ArenaExhausted, match="drained"):
                client.alloc_contig(PAGE, area="a")
            client.resume_area("a")
            for buffer in buffers:
                buffer.free()
            again = [client.alloc_contig(MIB // 2, area=area, offset=offset) for offset, area in places]
            for buffer in again:
                buffer.free()
            check_at_rest(arena_name(endpoint))


def test_clients_that_died_meanwhile(endpoint: str) -> None:
    """What they held comes back, also a claim; and what they were granted."""

    def hold(said: Said) -> None:
        client = gcma_shm.connect(endpoint)
        buffer, reservation = client.alloc_contig(MIB, area="a"), client.reserve(MIB, area="b")
        claimed = reservation.claim()
        said.say((buffer.offset, claimed.offset))
        said.hear()

    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client, forked(hold) as child:
        child.receive()
        first.stop(signal.SIGKILL)
        child.kill()
        with broker(endpoint, *AREAS):
            assert eventually(lambda: client.stats()["broker"]["clients"] == 1)
            assert eventually(lambda: held_by_area(client) == {"a": 0, "b": 0})
            check_at_rest(arena_name(endpoint))


def test_a_child_forked_without_a_broker_holds_what_its_parent_held(endpoint: str) -> None:
    with broker(endpoint, *AREAS) as first:
        client = gcma_shm.connect(endpoint)
        buffer, reservation = client.alloc_contig(MIB, area="a"), client.reserve(MIB, area="b")
        claimed = reservation.claim()
        claimed.view[:4] = b"mine"
        first.stop(signal.SIGKILL)

        def child(said: Said) -> None:
            said.hear()
            assert bytes(buffer.view[:4]) == b"abcd"
            buffer.free()
            claimed.free()
            said.say()
            said.hear()

        with forked(child) as born:
            buffer.view[:4] = b"abcd"
            with broker(endpoint, *AREAS), gcma_shm.connect(endpoint) as looking:
                buffer.free()
                claimed.free()
                assert held_by_area(looking) == {"a": MIB, "b": MIB}, "the child's"
                born.tell()
                born.receive()
                assert eventually(lambda: held_by_area(looking) == {"a": 0, "b": 0})
                reservation.release()
                client.close()
                born.kill()
                assert eventually(lambda: looking.stats()["broker"]["clients"] == 1)
                check_at_rest(arena_name(endpoint))


def test_a_handle_under_way_holds_until_its_time(endpoint: str) -> None:
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client:
        buffer = client.alloc_contig(MIB, area="a")
        buffer.view[:4] = b"sent"
        long, short = pickle.dumps(buffer.hand_over(timeout=WAIT_S)), client.alloc_contig(PAGE, area="b")
        begun = time.monotonic()
        short.hand_over(timeout=SHORT_S)
        buffer.free()
        short.free()
        with killed_and_restarted(first):
            assert eventually(lambda: held_by_area(client)["b"] == 0)
            assert time.monotonic() - begun >= SHORT_S, "given up before its time"
            assert held_by_area(client)["a"] == MIB
            with pickle.loads(long) as came:
                assert bytes(came.view[:4]) == b"sent"


def test_a_claim_that_processes_share_goes_on_with_both(endpoint: str) -> None:
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client:
        reservation = client.reserve(MIB, area="b")
        claimed = reservation.claim()

        def child(said: Said) -> None:
            said.say(client.stats()["broker"]["clients"])
            said.hear()
            claimed.free()
            said.say()
            said.hear()

        with forked(child) as born:
            born.receive()
            with killed_and_restarted(first):
                claimed.free()
                with pytest.raises(ArenaExhausted):
                    reservation.claim()
                born.tell()
                born.receive()
                reservation.claim(timeout=WAIT_S).free()
                born.kill()
                assert eventually(lambda: client.stats()["broker"]["clients"] == 1)
                check_at_rest(arena_name(endpoint))


def test_a_claim_that_a_dead_broker_had_is_taken_from_it(endpoint: str) -> None:
    """It died while it lent the range after a claimer's death: whoever claims next has it at once, and lends it again."""
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client:
        reservation = client.reserve(MIB, area="b")
        plane = client._plane
        assert plane is not None
        claim_at = plane.geometry.allocation_at(reservation.index) + layout.ALLOCATION_CLAIM_AT
        bits_at = plane.geometry.claimers_at + reservation.index * plane.geometry.holder_bytes
        first.stop(signal.SIGKILL)
        generation = plane.read(claim_at) >> layout.CLAIM_GENERATION_SHIFT
        plane.write(claim_at, generation + 1 << layout.CLAIM_GENERATION_SHIFT | layout.BROKER)
        plane.write(bits_at, 0b111100)
        with reservation.claim() as buffer:
            buffer.view[:] = b"m" * MIB
            assert plane.read(claim_at) == generation + 2 << layout.CLAIM_GENERATION_SHIFT | client.number
            assert plane.read(bits_at) == 0, "who shared the claim before is none of ours"
            with broker(endpoint, *AREAS):
                assert held_by_area(client) == {"a": 0, "b": MIB}
                assert buffer.view == b"m" * MIB
                buffer.free()
                assert held_by_area(client) == {"a": 0, "b": 0}
                reservation.claim().free()
                reservation.release()
                check_at_rest(arena_name(endpoint))


def test_what_a_claimed_reservation_held_is_counted(endpoint: str) -> None:
    """Its claimer may give up and leave it in place."""
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client:
        whole = client.alloc_contig(4 * MIB, area="a")
        reservation = client.reserve(2 * MIB, area="b")
        swap = client.swap(0, 1000)
        for n in range(1000):
            swap.store(n, filled_with(n))
            swap.load(n)
        assert eventually(lambda: sum(area.lent for area in client.areas()) > 10 * PAGE)
        claimed = reservation.claim()
        with killed_and_restarted(first):
            check_at_rest(arena_name(endpoint))
            claimed.free()
            reservation.release()
            whole.free()


def test_restarted_again_and_again_under_load(endpoint: str) -> None:
    stop = threading.Event()
    failed: list[str] = []

    def churn(client: gcma_shm.Client) -> int:
        swap, n = client.swap(0, 2000, "behind"), 0
        while not stop.is_set():
            n += 1
            offset = n * 7919 % 2000
            swap.store(offset, filled_with(offset))
            page = swap.load(n * 104729 % 2000)
            if page not in (None, filled_with(n * 104729 % 2000)):
                failed.append(f"slot {n * 104729 % 2000}")
        return n

    with gcma_shm_broker(endpoint) as run, ThreadPoolExecutor(1) as pool:
        client = gcma_shm.connect(endpoint, wait_for_broker=WAIT_S)
        churning = pool.submit(churn, client)
        try:
            kept: list[gcma_shm.Buffer] = []
            for round_ in range(12):
                kept.append(client.alloc_contig(MIB // 4, area="a"))
                kept[-1].view[:] = bytes([round_]) * (MIB // 4)
                run.restart()
                for index, buffer in enumerate(kept):
                    assert buffer.view == bytes([index]) * (MIB // 4)
            assert held_by_area(client)["a"] == 12 * MIB // 4
        finally:
            stop.set()
        assert churning.result(WAIT_S) > 100
        assert not failed
        for buffer in kept:
            buffer.free()
        assert client.stats()["arena"]["epoch"] == 13
        check_at_rest(arena_name(endpoint), default_spill_dir(endpoint))
        client.close()


class Run:
    """One broker after the other."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._stack = contextlib.ExitStack()
        self._current = self._stack.enter_context(broker(endpoint, *AREAS))

    def restart(self) -> None:
        self._current.stop(signal.SIGKILL)
        self._current = self._stack.enter_context(broker(self._endpoint, *AREAS))

    def close(self) -> None:
        self._stack.close()


@contextlib.contextmanager
def gcma_shm_broker(endpoint: str) -> Iterator[Run]:
    run = Run(endpoint)
    try:
        yield run
    finally:
        run.close()
