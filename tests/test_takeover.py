"""A broker that is killed and started again on the same arena: what goes on meanwhile, what the next one finds, what it refuses."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import gcma_shm
from gcma_shm import layout
from gcma_shm.arena import SHM_DIR, remove_dead
from gcma_shm.endpoint import arena_name, default_spill_dir
from gcma_shm.errors import ArenaError, ArenaExhausted, BrokerUnavailable, Closed, NoSuchBuffer, QuotaExceeded
from gcma_shm.messages import Request
from gcma_shm.records import Records
from tests.invariants import check_at_rest
from tests.patience import has_unread, impatient
from tests.processes import WAIT_S, Broker, Said, broker, eventually, forked, stands_still

PAGE = 4096
MIB = 1 << 20
SHORT_S = 2.0  # longer than it takes, mostly, to start the next broker
AREAS = ("--area", "a=4M", "--area", "b=2M")


def page_of(n: int) -> bytes:
    return struct.pack("<Q", n) * (PAGE // 8)


@pytest.fixture
def endpoint() -> Iterator[str]:
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    yield endpoint
    Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)
    with contextlib.suppress(ArenaError):
        remove_dead(arena_name(endpoint))
    for path in sorted(default_spill_dir(endpoint).parent.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@contextlib.contextmanager
def killed_and_restarted(first: Broker, *options: str) -> Iterator[Broker]:
    first.stop(signal.SIGKILL)
    with broker(first.endpoint, *(options or AREAS)) as second:
        yield second


def stop_for_good(first: Broker) -> None:
    """It reads nothing any more; to be killed."""
    os.kill(first.pid, signal.SIGSTOP)
    assert eventually(lambda: stands_still(first.pid))


class Late:
    """The clock, which may be put forward."""

    late_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.late_s


def held(client: gcma_shm.Client) -> dict[str, int]:
    return {area.name: area.held for area in client.areas()}


# --- what goes on without a broker


def test_mapped_clients_go_on_without_a_broker_and_with_the_next(endpoint: str) -> None:
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint, timeout=WAIT_S) as client:
        through, behind = client.swap(0, 3000), client.swap(1, 3000, "behind")
        for n in range(1500):
            through.store(n, page_of(n))
            behind.store(n, page_of(10_000 + n))
        first.stop(signal.SIGKILL)
        for n in range(1000, 3000):  # far more than the nursery has pages
            through.store(n, page_of(n))
            behind.store(n, page_of(10_000 + n))
        through.invalidate_page(7)
        behind.sync()
        with impatient(client), pytest.raises(BrokerUnavailable):
            client.areas()
        with broker(endpoint, *AREAS):
            for n in range(3000):
                assert through.load(n) == (page_of(n) if n != 7 else None)
                assert behind.load(n) == page_of(10_000 + n)
            assert (through.type, through.slots) == (0, 3000)
            through.store(7, page_of(7))
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
                swap.store(n, page_of(n))
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
                assert swap.load(n) == page_of(n)
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
            assert held(client) == {"a": 2 * MIB, "b": MIB // 2}
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
            assert held(client) == {"a": 0, "b": 0}
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
            assert eventually(lambda: held(client) == {"a": 0, "b": 0})
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
                assert held(looking) == {"a": MIB, "b": MIB}, "the child's"
                born.tell()
                born.receive()
                assert eventually(lambda: held(looking) == {"a": 0, "b": 0})
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
            assert eventually(lambda: held(client)["b"] == 0)
            assert time.monotonic() - begun >= SHORT_S, "given up before its time"
            assert held(client)["a"] == MIB
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
                assert held(client) == {"a": 0, "b": MIB}
                assert buffer.view == b"m" * MIB
                buffer.free()
                assert held(client) == {"a": 0, "b": 0}
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
            swap.store(n, page_of(n))
            swap.load(n)
        assert eventually(lambda: sum(area.lent for area in client.areas()) > 10 * PAGE)
        claimed = reservation.claim()
        with killed_and_restarted(first):
            check_at_rest(arena_name(endpoint))
            claimed.free()
            reservation.release()
            whole.free()


# --- requests


def test_a_request_waits_through_a_restart_if_asked_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than its timeout."""
    clock = Late()
    monkeypatch.setattr("gcma_shm.clients.channel.time", clock)
    with broker(endpoint, *AREAS) as first:
        patient = gcma_shm.connect(endpoint, timeout=WAIT_S, wait_for_broker=4 * WAIT_S)
        quick = gcma_shm.connect(endpoint, timeout=WAIT_S)
        by_messages = gcma_shm.connect(endpoint, mapped=False, timeout=WAIT_S, wait_for_broker=4 * WAIT_S)
        swap = by_messages.swap(0, 10)
        swap.store(1, page_of(1))
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
                assert loading.result(WAIT_S) == page_of(1)
                quick.alloc_contig(PAGE).free()
                for client in (patient, quick, by_messages):
                    client.close()


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "messages"])
def test_a_request_that_the_broker_took_with_it(endpoint: str, mapped: bool) -> None:
    """Sent to a stopped broker, which is killed then: the next one answers it, without waiting for its bound."""
    with broker(endpoint, *AREAS) as first:
        client = gcma_shm.connect(endpoint, mapped=mapped, timeout=WAIT_S)
        stop_for_good(first)
        with ThreadPoolExecutor(1) as pool:
            begun = time.monotonic()
            asked = pool.submit(client.alloc_contig, MIB, area="a") if mapped else pool.submit(client.swap, 0, 10)
            assert eventually(lambda: has_unread(endpoint))
            with killed_and_restarted(first):
                got = asked.result(WAIT_S)
                assert time.monotonic() - begun < WAIT_S / 2, "it did not wait until its time was over"
                if isinstance(got, gcma_shm.Buffer):
                    assert held(client) == {"a": MIB, "b": 0}
                    got.free()
                client.close()


def test_a_page_that_the_broker_took_with_it_is_not_stored_twice(endpoint: str) -> None:
    with broker(endpoint, *AREAS) as first:
        client = gcma_shm.connect(endpoint, mapped=False, timeout=WAIT_S)
        swap = client.swap(0, 10)
        stop_for_good(first)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(swap.store, 1, page_of(1))
            assert eventually(lambda: has_unread(endpoint))
            with killed_and_restarted(first):
                with pytest.raises(BrokerUnavailable, match="may have been done"):
                    asked.result(WAIT_S)
                swap.store(1, page_of(2))
                assert swap.load(1) == page_of(2)
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
            asked = pool.submit(swap.store_many, range(slots), b"".join(map(page_of, range(slots))))
            assert eventually(lambda: 100 in seen)
            stop_for_good(first)
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
                    assert not hit or out[n * PAGE : (n + 1) * PAGE] == page_of(n)
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
                assert held(client) == {"a": 0, "b": 0}


def test_restarted_again_and_again_under_load(endpoint: str) -> None:
    stop = threading.Event()
    failed: list[str] = []

    def churn(client: gcma_shm.Client) -> int:
        swap, n = client.swap(0, 2000, "behind"), 0
        while not stop.is_set():
            n += 1
            offset = n * 7919 % 2000
            swap.store(offset, page_of(offset))
            page = swap.load(n * 104729 % 2000)
            if page not in (None, page_of(n * 104729 % 2000)):
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
            assert held(client)["a"] == 12 * MIB // 4
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


# --- what it refuses


def damage_version(data: bytearray, _: layout.Geometry) -> None:
    data[8:12] = struct.pack("<I", 99)


def damage_header(data: bytearray, _: layout.Geometry) -> None:
    data[0x40] ^= 1


def damage_magic(data: bytearray, _: layout.Geometry) -> None:
    data[0:4] = b"HUGO"


def damage_magic_away(data: bytearray, _: layout.Geometry) -> None:
    data[0:8] = bytes(8)


def empty(data: bytearray, _: layout.Geometry) -> None:
    data.clear()


def damage_areas(data: bytearray, g: layout.Geometry) -> None:
    struct.pack_into("<Q", data, g.area_at(1) + 0x30, 1)


def damage_types(data: bytearray, g: layout.Geometry) -> None:
    struct.pack_into("<Q", data, g.type_at(0) + layout.TYPE_BASE_AT, g.slots)


def damage_allocations(data: bytearray, g: layout.Geometry) -> None:
    struct.pack_into("<Q", data, g.allocation_at(0) + layout.ALLOCATION_PAGES_AT, g.pages)


def damage_spill_dir(data: bytearray, _: layout.Geometry) -> None:
    data[layout.SPILL_DIR_AT] = 0


def truncate(data: bytearray, _: layout.Geometry) -> None:
    del data[len(data) // 2 :]


def truncate_within_header(data: bytearray, _: layout.Geometry) -> None:
    del data[100:]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_version, "layout version 99"),
        (damage_header, "header is damaged"),
        (damage_magic, "not an arena"),
        (damage_magic_away, "not an arena"),
        (empty, "its header is empty, and there are spill files"),
        (damage_areas, "table of areas is damaged"),
        (damage_types, "table of types is damaged"),
        (damage_allocations, "table of buffers is damaged"),
        (damage_spill_dir, "where the spill files are"),
        (truncate, "truncated"),
        (truncate_within_header, "it has 100 bytes"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_arena_is_refused_by_name_and_left(
    endpoint: str, damage: Callable[[bytearray, layout.Geometry], None], words: str
) -> None:
    path = SHM_DIR / arena_name(endpoint).removeprefix("/")
    with broker(endpoint, *AREAS) as first:
        client = gcma_shm.connect(endpoint)
        swap = client.swap(0, 10)
        swap.store(1, page_of(1))
        buffer = client.alloc_contig(PAGE)
        assert client._plane is not None
        first.stop(signal.SIGKILL)
        data = bytearray(path.read_bytes())
        damage(data, client._plane.geometry)
        was_mapped = path.with_name(f"{path.name}.was")
        path.rename(was_mapped)  # or the client would be hit
        path.write_bytes(data)
        path.chmod(0o600)
        try:
            with pytest.raises(AssertionError, match=words), broker(endpoint, *AREAS):
                pass
            assert path.read_bytes()[layout.EPOCH_AT + 8 :] == data[layout.EPOCH_AT + 8 :] or damage is not truncate
            assert (default_spill_dir(endpoint) / "000.1").exists(), "nothing of it is removed"
            assert swap.load(1) == page_of(1)
            assert not buffer.freed
        finally:
            was_mapped.unlink()
            path.unlink()
            client._channel.drop()


def test_an_arena_that_nobody_had_served_is_made_anew(endpoint: str) -> None:
    """Its broker was killed before it had come so far: no client can have seen it."""
    path = SHM_DIR / arena_name(endpoint).removeprefix("/")
    for content in (b"", bytes(8192)):
        path.write_bytes(content)
        path.chmod(0o600)
        with broker(endpoint, *AREAS), gcma_shm.connect(endpoint) as client:
            assert client.stats()["arena"]["epoch"] == 1


def test_an_arena_that_says_it_was_never_served_is_taken_over(endpoint: str) -> None:
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client:
        swap = client.swap(0, 10)
        swap.store(1, page_of(1))
        first.stop(signal.SIGKILL)
        assert client._plane is not None
        client._plane.write(layout.EPOCH_AT, 0)
        with broker(endpoint, *AREAS):
            assert swap.load(1) == page_of(1)
            assert client.areas()


def test_a_broker_killed_while_it_removed_its_arena(endpoint: str) -> None:
    with broker(endpoint, *AREAS) as first:
        client = gcma_shm.connect(endpoint, timeout=WAIT_S)
        swap = client.swap(0, 10)
        assert client._plane is not None
        client._plane.write(layout.STOPPED_AT, 1)
        with killed_and_restarted(first), gcma_shm.connect(endpoint) as other:
            assert other.stats()["arena"]["epoch"] == 1
            with pytest.raises(Closed):
                swap.load(1)
            with pytest.raises((Closed, BrokerUnavailable)):
                client.alloc_contig(PAGE)
            client.close()


def test_a_type_whose_file_has_gone_ends(endpoint: str) -> None:
    """What of it is in memory would be all that is left: never half of a type. Others go on."""
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client:
        lost, kept = client.swap(0, 10), client.swap(1, 10)
        lost.store(1, page_of(1))
        kept.store(1, page_of(2))
        first.stop(signal.SIGKILL)
        stray = default_spill_dir(endpoint) / "007.3"
        stray.write_bytes(b"left by a type that has ended")
        (default_spill_dir(endpoint) / "000.1").unlink()
        with broker(endpoint, *AREAS):
            assert not stray.exists()
            with pytest.raises(Closed):
                lost.load(1)
            assert kept.load(1) == page_of(2)
            assert client.swap(0, 10).load(1) is None


def test_other_options_change_nothing_of_what_is_taken_over(endpoint: str, tmp_path: Path) -> None:
    with broker(endpoint, *AREAS) as first, gcma_shm.connect(endpoint) as client:
        swap = client.swap(0, 10)
        swap.store(1, page_of(1))
        options = ("--area", "other=1M", "--spill-dir", str(tmp_path / "elsewhere"), "--page-size", "8K")
        with killed_and_restarted(first, *options) as second:
            assert [area.name for area in client.areas()] == ["a", "b"]
            assert swap.load(1) == page_of(1)
            assert "epoch 2" in second.description
            assert not (tmp_path / "elsewhere").exists()
            with pytest.raises(NoSuchBuffer):
                client.attach("nothing")


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
        stop_for_good(first)
        with ThreadPoolExecutor(1) as thread:
            asking = thread.submit(client.alloc_contig, PAGE)
            assert eventually(lambda: has_unread(endpoint))
            first.stop(signal.SIGKILL)
            assert eventually(lambda: channel._away)
            clock.late_s = WAIT_S + 1
            with broker(endpoint):
                asking.result(WAIT_S).free()
                assert held(client)["default"] == 0
                client.close()


def test_what_no_broker_comes_for_has_an_end(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Late()
    monkeypatch.setattr("gcma_shm.clients.channel.time", clock)
    with broker(endpoint) as first:
        client = gcma_shm.connect(endpoint, timeout=WAIT_S, wait_for_broker=WAIT_S)
        channel = client._channel
        stop_for_good(first)
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
