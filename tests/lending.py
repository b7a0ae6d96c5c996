"""Reservations that are lent to a cache in full use, and brokers that are stopped in the middle of it: for tests."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
from collections.abc import Iterator

import gcma_shm
from gcma_shm import Client, layout
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.swap import Swap
from tests.client import page_of
from tests.processes import Said, eventually, forked, stop
from tests.using_areas import SLOTS

PAGE = 4096
STOPS_MAX = 5000  # attempts to stop a broker in the middle of a copy
LOOKS_MAX = 2000  # whether it is in one, before each of them


def figure(client: Client, name: str) -> int:
    return sum(getattr(area, name) for area in client.areas())


def whole(client: Client) -> int:
    return client.areas()[0].largest_free


def use_fully(client: Client) -> Swap:
    """Stores into every slot, and loads some: the cache wants all of the area that it can have."""
    swap = client.swap(0, SLOTS, "behind")
    for n in range(SLOTS):
        swap.store(n, page_of(n))
        swap.load(max(n - 5, 0))
    return swap


def use_until_lent(client: Client) -> Swap:
    def is_lent() -> bool:
        use_fully(client)
        return figure(client, "lent") > 0

    assert eventually(is_lent)
    return client.swap(0, SLOTS, "behind")


def filling(client: Client) -> int:
    """The page that the broker is just copying to, and 1; 0: none."""
    assert client._plane is not None
    return client._plane.read(layout.FILLING_AT)


@contextlib.contextmanager
def broker_stopped(client: EmbeddedClient, in_copy: bool = False) -> Iterator[bool]:
    """The broker is stopped meanwhile, not in the middle of a copy; `in_copy`: in one, as far as it can be caught there. Tells whether it is."""
    pid = client.broker_pid
    try:
        for _ in range(STOPS_MAX):
            # One that was woken and is stopped again at once has not had a turn in between: it would be where it was.
            for _ in range(LOOKS_MAX):
                if bool(filling(client)) == in_copy:
                    break
            stop(pid)
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
