"""Guests and a cache at full speed in one arena: no byte of a buffer ever changes, and no load ever returns a guest's byte.

The long way round, of 100,000 allocations, is part of `make storms`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
from collections.abc import Iterator

import pytest

import gcma_shm
from gcma_shm import Buffer, Client, Reservation
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.endpoint import arena_name
from tests.invariants import check_at_rest
from tests.processes import WAIT_S, Said, eventually, forked
from tests.register import make_page, read_page, value_id

PAGE = 4096
SLOTS = 6000  # more than the arena has pages
WORKERS = 2
GUESTS = 3
ALLOCATIONS = int(os.environ.get("GCMA_GUEST_ALLOCATIONS", "10000"))  # of all guests together
SEED = int(os.environ.get("GCMA_GUEST_SEED", "1"))
# At most two ranges a guest: whatever the others hold, one of the gaps between them has room for another range of this size.
PAGES_MAX = 250
REPORT = 100  # allocations between two words of a guest
FAILED = (1 << 64) - 1

pytestmark = pytest.mark.timeout(120 + ALLOCATIONS // 20)


def work(said: Said, endpoint: str, worker: int, counts: mmap.mmap) -> None:
    """Stores and loads at full speed, for ever; each page says whose it is. One batch in ten."""
    rng = random.Random(f"{SEED} worker {worker}")
    with gcma_shm.connect(endpoint, timeout=60) as client, memoryview(counts).cast("Q") as rounds:
        swap = client.swap(0, SLOTS, "behind")
        said.say()
        sequence = 0
        try:
            while True:
                slot = rng.randrange(SLOTS)
                sequence += 1
                page = make_page(slot, value_id(worker + 1, sequence), PAGE)
                if sequence % 10:
                    swap.store(slot, page)
                else:
                    swap.store_many([slot], page)
                for other in [rng.randrange(SLOTS) for _ in range(4)]:
                    found = swap.load(other)
                    if found is not None:
                        read_page(other, found)
                if sequence % 10 == 0:
                    some = rng.sample(range(SLOTS), 4)
                    out = bytearray(4 * PAGE)
                    for n, hit in enumerate(swap.load_many(some, out)):
                        if hit:
                            read_page(some[n], bytes(out[n * PAGE : (n + 1) * PAGE]))
                rounds[worker] = sequence
        except BaseException:
            rounds[worker] = FAILED
            raise


class Guest:
    """Buffers and claims of random sizes, each full of a pattern that is no page, and looked at again and again."""

    def __init__(self, client: Client, number: int) -> None:
        self._client = client
        self._number = number
        self._rng = random.Random(f"{SEED} guest {number}")
        self._count = 0

    def run(self, said: Said, allocations: int) -> int:
        """Returns how many buffers it had; as many claims come on top."""
        done = 0
        while done < allocations:
            with self._client.reserve(self._nbytes()) as reservation:
                for _ in range(min(REPORT, allocations - done)):
                    self._one(reservation)
                    done += 1
            said.say(done)
        return done

    def _nbytes(self) -> int:
        return PAGE * (self._rng.randint(1, 12) if self._rng.random() < 0.9 else self._rng.randint(1, PAGES_MAX))

    def _one(self, reservation: Reservation) -> None:
        with self._client.alloc_contig(self._nbytes()) as buffer:
            first = self._write(buffer)
            with reservation.claim() as claimed:
                second = self._write(claimed)
                self._look(buffer, first)
                self._look(claimed, second)
            self._look(buffer, first)

    def _write(self, buffer: Buffer) -> bytes:
        self._count += 1
        word = b"gu" + self._number.to_bytes(2, "little") + self._count.to_bytes(4, "little")
        pattern = word * (buffer.nbytes // len(word))
        with buffer.view as view:
            view[:] = pattern
        self._look(buffer, pattern)
        return pattern

    @staticmethod
    def _look(buffer: Buffer, pattern: bytes) -> None:
        with buffer.view as view:
            assert bytes(view) == pattern, f"bytes of {buffer!r} have changed"


@pytest.fixture
def client() -> Iterator[EmbeddedClient]:
    """About 3,600 pages in one area."""
    with gcma_shm.embedded("16M", timeout=60) as owner:
        yield owner


def test_guests_and_a_cache_at_full_speed(client: EmbeddedClient) -> None:
    assert client.areas()[0].size // PAGE >= (4 * GUESTS - 1) * PAGES_MAX, "no room for what the guests may ask for"
    swap = client.swap(0, SLOTS, "behind")
    for slot in range(SLOTS):
        swap.store(slot, make_page(slot, value_id(100, slot), PAGE))
    assert eventually(lambda: client.areas()[0].lent > 0)

    counts = mmap.mmap(-1, PAGE)
    each = -(-ALLOCATIONS // GUESTS)

    def guest(said: Said, number: int) -> int:
        said.hear()
        with gcma_shm.connect(client.endpoint, timeout=60) as own:
            return Guest(own, number).run(said, each)

    with contextlib.ExitStack() as children, memoryview(counts).cast("Q") as rounds:
        workers = [
            children.enter_context(forked(lambda said, n=n: work(said, client.endpoint, n, counts)))  # type: ignore[misc]
            for n in range(WORKERS)
        ]
        for worker in workers:
            worker.receive()
        guests = [children.enter_context(forked(lambda said, n=n: guest(said, n))) for n in range(GUESTS)]  # type: ignore[misc]
        for one in guests:
            one.tell()
        done = dict.fromkeys(range(GUESTS), 0)
        before = rounds.tolist()[:WORKERS]
        while min(done.values()) < each:
            for n, one in enumerate(guests):
                if done[n] < each:
                    done[n] = one.receive()
                    assert FAILED not in rounds.tolist(), [worker.receive() for worker in workers if worker.talk.poll()]
        assert [one.receive() for one in guests] == [each] * GUESTS, "what they return in the end"
        assert sum(done.values()) >= ALLOCATIONS
        after = rounds.tolist()[:WORKERS]
        assert all(b < a < FAILED for b, a in zip(before, after, strict=True)), "the workers have worked meanwhile"
        for worker in workers:
            assert not worker.talk.poll(), worker.receive()
    counts.close()

    assert eventually(lambda: client.stats()["broker"]["clients"] == 1)
    (area,) = client.areas()
    assert (area.held, area.reserved, area.largest_free) == (0, 0, area.size)
    assert area.lent + area.free == area.size
    assert "ArenaExhausted" not in client.stats()["broker"]["refusals"]
    for slot in range(SLOTS):
        found = swap.load(slot)
        assert found is not None
        read_page(slot, found)
    swap.sync(WAIT_S)
    check_at_rest(arena_name(client.endpoint))
