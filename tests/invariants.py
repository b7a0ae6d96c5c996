"""What must be true of every arena at rest: read from the shared memory itself, by the words of docs/data-plane.md, not by the code.

The constants are written out here on purpose: a change of the protocol has to be made twice.
"""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gcma_shm.arena import open_arena
from gcma_shm.layout import Geometry

REST_S = 30.0  # how long an arena may take to come to rest: its broker sweeps and writes behind

EMPTY, CACHED, SPILLED, ZERO, CLOSED, FILLED, FILLED_LAID = range(7)
FREE, GRANTED, PUBLISHED, BUFFER = range(4)
_BUFFER_KIND, _RESERVATION_KIND = 1, 2
_BROKER = 1
_AREAS_MAX = 64
_DIRTY = 1 << 32
_LAID = 1  # in the payload of what is EMPTY or ZERO: the file may hold a page there
_LOW = (1 << 32) - 1
_SLOT = (1 << 48) - 1


@dataclass(frozen=True)
class AreaEntry:
    """An entry of the table of areas: one range of pages, up to `end`. `lent` and `held` are its gauges."""

    index: int
    first: int
    end: int
    lends: bool
    lent: int
    held: int


@dataclass(frozen=True)
class Guest:
    """An entry of the table of allocations that is in use."""

    number: int  # counted from 1: the owner of its pages
    kind: int
    first: int
    end: int
    area: int
    claim: int
    deadline: int
    lent: int
    holders: frozenset[int]
    claimers: frozenset[int]  # that share its claim; the broker stands for handles under way
    has_name: bool

    @property
    def is_claimed(self) -> bool:
        """Whether it is a reservation that somebody has claimed: what its pages hold is no cache any more."""
        return self.kind == _RESERVATION_KIND and self.claim & 0xFFFF != 0


class Snapshot:
    """The tables of an arena at one moment; `moved` tells whether they moved while they were copied."""

    def __init__(self, memory: memoryview, geometry: Geometry) -> None:
        self.geometry = g = geometry
        first, second = (bytes(memory[: g.pages_at]) for _ in range(2))
        self.moved = first != second
        self._bytes = first
        self.filling, self.taking = self._words(0x300, 2)
        pairs = self._words(g.slots_at, 2 * g.slots)
        self.words, self.sides = pairs[::2], pairs[1::2]
        self.life = self._words(g.life_at, g.pages)
        self.key = self._words(g.key_at, g.pages)
        self.types = [self._words(g.types_at + 128 * t, 4) for t in range(256)]
        self.areas: dict[int, AreaEntry] = {}
        for index in range(_AREAS_MAX):
            at = g.areas_at + 128 * index
            first_page, pages, policy, _share, _alignment, state = self._words(at + 48, 6)
            _clock, lent, held = self._words(at + 0x60, 3)
            if pages:
                lends = bool(policy & 1) and not state & 1
                self.areas[index] = AreaEntry(index, first_page, first_page + pages, lends, lent, held)
        self.guests = [
            guest for number in range(1, g.allocations_max + 1) if (guest := self._guest(number)) is not None
        ]
        records = {n: g.clients_at + 512 * n for n in range(2, g.clients_max + 1)}
        self.keepers = {
            n for n, at in records.items() if self._words(at + 0x1D8, 1)[0] and self._words(at, 1)[0] & 0xFF == 3
        }
        self.guest_of = {page: guest for guest in self.guests for page in range(guest.first, guest.end)}

    def _words(self, at: int, count: int) -> tuple[int, ...]:
        return struct.unpack_from(f"<{count}Q", self._bytes, at)

    def _guest(self, number: int) -> Guest | None:
        g, index = self.geometry, number - 1
        state, first, pages, area, _client, _request, claim, deadline = self._words(g.allocations_at + 128 * index, 8)
        (name,) = self._words(g.allocations_at + 128 * index + 0x40, 1)
        (lent,) = self._words(g.allocations_at + 128 * index + 0x70, 1)
        if not state & 0xFF:
            return None
        holders, claimers = (self._clients(at + index * g.holder_bytes) for at in (g.holders_at, g.claimers_at))
        end, has_name = first + pages, bool(name & 0xFF)
        return Guest(number, state & 0xFF, first, end, area, claim, deadline, lent, holders, claimers, has_name)

    def _clients(self, at: int) -> frozenset[int]:
        words = self._words(at, self.geometry.holder_bytes // 8)
        return frozenset(64 * n + bit for n, word in enumerate(words) for bit in range(64) if word >> bit & 1)

    def owners(self) -> list[int | None]:
        """The living type of each slot."""
        found: list[int | None] = [None] * self.geometry.slots
        for type_, (life, base, slots, _flags) in enumerate(self.types):
            if life & 1:
                for slot in range(base, base + slots):
                    assert found[slot] is None, f"slot {slot} belongs to types {found[slot]} and {type_}"
                    found[slot] = type_
        return found


def _check_slots(s: Snapshot) -> None:
    owners = s.owners()
    named: Counter[int] = Counter()
    nursery, pages = s.geometry.nursery_pages, s.geometry.pages
    for slot, (word, side, owner) in enumerate(zip(s.words, s.sides, owners, strict=True)):
        state, dirty, payload = word >> 33 & 7, bool(word & _DIRTY), word & _LOW
        where = f"slot {slot} of type {owner}, word {word:#x}"
        assert side >> 32 == 0, f"{where}: somebody holds its place in the file, side {side:#x}"
        assert state <= FILLED_LAID, f"{where}: no such state"
        if owner is None:
            assert state == CLOSED or word == 0, f"{where}: a slot of no living type"
        else:
            assert state != CLOSED, f"{where}: closed in a living type"
        if state in (EMPTY, ZERO, CLOSED, FILLED, FILLED_LAID):
            assert not dirty, f"{where}: dirty with nothing to write"
            if state not in (FILLED, FILLED_LAID):
                assert payload in (0, _LAID * (state != CLOSED)), f"{where}: a payload with nothing to say"
        elif state == SPILLED:
            assert not dirty, f"{where}: in the file and dirty"
        else:
            assert payload < pages, f"{where}: names no page"
            life, key = s.life[payload], s.key[payload]
            guest = s.guest_of.get(payload)
            fits = life >> 62 == PUBLISHED and key == (owner or 0) << 48 | slot
            fits = fits and not (guest is not None and guest.is_claimed)
            if payload < nursery:
                assert fits, f"{where}: names nursery page {payload}, life {life:#x}, key {key:#x}"
            assert not dirty or payload < nursery, f"{where}: dirty outside the nursery"
            if fits:  # else: taken for a buffer, or claimed, since, and to be healed when it is read
                named[payload] += 1
    twice = [page for page, count in named.items() if count > 1]
    assert not twice, f"pages named by two slots: {twice}"


def _check_pages(s: Snapshot) -> None:
    assert s.filling == 0, f"still filling area page {s.filling - 1}"
    assert s.taking == 0, f"still taking {s.taking:#x}"
    granted = [page for page, life in enumerate(s.life) if life >> 62 == GRANTED]
    assert not granted, f"pages granted to nobody at work: {granted}"
    assert not any(life >> 62 == BUFFER for life in s.life[: s.geometry.nursery_pages]), "a buffer in the nursery"
    end = s.geometry.nursery_pages
    area_of: dict[int, AreaEntry] = {}
    for area in sorted(s.areas.values(), key=lambda area: area.first):
        assert area.first >= end, f"area {area.index} begins at page {area.first}, expected {end} or above"
        end = area.end
        pages = range(area.first, area.end)
        area_of |= dict.fromkeys(pages, area)
        own = sum(s.life[page] >> 62 == PUBLISHED and not _owner(s.life[page]) for page in pages)
        assert own == area.lent, f"area {area.index}: {own} pages hold cache, its gauge says {area.lent}"
        held = sum(page in s.guest_of and s.guest_of[page].kind == _BUFFER_KIND for page in pages)
        assert held == area.held, f"area {area.index}: {held} pages are buffers', its gauge says {area.held}"
        assert area.lent + area.held <= area.end - area.first, f"area {area.index}: more than full"
    assert end <= s.geometry.pages, "an area behind the last page"
    for page in range(s.geometry.nursery_pages, s.geometry.pages):
        _check_area_page(page, s.life[page], area_of.get(page), s.guest_of.get(page))


def _owner(life: int) -> int:
    return life >> 46 & 0xFFFF


def _check_area_page(page: int, life: int, area: AreaEntry | None, guest: Guest | None) -> None:
    state, owner = life >> 62, _owner(life)
    where = f"page {page}, life {life:#x}, of {area or 'no area'} and {guest or 'no guest'}"
    assert owner == (guest.number if guest is not None else 0), f"{where}: another's"
    if area is None:
        assert state in (FREE, BUFFER), f"{where}: in use"
        return
    if guest is not None and guest.kind == _BUFFER_KIND:
        assert state == BUFFER, f"{where}: a buffer's, and not kept for it"
    elif state == BUFFER:
        # A reservation that was claimed while its area was drained is as it was then, until it is lent again.
        claimed = guest is not None and guest.is_claimed
        assert claimed or not area.lends, f"{where}: kept from the cache for nobody"
    elif not area.lends:
        # A reservation that was claimed when the area was drained may be left as it was.
        assert guest is not None, f"{where}: offered to the cache of an area that has none"


def _check_guests(s: Snapshot) -> None:
    taken: set[int] = set()
    for guest in s.guests:
        assert guest.kind in (_BUFFER_KIND, _RESERVATION_KIND), f"{guest}: no such kind"
        pages, area = range(guest.first, guest.end), s.areas.get(guest.area)
        assert area is not None, f"{guest}: in no area"
        assert pages, f"{guest}: of no pages"
        assert area.first <= guest.first < guest.end <= area.end, f"{guest}: not within {area}"
        assert not taken.intersection(pages), f"{guest}: overlaps another"
        taken.update(pages)
        assert guest.holders or guest.claimers or guest.deadline, f"{guest}: nobody holds it"
        assert not guest.claimers or guest.claim >> 16 & 1, f"{guest}: a claim shared, and not said so"
        assert 0 not in guest.holders, f"{guest}: held by nobody"
        if guest.holders & ({_BROKER} | s.keepers):
            assert guest.kind == _BUFFER_KIND, f"{guest}: kept, and no buffer"
            assert guest.has_name, f"{guest}: kept, and could not be unlinked"
        if guest.kind == _RESERVATION_KIND:
            _check_reservation(s, guest)


def _check_reservation(s: Snapshot, guest: Guest) -> None:
    client, shared = guest.claim & 0xFFFF, guest.claim >> 16 & 1
    lent = sum(s.life[page] >> 62 == PUBLISHED for page in range(guest.first, guest.end))
    assert lent == guest.lent, f"{guest}: {lent} pages hold cache"
    assert client != _BROKER, f"{guest}: the broker has it in its hands"
    if client and not shared:
        assert client in guest.holders, f"{guest}: claimed by who does not hold it"
    assert client or not shared, f"{guest}: a claim that nobody has, shared"


def _check_files(s: Snapshot, memory: memoryview, spill_dir: Path) -> None:
    """A clean page is in the file as it is in memory: promise 2 for areas, and what eviction relies on for the nursery. Where no value is in
    the file, there is nothing, or the word says so.
    """
    size = s.geometry.page_size
    for type_, (life, base, slots, _flags) in enumerate(s.types):
        if not life & 1:
            continue
        with (spill_dir / f"{type_:03}.{life}").open("rb") as file:
            for slot in range(base, base + slots):
                word = s.words[slot]
                page = word & _LOW
                if word >> 33 & 7 == FILLED or (word >> 33 & 7 in (EMPTY, ZERO) and page != _LAID):
                    file.seek((slot - base) * size)
                    assert not any(file.read(size)), (
                        f"slot {slot - base} of type {type_}: the file holds what nobody needs"
                    )
                if word >> 33 & 7 != CACHED or word & _DIRTY:
                    continue
                guest = s.guest_of.get(page)
                if s.life[page] >> 62 != PUBLISHED or s.key[page] != type_ << 48 | slot:
                    continue
                if guest is not None and guest.is_claimed:
                    continue
                file.seek((slot - base) * size)
                at = s.geometry.page_at(page)
                assert file.read(size) == memory[at : at + size], (
                    f"slot {slot - base} of type {type_}: page {page} and file differ"
                )


def check_tables(memory: memoryview, geometry: Geometry) -> None:
    """The same of what one process has in private memory, files aside; at rest as soon as no call is under way."""
    snapshot = Snapshot(memory, geometry)
    _check_slots(snapshot)
    _check_pages(snapshot)
    _check_guests(snapshot)


def check_at_rest(name: str, spill_dir: Path | None = None, more: Callable[[Snapshot], None] = lambda _: None) -> None:
    """Raises AssertionError when an invariant of the arena `name` is broken, and stays broken while nobody uses it."""
    arena = open_arena(name)
    deadline = time.monotonic() + REST_S
    with memoryview(arena.memory) as memory:
        while True:
            snapshot = Snapshot(memory, arena.geometry)
            try:
                assert not snapshot.moved, "the tables do not come to rest"
                _check_slots(snapshot)
                _check_pages(snapshot)
                _check_guests(snapshot)
                if spill_dir is not None:
                    _check_files(snapshot, memory, spill_dir)
                more(snapshot)
            except (AssertionError, FileNotFoundError):
                if time.monotonic() > deadline:
                    raise
            else:
                break
    arena.memory.close()
