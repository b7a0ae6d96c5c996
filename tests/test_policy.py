"""What stays in memory: each policy against a naive model of it, what a load writes, ghosts, overwrites, shares, and a broker that begins anew."""

from __future__ import annotations

import os
import random
import struct
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gcma_shm import arena as arenas
from gcma_shm import layout
from gcma_shm._core import Plane, Slots
from gcma_shm.records import Records
from tests.invariants import check_at_rest

PAGE = 4096
BATCH = 64  # nursery pages that the sweep settles at once
AREA, NURSERY = 200, 64
EMPTY, CACHED, SPILLED = range(3)


class Scene:
    """An arena of this process with one area, and swap types on it that are written behind."""

    def __init__(
        self, policy: str, directory: Path, area: int = AREA, nursery: int = NURSERY, slots: int = 2000
    ) -> None:
        size = (area + nursery) * PAGE + slots * layout.SLOT_BYTES + (1 << 18)
        while True:
            g, areas = layout.plan(size, areas={"a": area * PAGE}, slots=slots, clients_max=4, policy=policy)
            if g.nursery_pages == nursery:
                break
            size += (nursery - g.nursery_pages) * PAGE
        self.arena = arenas.create(f"/gcma-test-{os.getpid()}", g, areas)
        self.g, self.first, self.directory = g, areas[0].first, directory
        directory.mkdir()
        self.plane = self.broker()

    def broker(self) -> Plane:
        """A broker's view, as of one that begins."""
        plane = Plane(self.arena.memory, self.g, layout.BROKER, os.fsencode(self.directory))
        plane.set_area(0, self.first, self.g.pages - self.first)
        return plane

    def swap(self, type_: int = 0, base: int = 0, slots: int = 2000, share: int = 100) -> Slots:
        (self.directory / f"{type_:03}.1").touch(0o600)
        return self.plane.slots(type_, self.plane.begin_type(type_, base, slots, layout.WRITE_BEHIND, share), 5.0)

    def where(self, slot: int) -> str:
        word = self.plane.read(self.g.slots_at + slot * layout.SLOT_BYTES)
        state, page = word >> 33 & 7, word & 0xFFFFFFFF
        if state == CACHED:
            return "nursery" if page < self.first else "area"
        return "file" if state == SPILLED else "nowhere"

    def sweep(self) -> None:
        """As the reclaim thread is woken."""
        head, hand = self.plane.read(layout.HEAD_AT), self.plane.read(layout.HAND_AT)
        if hand + self.g.nursery_pages - head < self.g.nursery_pages // 8:
            self.plane.sweep(0)

    def pass_nursery(self, swap: Slots, slots: range) -> None:
        """Stores pages that nobody reads, until the hand has passed what was there before."""
        for n in slots:
            swap.store(n, page_of(n))
            self.sweep()

    def counts(self) -> dict[str, int]:
        return Records(self.plane).counters(layout.BROKER)

    def check(self) -> None:
        check_at_rest(self.arena.name, self.directory)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []

    def make(policy: str, **sizes: int) -> Scene:
        made.append(Scene(policy, tmp_path / "spill", **sizes))
        return made[-1]

    yield make
    for one in made:
        one.arena.destroy()


def page_of(n: int) -> bytes:
    return struct.pack("<Q", n + 1) * 512


def load(swap: Slots, n: int) -> bool:
    """Loads, and stores after a miss; whether there was something."""
    page = swap.load(n)
    assert page in (None, page_of(n))
    if page is None:
        swap.store(n, page_of(n))
    return page is not None


# --- against a naive model


class Naive:
    """The policy by its definition: a FIFO of `nursery` tickets, one queue of `area` pages, ghosts by distance."""

    def __init__(self, policy: str, area: int, nursery: int) -> None:
        self.policy, self.area, self.nursery = policy, area, nursery
        self.small: deque[int] = deque()
        self.main: list[int] = []  # oldest first
        self.hand = 0
        self.loads: dict[int, int] = {}
        self.back: set[int] = set()
        self.clock = 0
        self.evicted_at: dict[int, int] = {}

    def load(self, key: int) -> None:
        if key in self.small or key in self.main:
            self.loads[key] += 1
            return
        gone = self.evicted_at.pop(key, None)
        if gone is not None and self.clock - gone < (self.area + self.nursery) * 5 // 4:
            self.back.add(key)
        self.loads[key] = 0
        self.small.append(key)
        if self.nursery - len(self.small) < self.nursery // 8:
            while self.nursery - len(self.small) < self.nursery // 4:
                for _ in range(min(BATCH, len(self.small))):
                    self._settle(self.small.popleft())

    def _settle(self, key: int) -> None:
        proven = self.policy != "s3fifo" or key in self.back or self.loads[key] >= 2
        if len(self.main) == self.area:
            if not proven:
                self.evicted_at[key] = self.clock
                self.clock += 1
                return
            self._make_room()
        if not (self.policy == "s3fifo" and key in self.back):
            self.loads[key] = 0
        self.back.discard(key)
        self.main.append(key)

    def _make_room(self) -> None:
        while True:
            if self.policy == "clock":
                key = self.main.pop(0)
                if not self.loads[key]:
                    return
                self.main.append(key)
            else:
                self.hand %= len(self.main)
                key = self.main[self.hand]
                if not self.loads[key]:
                    del self.main[self.hand]
                    self.hand %= len(self.main)
                    return
                self.hand += 1
            self.loads[key] = 0

    def where(self, key: int) -> str:
        return "nursery" if key in self.small else "area" if key in self.main else "file"


def requests(seed: int, count: int) -> list[int]:
    """Skewed, with scans and loops in between, so that each rule decides something."""
    chosen = random.Random(seed)
    found: list[int] = []
    while len(found) < count:
        if chosen.random() < 0.02:
            start = chosen.randrange(1700)
            found += [*range(start, start + chosen.randrange(20, 300))] * chosen.choice((1, 1, 2))
        found.append(int(2000 * chosen.random() ** 4))
    return [min(key, 1999) for key in found[:count]]


@pytest.mark.parametrize("policy", layout.POLICIES)
def test_a_policy_does_what_its_definition_says(policy: str, scene: Callable[..., Scene]) -> None:
    """Which page is where, after each few of 12,000 requests."""
    s = scene(policy)
    swap, naive = s.swap(), Naive(policy, AREA, NURSERY)
    asked = set()
    for i, key in enumerate(requests(1, 12_000)):
        load(swap, key)
        s.sweep()
        naive.load(key)
        asked.add(key)
        if i % 500 == 0:
            wrong = {k: (s.where(k), naive.where(k)) for k in asked if s.where(k) != naive.where(k)}
            assert not wrong, f"after {i} requests"
    s.check()


def test_the_policies_differ(scene: Callable[..., Scene], tmp_path: Path) -> None:
    """The same requests end in different memories."""
    ends = []
    for policy in layout.POLICIES:
        naive = Naive(policy, AREA, NURSERY)
        for key in requests(2, 6000):
            naive.load(key)
        ends.append(frozenset(naive.main))
    assert len(set(ends)) == len(layout.POLICIES)


# --- S3-FIFO, one decision at a time


def full(s: Scene, swap: Slots) -> None:
    """Slots 1000 and up fill the area; nobody reads them."""
    s.pass_nursery(swap, range(1000, 1000 + AREA + NURSERY))
    assert sum(s.where(n) == "area" for n in range(1000, 2000)) == AREA


@pytest.mark.parametrize(("loads", "ends"), [(0, "file"), (1, "file"), (2, "area"), (5, "area")])
def test_a_new_page_proves_itself_by_two_loads(loads: int, ends: str, scene: Callable[..., Scene]) -> None:
    s = scene("s3fifo")
    swap = s.swap()
    full(s, swap)
    swap.store(7, page_of(7))
    for _ in range(loads):
        swap.load(7)
    s.pass_nursery(swap, range(1500, 1500 + NURSERY))
    assert s.where(7) == ends
    assert swap.load(7) == page_of(7)


def test_what_comes_back_soon_is_promoted_without_a_load(scene: Callable[..., Scene]) -> None:
    """And what comes back late is new."""
    s = scene("s3fifo")
    swap = s.swap()
    full(s, swap)
    for n in (7, 8):
        swap.store(n, page_of(n))
    s.pass_nursery(swap, range(1300, 1300 + 2 * NURSERY))
    assert s.where(7) == s.where(8) == "file"
    assert swap.load(7) == page_of(7)
    assert s.where(7) == "nursery"
    s.pass_nursery(swap, range(1500, 1500 + NURSERY))
    assert s.where(7) == "area"
    for again in range(8):
        s.pass_nursery(swap, range(1300, 1300 + 2 * NURSERY))
        assert s.where(8) == "file", again
    swap.load(8)
    assert s.where(8) == "nursery"
    s.pass_nursery(swap, range(1500, 1500 + NURSERY))
    assert s.where(8) == "file"


def test_the_distance_is_the_caches_without_what_buffers_hold(scene: Callable[..., Scene]) -> None:
    s = scene("s3fifo")
    swap = s.swap()
    full(s, swap)
    assert s.plane.read(layout.CACHE_PAGES_AT) == AREA + NURSERY
    s.plane.take(0, s.first, 150)
    s.plane.write(s.g.area_at(0) + layout.AREA_HELD_AT, 150)  # what the broker's `Areas` do
    s.pass_nursery(swap, range(1500, 1500 + NURSERY))
    assert s.plane.read(layout.CACHE_PAGES_AT) == AREA + NURSERY - 150


@pytest.mark.parametrize(("policy", "writes"), [("s3fifo", 2), ("sieve", 1), ("clock", 1)])
def test_a_hit_writes_one_byte_or_none(policy: str, writes: int, scene: Callable[..., Scene]) -> None:
    """In the whole arena but for the client's own counters."""
    s = scene(policy)
    swap = s.swap()
    full(s, swap)
    swap.store(7, page_of(7))
    resident = next(n for n in range(1000, 2000) if s.where(n) == "area")
    for slot in (7, resident):
        changed = []
        for _ in range(4):
            before = bytes(s.arena.memory)
            assert swap.load(slot) == page_of(slot)
            after = bytes(s.arena.memory)
            own = range(s.g.client_at(layout.BROKER), s.g.client_at(layout.BROKER + 1))
            at = [i for i in range(0, len(after), 64) if before[i : i + 64] != after[i : i + 64]]
            lines = [i for i in at if i not in own]
            for i in lines:
                assert sum(a != b for a, b in zip(before[i : i + 64], after[i : i + 64], strict=True)) == 1
                assert s.g.visited_at // 64 <= i // 64 <= (s.g.visited_at + s.g.pages) // 64
            changed.append(len(lines))
        assert changed == [1] * writes + [0] * (4 - writes), slot


def test_an_overwritten_page_keeps_its_place(scene: Callable[..., Scene]) -> None:
    """A page of an area goes back there; loads in the nursery count for the new value; a store by itself proves nothing."""
    s = scene("s3fifo")
    swap = s.swap()
    full(s, swap)
    of_area = next(n for n in range(1000, 2000) if s.where(n) == "area")
    swap.store(7, page_of(7))
    swap.load(7)
    swap.load(7)
    for n in (7, of_area, 8, 8, 8):
        swap.store(n, page_of(n))
    s.pass_nursery(swap, range(1500, 1500 + NURSERY))
    assert (s.where(7), s.where(of_area), s.where(8)) == ("area", "area", "file")
    s.check()


# --- what happens to pages from outside


@pytest.mark.parametrize("policy", layout.POLICIES)
def test_buffers_take_pages_from_under_the_queue(policy: str, scene: Callable[..., Scene]) -> None:
    s = scene(policy)
    swap, chosen = s.swap(), random.Random(3)
    held: list[tuple[int, int]] = []
    for i, key in enumerate(requests(4, 8000)):
        if chosen.random() < 0.05:
            swap.invalidate_page(chosen.randrange(2000))
        load(swap, key)
        s.sweep()
        if i % 200 == 0:
            if held and chosen.random() < 0.6:
                s.plane.give(0, *held.pop())
            else:
                at, n = chosen.randrange(AREA - 60), chosen.randrange(1, 60)
                if all(s.first + at + n <= first or first + count <= s.first + at for first, count in held):
                    s.plane.take(0, s.first + at, n)
                    held.append((s.first + at, n))
            s.plane.write(s.g.area_at(0) + layout.AREA_HELD_AT, sum(n for _, n in held))
            for first, n in held:
                lives = s.plane.read_many(s.g.life_at + 8 * first, n)
                assert {life >> 62 for life in lives} == {3}, "nobody fills a buffer's page"
    for first, n in held:
        s.plane.give(0, first, n)
    s.plane.write(s.g.area_at(0) + layout.AREA_HELD_AT, 0)
    for key in requests(5, 3000):
        load(swap, key)
        s.sweep()
    assert s.plane.read(s.g.area_at(0) + layout.AREA_LENT_AT) == AREA, "all of it is used again"
    s.check()


@pytest.mark.parametrize("policy", layout.POLICIES)
def test_a_new_broker_goes_on(policy: str, scene: Callable[..., Scene]) -> None:
    """Its structures are empty and the area is full: the cache is kept, and what nobody reads goes."""
    s = scene(policy)
    swap = s.swap()
    full(s, swap)
    kept = [n for n in range(1000, 2000) if s.where(n) == "area"]
    s.plane = s.broker()
    s.plane.put_right(0, s.first, AREA, True)  # what `recover` does; it counts what is lent
    s.plane.write(s.g.area_at(0) + layout.AREA_LENT_AT, AREA)
    swap = s.plane.slots(0, 1, 5.0)
    assert all(s.where(n) == "area" for n in kept), "the cache is kept"
    for n in range(600):
        swap.store(n, page_of(n))
        swap.load(n)
        swap.load(n)
        s.sweep()
    assert sum(s.where(n) == "area" for n in range(600)) > AREA - NURSERY
    assert s.counts()["evictions"] >= AREA - NURSERY
    for n in [*kept, *range(600)]:
        assert swap.load(n) == page_of(n)
    s.check()


# --- shares


def reader_beside_writer(s: Scene, share: int, flood: int) -> float:
    """Hit ratio of a type whose 120 pages are read at random, while another stores six pages to each read and loads each `flood` times."""
    reader, writer = s.swap(0, 0, 400), s.swap(1, 400, 1600, share)
    chosen, hits, loads = random.Random(6), 0, 0
    for i in range(6000):
        key = chosen.randrange(120)
        in_memory = s.where(key) in ("nursery", "area")
        if i > 2000:
            hits, loads = hits + in_memory, loads + 1
        load(reader, key)
        for k in range(6):
            n = (6 * i + k) % 1600
            writer.store(n, page_of(n))
            for _ in range(flood):
                writer.load(n)
            s.sweep()
    return hits / loads


@pytest.mark.parametrize(("policy", "flood", "gain"), [("s3fifo", 2, 0.05), ("sieve", 0, 0.01), ("clock", 0, 0.05)])
def test_a_share_keeps_a_fast_writer_from_evicting_everybody(
    policy: str, flood: int, gain: float, tmp_path: Path
) -> None:
    """SIEVE gives new pages little, and so needs a share the least."""
    found = []
    for share in (100, 20):
        s = Scene(policy, tmp_path / f"spill-{share}")
        try:
            found.append(reader_beside_writer(s, share, flood))
            pages = [s.where(n) for n in range(400, 2000)]
            if share < 100:
                assert pages.count("area") <= AREA * share // 100
                assert pages.count("nursery") <= (NURSERY - NURSERY // 16) * share // 100 + 1
            s.check()
        finally:
            s.arena.destroy()
    without, with_share = found
    print(
        f"{policy}: hit ratio {without:.3f} beside a writer without a share, {with_share:.3f} beside one with 20 percent"
    )
    assert with_share > 0.99
    assert with_share > without + gain


def test_a_type_that_has_its_part_lets_the_others_pages_stay_in_the_nursery(scene: Callable[..., Scene]) -> None:
    """Also where its own are few among many, and nobody has read the others' yet."""
    nursery, others = 1024, 256
    part = (nursery - nursery // 16) * 20 // 100
    s = scene("s3fifo", nursery=nursery, slots=8 * nursery)
    swap, writer = s.swap(0, 0, nursery), s.swap(1, nursery, 7 * nursery, 20)
    s.pass_nursery(writer, range(2 * nursery))
    s.pass_nursery(swap, range(others))
    before = s.plane.read(layout.HEAD_AT)
    s.pass_nursery(writer, range(2 * nursery, 6 * nursery))
    assert all(s.where(n) == "nursery" for n in range(others))
    assert s.plane.read(layout.HEAD_AT) - before < part
    assert part // 2 < sum(s.where(n) == "nursery" for n in range(nursery, 8 * nursery)) <= part + 1
    s.check()


@pytest.mark.parametrize("policy", layout.POLICIES)
def test_a_type_with_a_share_uses_its_share_of_the_areas(scene: Callable[..., Scene], policy: str) -> None:
    """Also when it is alone, and so draws no more tickets than its part of the nursery has pages."""
    s = scene(policy)
    alone = s.swap(0, 0, 2000, 25)
    part = (NURSERY - NURSERY // 16) * 25 // 100
    for n in range(400):
        alone.store(n, page_of(n))
        if n % 8 == 7:
            s.plane.sweep(0)
    where = [s.where(n) for n in range(400)]
    assert where.count("area") == AREA // 4
    assert where.count("nursery") <= part + 1
    s.check()


def test_a_page_in_other_hands_keeps_nobody_from_storing(scene: Callable[..., Scene]) -> None:
    """All that a type may have is one page, and a process that is stopped writes it to the file: a free page is taken, at once."""
    s = scene("s3fifo")
    limited = s.swap(0, 0, 100, 1)
    limited.store(0, page_of(0))
    side = s.g.slots_at + layout.SLOT_BYTES // 2
    s.plane.write(side, (3 << 20 | 7) << 32 | s.plane.read(side) & 0xFFFFFFFF)
    before = s.plane.read(layout.HEAD_AT)
    limited.store(1, page_of(1))
    assert s.plane.read(layout.HEAD_AT) - before == 1
    s.plane.write(side, s.plane.read(side) & 0xFFFFFFFF)


def test_evictions_of_a_type_with_a_share_age_nobody_elses_ghosts(scene: Callable[..., Scene]) -> None:
    s = scene("s3fifo")
    swap, writer = s.swap(0, 0, 1000), s.swap(1, 1000, 1000, 10)
    s.pass_nursery(swap, range(300, 300 + AREA + 2 * NURSERY))
    gone = next(n for n in range(300, 1000) if s.where(n) == "file")
    clock = s.plane.read(layout.CLOCK_AT)
    for again in range(2):
        for n in range(1000):
            writer.store(n, page_of(n + again))
            s.sweep()
    assert s.plane.read(s.g.type_at(1) + layout.TYPE_CLOCK_AT) > 2 * (AREA + NURSERY)
    assert s.plane.read(layout.CLOCK_AT) - clock < NURSERY
    swap.load(gone)
    s.pass_nursery(swap, range(700, 700 + NURSERY))
    assert s.where(gone) == "area", "its distance is what it was"


def test_a_type_above_its_share_gives_up_first(scene: Callable[..., Scene]) -> None:
    """A buffer makes the cache smaller, and so the share: the type with a share loses pages, the others none."""
    s = scene("s3fifo")
    swap, limited = s.swap(0, 0, 1000), s.swap(1, 1000, 1000, 50)
    for n in range(100):
        for one in (swap, limited):
            one.store(n, page_of(n))
            one.load(n)
            one.load(n)
            s.sweep()
    s.pass_nursery(swap, range(300, 300 + NURSERY))
    of_limited = [n for n in range(1000, 1100) if s.where(n) == "area"]
    others = [n for n in range(100) if s.where(n) == "area"]
    assert len(of_limited) > 80
    at = s.first
    s.plane.take(0, at, 100)
    s.plane.write(s.g.area_at(0) + layout.AREA_HELD_AT, 100)
    stayed = [n for n in others if _page(s, n) >= at + 100]
    for n in range(400, 440):
        swap.store(n, page_of(n))
        swap.load(n)
        swap.load(n)
        s.sweep()
    s.pass_nursery(swap, range(500, 500 + NURSERY))
    assert all(s.where(n) == "area" and _page(s, n) >= at + 100 for n in stayed)
    assert sum(s.where(n) == "area" and _page(s, n) >= at + 100 for n in of_limited) <= 50
    s.plane.give(0, at, 100)
    s.plane.write(s.g.area_at(0) + layout.AREA_HELD_AT, 0)
    s.check()


def _page(s: Scene, slot: int) -> int:
    return s.plane.read(s.g.slots_at + slot * layout.SLOT_BYTES) & 0xFFFFFFFF
