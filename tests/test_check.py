"""`gcma check`: each kind of damage is found and named, and nothing else; what is sound is found so, also while it moves."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import gcma_shm
from gcma_shm import layout
from gcma_shm._check_view import Finding
from gcma_shm.arena import SHM_DIR, open_arena, remove_dead
from gcma_shm.broker.checking import DAMAGED, LINES_MAX, SOUND, UNCHECKED
from gcma_shm.broker.cli import main
from gcma_shm.check import LOOKS, Inspected, Report, check, look_once, repeated
from gcma_shm.endpoint import arena_name, default_spill_dir
from gcma_shm.entries import ClientEntry, read_guests
from gcma_shm.records import State
from gcma_shm.standing import Standing
from tests.processes import WAIT_S, Broker, Said, broker, eventually, forked

PAGE = 4096
MIB = 1 << 20
AREAS = ("--area", "a=4M", "--area", "b=1M,cache=off", "--slots", "6000")
EMPTY, CACHED, SPILLED, ZERO, CLOSED, FILLED, FILLED_LAID = range(7)
FREE, GRANTED, PUBLISHED, BUFFER = range(4)
DIRTY = 1 << 32
CHURN_LOOKS = 40


@pytest.fixture
def endpoint() -> Iterator[str]:
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    yield endpoint
    Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)
    with contextlib.suppress(gcma_shm.ArenaError):
        remove_dead(arena_name(endpoint))
    for path in sorted(default_spill_dir(endpoint).parent.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is wrong for good."""
    monkeypatch.setattr("gcma_shm.check.LOOKS", 3)


def page_of(n: int) -> bytes:
    return struct.pack("<Q", n) * (PAGE // 8)


def _is_swept(endpoint: str) -> bool:
    """Whether the sweep has come to its end, with a quarter of the nursery free, and has promoted something: stores that find no page,
    where it has not had its turn, free some as well, and promote nothing.
    """
    c = Copy((SHM_DIR / arena_name(endpoint)[1:]).read_bytes())
    room = c.read(layout.HAND_AT) + c.g.nursery_pages - c.read(layout.HEAD_AT)
    cached = (c.read(c.slot_at(slot)) for slot in range(3000))
    promoted = any(state(word) == CACHED and not word & DIRTY and not in_nursery(c, word) for word in cached)
    return room >= c.g.nursery_pages // 4 and promoted


@contextlib.contextmanager
def _numbers_are_free(endpoint: str) -> Iterator[None]:
    """Waits until the broker has buried who saw that it serves: what is planted below is in the name of one client or the other."""

    def buried() -> bool:
        copy = Copy((SHM_DIR / arena_name(endpoint)[1:]).read_bytes())
        return all(copy.read(copy.g.client_at(number)) & 0xFF == State.FREE for number in (2, 3))

    assert eventually(buried)
    yield


@contextlib.contextmanager
def in_use(endpoint: str) -> Iterator[tuple[Broker, gcma_shm.Client]]:
    """An arena with something of everything, at rest. Its clients are numbers 2 and 3."""
    with (
        broker(endpoint, *AREAS) as first,
        _numbers_are_free(endpoint),
        gcma_shm.connect(endpoint, timeout=WAIT_S) as client,
        gcma_shm.connect(endpoint, timeout=WAIT_S) as other,
    ):
        assert (client.number, other.number) == (2, 3)
        through, behind = client.swap(0, 3000), client.swap(1, 1000, "behind")
        client.resize_area("a", 7 * MIB // 2)
        kept = [client.alloc_contig(5 * PAGE, area="a", name=f"buffer {n}") for n in range(3)]
        kept.append(client.alloc_contig(9 * PAGE, area="b"))
        lent, claimed = (client.reserve(40 * PAGE, area="a", name=name) for name in ("lent", "claimed"))
        mine = claimed.claim()
        for n in range(3000):
            through.store(n, page_of(n + 1))
            through.load(n)
        through.store(2900, bytes(PAGE))
        through.store(2901, b"\7" * PAGE)
        for n in range(50):
            behind.store(n, page_of(n + 1))

        def is_swept() -> bool:
            """The sweep begins when less than an eighth of the nursery is free: until it has, there is one page less."""
            if _is_swept(endpoint):
                return True
            through.store(0, page_of(1))
            return False

        assert eventually(is_swept)
        assert eventually(lambda: not look(endpoint).findings)
        # With a quarter of the nursery free the sweep promotes nothing, so what this leaves free in the area stays so.
        client.alloc_contig(20 * PAGE, area="a").free()
        assert eventually(lambda: not look(endpoint).findings)
        yield first, client
        assert (len(kept), lent.name, mine.nbytes) == (4, "lent", 40 * PAGE), "held until now"


def look(endpoint: str) -> Report:
    return check(arena_name(endpoint))


class Told(Standing):
    """Who lives, as a test says."""

    def __init__(self, served: bool = True, dead: tuple[int, ...] = ()) -> None:
        self.served = served
        self.dead = dead

    def is_served(self) -> bool:
        return self.served

    def is_stopped(self) -> bool:
        return False

    def lives(self, client: ClientEntry) -> bool | None:
        return client.number not in self.dead


class Copy:
    """An arena's bytes in private memory, at which a test does damage."""

    def __init__(self, image: bytes) -> None:
        self.bytes = bytearray(image)
        self.g, self.areas, _ = layout.read_header(memoryview(self.bytes), len(self.bytes))

    def read(self, at: int) -> int:
        return int.from_bytes(self.bytes[at : at + 8], "little")

    def write(self, at: int, value: int) -> None:
        self.bytes[at : at + 8] = (value % (1 << 64)).to_bytes(8, "little")

    def add(self, at: int, by: int) -> None:
        self.write(at, self.read(at) + by)

    def slot_at(self, slot: int) -> int:
        return self.g.slots_at + 16 * slot

    def slot(self, wanted: Callable[[int], bool], type_: int = 0) -> int:
        """Where the first slot word of the type is that is as wanted."""
        base, count = (self.read(self.g.type_at(type_) + 8 * n) for n in (1, 2))
        return next(at for n in range(base, base + count) if wanted(self.read(at := self.slot_at(n))))

    def life(self, wanted: Callable[[int, int], bool]) -> int:
        """Where the first life is of a page and in a life as wanted."""
        return next(at for page in range(self.g.pages) if wanted(page, self.read(at := self.g.life_at + 8 * page)))

    def entry(self, name: str) -> int:
        """Where the guest of that name is in the table."""
        return next(
            at
            for index in range(self.g.allocations_max)
            if self.bytes[(at := self.g.allocation_at(index)) + 0x40 : at + 0x70].rstrip(b"\0") == name.encode()
        )

    def look(self, served: bool = True, dead: tuple[int, ...] = ()) -> list[Finding]:
        return look_once(memoryview(bytes(self.bytes)), self.g, self.areas, Told(served, dead)).findings


_images: list[bytes] = []


@pytest.fixture
def copy(endpoint: str) -> Copy:
    if not _images:  # made once: it takes a second
        with in_use(endpoint):
            _images.append((SHM_DIR / arena_name(endpoint)[1:]).read_bytes())
    return Copy(_images[0])


def state(word: int) -> int:
    return word >> 33 & 7


def in_nursery(c: Copy, word: int) -> bool:
    return state(word) == CACHED and word & 0xFFFFFFFF < c.g.nursery_pages


def with_state(word: int, to: int) -> int:
    return word & ~(7 << 33) | to << 33


def slot_becomes(
    change: Callable[[Copy, int], int], wanted: Callable[[Copy, int], bool], type_: int = 0
) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        at = c.slot(lambda word: wanted(c, word), type_)
        c.write(at, change(c, c.read(at)))

    return plant


def header(at: int, value: Callable[[Copy], int]) -> Callable[[Copy], None]:
    return lambda c: c.write(at, value(c))


def word_of(name: str, offset: int, change: Callable[[Copy, int], int]) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        at = c.entry(name) + offset
        c.write(at, change(c, c.read(at)))

    return plant


def both(one: Callable[[Copy], None], other: Callable[[Copy], None]) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        one(c)
        other(c)

    return plant


def bits_of(name: str, table: str, change: Callable[[int], int]) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        index = (c.entry(name) - c.g.allocations_at) // layout.ALLOCATION_BYTES
        at = getattr(c.g, table) + index * c.g.holder_bytes
        c.write(at, change(c.read(at)))

    return plant


def of_type(number: int, offset: int, change: Callable[[Copy, int], int]) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        at = c.g.type_at(number) + offset
        c.write(at, change(c, c.read(at)))

    return plant


def of_client(number: int, offset: int, change: Callable[[int], int]) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        at = c.g.client_at(number) + offset
        c.write(at, change(c.read(at)))

    return plant


def of_area(index: int, offset: int, change: Callable[[int], int]) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        at = c.g.area_at(index) + offset
        c.write(at, change(c.read(at)))
        c.areas = layout.read_header(memoryview(c.bytes), len(c.bytes))[1]

    return plant


def life_becomes(where: Callable[[Copy, int, int], bool], change: Callable[[Copy, int], int]) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        at = c.life(lambda page, life: where(c, page, life))
        c.write(at, change(c, c.read(at)))

    return plant


def lives_as(state: int, owner: int = 0) -> Callable[[Copy, int], int]:
    return lambda _, life: life & (1 << 46) - 1 | state << 62 | owner << 46


def free_in_nursery(c: Copy, page: int, life: int) -> bool:
    return page < c.g.nursery_pages and life >> 62 == FREE


def named_in_nursery(c: Copy, page: int, life: int) -> bool:
    return page < c.g.nursery_pages and life >> 62 == PUBLISHED


def spare(c: Copy, page: int, _: int) -> bool:
    return page >= c.g.nursery_pages and not any(a.first <= page < a.first + a.pages for a in c.areas)


def of_guest(name: str) -> Callable[[Copy, int, int], bool]:
    def where(c: Copy, page: int, _: int) -> bool:
        at = c.entry(name)
        return page == c.read(at + 8) + 2

    return where


def free_in(name: str) -> Callable[[Copy, int, int], bool]:
    def where(c: Copy, page: int, life: int) -> bool:
        area = next(a for a in c.areas if a.name == name)
        return area.first <= page < area.first + area.pages and not life >> 46 & 0xFFFF

    return where


def made_free(c: Copy, name: str) -> int:
    """A page of that area that is nobody's and FREE: wherever the cache happens to lie, it gives one up, as if it had been discarded."""
    at = c.life(lambda page, life: free_in(name)(c, page, life) and life >> 62 in (FREE, PUBLISHED))
    life = c.read(at)
    if life >> 62 == PUBLISHED:
        lent = c.g.area_at(next(a.index for a in c.areas if a.name == name)) + layout.AREA_LENT_AT
        c.write(at, lives_as(FREE)(c, life + 1))
        c.write(lent, c.read(lent) - 1)
    return (at - c.g.life_at) // 8


def free_page_of_a_becomes(change: Callable[[Copy, int], int]) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        page = made_free(c, "a")
        life_becomes(lambda _, at, __: at == page, change)(c)

    return plant


def orphan_without_slot(c: Copy) -> None:
    at = c.life(lambda page, life: free_in_nursery(c, page, life))
    c.write(at, lives_as(PUBLISHED)(c, c.read(at)))
    c.write(c.g.key_at + at - c.g.life_at, c.g.slots)


def named_twice(c: Copy) -> None:
    named = c.read(c.slot(lambda word: in_nursery(c, word)))
    at = c.slot(lambda word: state(word) == SPILLED)
    c.write(at, with_state(c.read(at), CACHED) & ~0xFFFFFFFF | named & 0xFFFFFFFF)


def over_another(c: Copy) -> None:
    one, other = c.entry("buffer 0"), c.entry("buffer 1")
    if c.read(one + 8) > c.read(other + 8):
        one, other = other, one
    c.write(one + 16, c.read(one + 16) + 1)


def named_alike(c: Copy) -> None:
    at = c.entry("buffer 1")
    c.bytes[at + 0x40 : at + 0x48] = b"buffer 0"


def writes(client: int, tag: int = 1) -> Callable[[Copy], None]:
    def plant(c: Copy) -> None:
        at = c.slot(lambda word: state(word) == CACHED) + 8
        c.write(at, c.read(at) | (client << 20 | tag) << 32)

    return plant


# What is planted; of which kind it is; what is said.
DAMAGE: dict[str, tuple[Callable[[Copy], None], str, str]] = {
    "hand-past-head": (header(layout.HAND_AT, lambda c: c.read(layout.HEAD_AT) + 5), "header", "hand, at ticket .* has passed"),
    "filling-nowhere": (header(layout.FILLING_AT, lambda c: c.g.pages + 7), "header", "fill page .* in no area"),
    "taking-nowhere": (header(layout.TAKING_AT, lambda c: (c.g.pages - 1) << 32 | 2), "header", "take pages .* in no area"),
    "area-policy": (of_area(0, 0x40, lambda v: v | 8), "area", "policy 0x9 and state 0x0 are unknown"),
    "area-state": (of_area(1, 0x58, lambda v: v | 4), "area", "state 0x4"),
    "area-share": (of_area(0, 0x48, lambda _: 101), "area", "share of 101"),
    "area-alignment": (of_area(0, 0x50, lambda _: 3), "area", "alignment of 3"),
    "area-name": (of_area(0, 0, lambda _: 0xFF), "area", "name that cannot be"),
    "type-outside": (of_type(1, 8, lambda c, _: c.g.slots), "type", "of a table of 6000 slots"),
    "type-flags": (of_type(1, 24, lambda _, v: v | 6), "type", "flags 0x7"),
    "client-state": (of_client(2, 0, lambda v: v & ~0xFF | 9), "client", "state 9"),
    "client-parent": (of_client(2, 0, lambda v: v | 0xFFF << 8), "client", "taken by client 4095"),
    "client-nobody": (of_client(2, 8, lambda _: 0), "client", "alive, and no process"),
    "guest-kind": (word_of("buffer 2", 0, lambda _, v: v & ~0xFF | 7), "allocation", "of kind 7"),
    "guest-outside": (word_of("buffer 2", 8, lambda c, _: c.g.pages - 1), "allocation", "not within area 'a'"),
    "guest-kept-without-a-name": (
        both(bits_of("buffer 2", "holders_at", lambda v: v | 2), word_of("buffer 2", 0x40, lambda *_: 0)),
        "allocation", "kept by client 1, and without a name",
    ),
    "guest-no-area": (word_of("buffer 2", 0x18, lambda *_: 9), "allocation", "not within any area"),
    "guest-over-another": (over_another, "allocation", "buffer in entry . 'buffer .' and buffer in entry . 'buffer .' share pages"),
    "guests-named-alike": (named_alike, "allocation", "named like the buffer"),
    "claim-of-nobody": (word_of("lent", 0x30, lambda _, v: v | 1 << 16), "allocation", "that nobody has is shared"),
    "claim-cannot-be": (word_of("claimed", 0x30, lambda _, v: v & ~0xFFFF | 0xFFF), "allocation", "claimed by client 4095"),
    "slot-state": (slot_becomes(lambda _, w: with_state(w, 7), lambda _, w: state(w) == SPILLED), "slot", "state that is unknown"),
    "slot-dirty-nothing": (slot_becomes(lambda _, w: w | DIRTY, lambda _, w: state(w) == SPILLED), "slot", "dirty with nothing"),
    "slot-says-too-much": (slot_becomes(lambda _, w: w | 5, lambda _, w: state(w) == ZERO), "slot", "payload with nothing to say"),
    "slot-no-page": (
        slot_becomes(lambda c, w: w & ~0xFFFFFFFF | c.g.pages, lambda c, w: state(w) == CACHED and not in_nursery(c, w)),
        "slot", "names page .* of an arena of",
    ),
    "slot-dirty-in-area": (
        slot_becomes(lambda _, w: w | DIRTY, lambda c, w: state(w) == CACHED and not in_nursery(c, w)), "slot", "dirty on page",
    ),
    "slot-not-its-page": (named_twice, "slot", "whose life is .* and whose key"),
    "slot-closed-alive": (slot_becomes(lambda _, w: with_state(w, CLOSED) & ~0xFFFFFFFF, lambda _, w: state(w) in (FILLED, FILLED_LAID)), "slot", "closed in a living"),
    "slot-claimed-by-nobody": (writes(0), "slot", "claimed by client 0, which cannot be"),
    "slot-claimed-by-stranger": (writes(7), "slot", "claimed by client 7, which is not there"),
    "page-of-stranger": (life_becomes(free_in_nursery, lives_as(GRANTED, 7)), "page", "granted to client 7, which is not there"),
    "page-buffer-in-nursery": (life_becomes(free_in_nursery, lives_as(BUFFER)), "page", "cannot be so"),
    "page-orphan-of-no-slot": (orphan_without_slot, "page", "leads to no slot"),
    "page-named-and-free": (life_becomes(named_in_nursery, lives_as(FREE)), "slot", "names nursery page"),
    "page-spare-in-use": (life_becomes(spare, lives_as(GRANTED)), "page", "in no area, life .*: it is granted"),
}  # fmt: skip

# What only a broker at work may leave: damage where one runs, and else for the next one to put right.
AT_REST: dict[str, tuple[Callable[[Copy], None], str, str]] = {
    "filling": (header(layout.FILLING_AT, lambda c: c.g.nursery_pages + 1), "header", "announces to fill page"),
    "taking": (header(layout.TAKING_AT, lambda c: c.g.nursery_pages << 32 | 2), "header", "announces to take pages"),
    "area-base": (of_area(0, 0x78, lambda _: 4), "area", "begins at page 4 of the area, expected 0"),
    "client-taken": (of_client(9, 0, lambda v: v | layout.BROKER << 8 | 1), "client", "taken by the broker"),
    "guest-without-holders": (bits_of("buffer 2", "holders_at", lambda _: 0), "allocation", "nobody holds it"),
    "guest-held-by-stranger": (bits_of("buffer 2", "holders_at", lambda v: v | 1 << 9), "allocation", "held by client 9"),
    "claim-shared-by-stranger": (
        both(word_of("claimed", 0x30, lambda _, v: v | 1 << 16), bits_of("claimed", "claimers_at", lambda _: 1 << 9)),
        "allocation", "shared by client 9",
    ),
    "claim-not-shared": (bits_of("claimed", "claimers_at", lambda _: 1 << 2), "allocation", "a claim that is not shared"),
    "claim-of-broker": (word_of("claimed", 0x30, lambda _, v: v & ~0xFFFF | 1), "allocation", "the broker has it in its hands"),
    "claim-of-stranger": (word_of("claimed", 0x30, lambda _, v: v & ~0xFFFF | 3), "allocation", "claimed by client 3, which does not hold"),
    "slot-open-dead": (lambda c: c.write(c.slot_at(c.g.slots - 1), 3 << 36), "slot", "no living type, and is not closed"),
    "page-of-buffer-free": (life_becomes(of_guest("buffer 1"), lambda _, v: v & ~(3 << 62)), "page", "of the buffer .*: it is free"),
    "page-of-buffer-anothers": (life_becomes(of_guest("buffer 1"), lambda _, v: v & ~(0xFFFF << 46)), "page", "it is nobody's"),
    "page-of-reservation-granted": (
        life_becomes(of_guest("claimed"), lambda _, v: v & ~(3 << 62) | GRANTED << 62), "page", "of the reservation .*: it is granted",
    ),
    "page-free-of-entry": (
        free_page_of_a_becomes(lives_as(FREE, 9)), "page", "of area 'a', life .*: it is entry 8's",
    ),
    "page-kept-from-cache": (
        free_page_of_a_becomes(lives_as(BUFFER)), "page", "it is a buffer's",
    ),
    "page-lent-without-cache": (
        life_becomes(free_in("b"), lives_as(FREE)), "page", "of area 'b', life .*: it is free",
    ),
    "gauge-lent": (of_area(0, layout.AREA_LENT_AT, lambda v: v - 3), "gauge", "area 'a' .* lent pages says 3 fewer"),
    "gauge-lent-below-zero": (of_area(1, layout.AREA_LENT_AT, lambda v: v - 1), "gauge", "lent pages says 18446744073709551615"),
    "gauge-held": (of_area(1, layout.AREA_HELD_AT, lambda v: v + 2), "gauge", "held pages says 11, its buffers have 9"),
    "gauge-of-reservation": (word_of("lent", 0x70, lambda _, v: v + 4), "gauge", "reservation .*'lent'.* 4 more"),
}  # fmt: skip

# What is in the name of somebody who has died, while a broker lives: it puts that right.
OF_THE_DEAD: dict[str, tuple[Callable[[Copy], None], str, str]] = {
    "client": (lambda _: None, "client", "it has died"),
    "grant": (life_becomes(free_in_nursery, lives_as(GRANTED, 2)), "page", "granted to client 2, which has died"),
    "place": (writes(2), "slot", "claimed by client 2, which has died"),
    "burying": (of_client(2, 0, lambda v: v & ~0xFF | 4), "client", "about to be buried"),
}


def found(findings: list[Finding], kind: str, words: str) -> None:
    assert findings, "nothing found"
    assert [finding.kind for finding in findings] == [kind], f"more, or something else: {findings}"
    assert re.search(words, findings[0].text), findings[0].text


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named_and_nothing_else(copy: Copy, name: str) -> None:
    plant, kind, words = DAMAGE[name]
    plant(copy)
    for served in (True, False):
        findings = [one for one in copy.look(served) if not (one.pending and not served)]
        # What leads somewhere else damages more than itself.
        told = [one for one in findings if re.search(words, one.text)]
        found(told, kind, words)
        assert not told[0].pending
        if name not in LEADS_ELSEWHERE:
            assert findings == told


# These take a range away from its pages or slots, which are then, rightly, said to be somebody else's.
LEADS_ELSEWHERE = {"type-outside", "guest-kind", "guest-outside", "guest-no-area", "guest-over-another", "page-spare-in-use"}  # fmt: skip


@pytest.mark.parametrize("name", AT_REST)
def test_what_a_broker_leaves_on_its_way_is_told_apart(copy: Copy, name: str) -> None:
    plant, kind, words = AT_REST[name]
    plant(copy)
    for served in (True, False):
        findings = copy.look(served)
        found(findings, kind, words)
        assert findings[0].pending is not served


@pytest.mark.parametrize("name", OF_THE_DEAD)
def test_what_the_dead_leave_is_for_the_broker(copy: Copy, name: str) -> None:
    plant, kind, words = OF_THE_DEAD[name]
    plant(copy)
    findings = copy.look(dead=(2,))
    found([one for one in findings if re.search(words, one.text)], kind, words)
    assert all(one.pending for one in findings)


def test_what_the_dead_broker_had_in_hand(copy: Copy) -> None:
    life_becomes(free_in_nursery, lives_as(GRANTED, layout.BROKER))(copy)
    assert not copy.look(served=True)
    found(copy.look(served=False), "page", "granted to the broker that has died")
    page = made_free(copy, "a")
    life_becomes(lambda _, at, __: at == page, lives_as(GRANTED))(copy)
    copy.write(layout.FILLING_AT, page + 1)
    found([one for one in copy.look(served=True) if one.kind == "page"] or copy.look(served=True), "header", "fill")
    assert all(one.pending for one in copy.look(served=False))


def test_an_arena_at_rest_is_sound(copy: Copy) -> None:
    assert not copy.look(served=True)
    assert not copy.look(served=False)


# --- headers


def resealed(c: Copy) -> bytes:
    """With the checksum that fits."""
    size = struct.calcsize("<8sII16s") + 8 * len(layout.Geometry.__dataclass_fields__)
    c.bytes[size : size + 4] = struct.pack("<I", zlib.crc32(c.bytes[:size]))
    return bytes(c.bytes)


def bytes_with(at: int, new: bytes) -> Callable[[Copy], bytes]:
    return lambda c: bytes(c.bytes[:at]) + new + bytes(c.bytes[at + len(new) :])


def another_geometry(**changes: int) -> Callable[[Copy], bytes]:
    def make(c: Copy) -> bytes:
        for number, name in enumerate(layout.Geometry.__dataclass_fields__):
            if name in changes:
                c.write(32 + 8 * number, changes[name])
        return resealed(c)

    return make


HEADERS: dict[str, tuple[Callable[[Copy], bytes], int, str]] = {
    "checksum": (bytes_with(40, b"\x01"), DAMAGED, "its checksum does not fit"),
    "truncated": (lambda c: bytes(c.bytes[:-PAGE]), DAMAGED, "was truncated"),
    "truncated-in-header": (lambda c: bytes(c.bytes[:2048]), DAMAGED, "less than its header"),
    "areas": (lambda c: bytes_with(c.g.area_at(0) + 0x38, struct.pack("<Q", c.g.pages))(c), DAMAGED, "table of areas is damaged"),
    "page-size": (another_geometry(page_size=4097), DAMAGED, "no arena can have these sizes"),
    "offset": (another_geometry(slots_at=1 << 60), DAMAGED, "slots_at is 1152921504606846976, expected"),
    "count": (another_geometry(allocations_max=1 << 40), DAMAGED, "allocations_max is"),
    "grants": (another_geometry(grants_max=31), DAMAGED, "grants_max is 31"),
    "nursery": (another_geometry(nursery_pages=3), DAMAGED, "a nursery of 3 pages"),
    "spill-dir": (bytes_with(layout.SPILL_DIR_AT, b"\0"), DAMAGED, "does not say where the spill files are"),
    "version": (bytes_with(8, b"\x09"), UNCHECKED, "layout version 9: this gcma-shm knows version"),
    "magic": (bytes_with(0, b"ANOTHER!"), UNCHECKED, "is not an arena: it begins with b'ANOTHER!'"),
    "empty": (lambda _: b"", UNCHECKED, "is not an arena"),
    "never-served": (bytes_with(layout.EPOCH_AT, bytes(8)), UNCHECKED, "no broker has served yet"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.usefixtures("quick")
def test_headers(copy: Copy, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, status, words = HEADERS[name]
    path = SHM_DIR / f"gcma-test-{os.getpid()}"
    path.write_bytes(make(copy))
    try:
        assert main(["check", "--arena", path.name]) == status
    finally:
        path.unlink()
    assert words in "".join(capsys.readouterr())


def test_there_is_none(capsys: pytest.CaptureFixture[str], endpoint: str) -> None:
    assert main(["check", "--endpoint", endpoint]) == UNCHECKED
    assert "there is no arena" in capsys.readouterr().err


def test_a_name_ends_at_its_first_zero(copy: Copy) -> None:
    """What is behind it is left of an older name, whose removal was cut off."""
    at = copy.entry("buffer 1") + layout.ALLOCATION_NAME_AT
    copy.bytes[at : at + layout.NAME_BYTES] = b"new\0r 1".ljust(layout.NAME_BYTES - 3, b"\0") + b"old"
    names = {guest.name for guest in read_guests(memoryview(copy.bytes), copy.g)}
    assert b"new" in names
    assert not any(b"\0" in name for name in names)
    copy.write(at, 0)
    unnamed = [guest.index for guest in read_guests(memoryview(copy.bytes), copy.g) if not guest.name]
    assert (at - layout.ALLOCATION_NAME_AT - copy.g.allocations_at) // layout.ALLOCATION_BYTES in unnamed
    assert not copy.look()


# --- files and values


@pytest.mark.usefixtures("quick")
def test_spill_files(endpoint: str) -> None:
    with in_use(endpoint):
        directory = default_spill_dir(endpoint)
        through = directory / "000.1"
        # What comes back below must be what is there: the broker gives back the places of the pages that became zeros, or a pattern.
        assert eventually(lambda: not any(through.read_bytes()[2900 * PAGE : 2902 * PAGE]))
        whole, kept = through.read_bytes(), directory / "kept"
        (directory / "009.5").write_bytes(b"stray")
        found(look(endpoint).findings, "spill file", "009.5: of no living type")
        assert not look(endpoint).damaged
        (directory / "009.5").unlink()
        os.truncate(through, 100 * PAGE)
        found(look(endpoint).findings, "spill file", f"has {100 * PAGE} bytes, its values need")
        through.write_bytes(whole + bytes(4000 * PAGE))
        found(look(endpoint).findings, "spill file", f"its slots {3000 * PAGE}")
        through.rename(kept)
        found(look(endpoint).damaged, "spill file", "000.1, of a living type, cannot be opened: No such file")
        through.symlink_to(kept)
        assert look(endpoint).damaged, "a link is not the file"
        through.unlink()
        shutil.copy(kept, through)
        found(look(endpoint).damaged, "spill file", "000.1 is not the file that its life began with")
        through.unlink()
        kept.rename(through)
        through.write_bytes(whole)
        assert not check(arena_name(endpoint), values=True).findings


@pytest.mark.usefixtures("quick")
def test_values(endpoint: str) -> None:
    with in_use(endpoint):
        name, file = arena_name(endpoint), default_spill_dir(endpoint) / "000.1"
        assert not check(name, values=True).findings
        arena = open_arena(name)
        c = Copy(arena.memory[:])
        spilled = (c.slot(lambda word: state(word) == SPILLED) - c.slot_at(0)) // 16
        with file.open("r+b") as opened:
            opened.seek(spilled * PAGE + 9)
            before = opened.read(1)
            opened.seek(spilled * PAGE + 9)
            opened.write(bytes([before[0] ^ 1]))
        assert not look(endpoint).findings, "the tables are whole"
        found(check(name, values=True).findings, "value", f"slot {spilled} of type 0.*does not fit its checksum")
        with file.open("r+b") as opened:
            opened.seek(spilled * PAGE + 9)
            opened.write(before)
        at = c.slot(lambda word: state(word) == CACHED and not word & DIRTY)
        byte = c.g.page_at(c.read(at) & 0xFFFFFFFF) + 77
        arena.memory[byte] ^= 1
        found(
            check(name, values=True).findings,
            "value",
            f"slot {(at - c.slot_at(0)) // 16} of type 0.*in memory is not what is in the file",
        )
        arena.memory[byte] ^= 1
        assert not check(name, values=True).findings
        arena.memory.close()


# --- while it moves, and after deaths


def churn(endpoint: str, said: Said | None, over: Callable[[], bool]) -> None:
    """Of everything, until it is over."""
    chance = random.Random(os.getpid())
    with gcma_shm.connect(endpoint, timeout=WAIT_S) as client:
        swaps = client.swap(0, 3000), client.swap(1, 1000, "behind")
        reservation = client.reserve(64 * PAGE, area="a")
        if said is not None:
            said.say()
        while not over():
            for swap in swaps:
                for _ in range(20):
                    n = chance.randrange(swap.slots)
                    swap.store(n, page_of(n + 1))
                    swap.load(chance.randrange(swap.slots))
                swap.invalidate_page(chance.randrange(swap.slots))
            try:
                client.alloc_contig(chance.randrange(1, 200) * PAGE).free()
                reservation.claim().free()
                short = client.swap(chance.randrange(2, 9), 200)
                short.store(7, page_of(7))
                short.invalidate_area()
            except (gcma_shm.Closed, gcma_shm.BrokerUnavailable, gcma_shm.ArenaExhausted):
                continue  # another's invalidate_area, or no broker just now


def test_an_arena_under_churn_is_sound_many_times_in_a_row(endpoint: str) -> None:
    with in_use(endpoint):
        over = threading.Event()
        with forked(lambda said: churn(endpoint, said, lambda: False)) as child:
            child.receive()
            thread = threading.Thread(target=churn, args=(endpoint, None, over.is_set))
            thread.start()
            try:
                for count in range(CHURN_LOOKS):
                    report = check(arena_name(endpoint), values=count % 4 == 0)
                    assert report.served
                    assert not report.damaged, f"look {count}"
            finally:
                over.set()
                thread.join()


def test_after_a_death_and_after_a_takeover(endpoint: str) -> None:
    with in_use(endpoint) as (first, _), forked(lambda said: churn(endpoint, said, lambda: False)) as child:
        child.receive()
        first.stop(signal.SIGKILL)
        for _ in range(5):
            report = check(arena_name(endpoint), values=True)
            assert not report.served
            assert not report.damaged, "clients go on"
        child.kill()
        report = check(arena_name(endpoint), values=True)
        assert not report.damaged
        assert any(one.kind == "client" and "it has died" in one.text for one in report.pending)
        with broker(endpoint, *AREAS):
            assert eventually(lambda: not look(endpoint).findings)
            assert not check(arena_name(endpoint), values=True).findings


def test_a_stopped_broker_is_no_damage(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with in_use(endpoint) as (first, _), forked(lambda said: churn(endpoint, said, lambda: False)) as child:
        child.receive()
        for _ in range(5):
            os.kill(first.pid, signal.SIGSTOP)
            try:
                assert eventually(lambda: not look(endpoint).served)
                assert not look(endpoint).damaged
                assert main(["check", "--endpoint", endpoint]) == SOUND
                assert ", its broker is stopped\n" in capsys.readouterr().out
            finally:
                os.kill(first.pid, signal.SIGCONT)


# --- looks


def test_what_is_there_but_once_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcma_shm.check.NAP_S", 0.0)
    findings = [Finding("page", f"page {n}") for n in range(3)]
    looks = iter([findings, findings[1:], *[findings[1:2]] * LOOKS])
    report = repeated(lambda _: Report(next(looks), moving=True))
    assert report.findings == findings[1:2]
    assert report.looks == LOOKS
    assert len(list(looks)) == 2, "no more looks than that"
    assert repeated(lambda _: Report(findings)).looks == 1, "nothing moves"


def test_it_cannot_write(endpoint: str) -> None:
    """Neither through its mapping nor to what it looks at."""
    with in_use(endpoint) as (first, _):
        first.stop(signal.SIGKILL)
        path = SHM_DIR / arena_name(endpoint)[1:]
        before = path.read_bytes()
        check(arena_name(endpoint), values=True)
        assert path.read_bytes() == before
        inspected = Inspected(arena_name(endpoint))
        assert inspected.memory.readonly
        inspected.close()
        with broker(endpoint, *AREAS):
            pass


# --- the command


def test_what_it_prints(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with in_use(endpoint):
        capsys.readouterr()
        assert main(["check", "--endpoint", endpoint, "--pages"]) == SOUND
        told = capsys.readouterr().out
        assert "served by a broker" in told
        assert re.search(r"2 areas, 2 types, 2 clients, 4 buffers, 2 reservations, 6000 slots \(", told)
        assert re.search(r"2 spill files, .* of values\nsound; \d+ ms", told)
        assert main(["check", "--endpoint", endpoint, "--json"]) == SOUND
        figures = json.loads(capsys.readouterr().out)
        assert figures["sound"]
        assert figures["figures"]["slots"] == 6000
        assert figures["findings"] == []


@pytest.mark.usefixtures("quick")
def test_at_most_so_many_lines_of_a_kind(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(2000):
        copy.write(copy.slot_at(n), 7 << 33)
    path = SHM_DIR / f"gcma-test-{os.getpid()}"
    path.write_bytes(copy.bytes)
    try:
        assert main(["check", "--arena", f"/{path.name}"]) == DAMAGED
    finally:
        path.unlink()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged: slot")]
    assert len(told) == LINES_MAX + 1
    assert told[-1] == f"damaged: slot: {2000 - LINES_MAX} more"
