"""What must be true of every arena at rest: read from the shared memory itself, by the words of docs/data-plane.md, not by the code.

The constants are written out here on purpose: a change of the protocol has to be made twice.
"""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from gcma_shm.arena import open_arena
from gcma_shm.layout import Geometry

REST_S = 30.0  # how long an arena may take to come to rest: its broker sweeps and writes behind

EMPTY, CACHED, SPILLED, ZERO, CLOSED = range(5)
FREE, GRANTED, PUBLISHED, BUFFER = range(4)
_DIRTY = 1 << 32
_LOW = (1 << 32) - 1
_SLOT = (1 << 48) - 1


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
        self.types = [self._words(g.types_at + 64 * t, 4) for t in range(256)]
        self.areas = []
        for index in range(g.areas_count):
            at = g.areas_at + 128 * index
            first_page, pages = self._words(at + 48, 2)
            _clock, lent, held = self._words(at + 0x60, 3)
            self.areas.append((first_page, pages, lent, held))
        self.allocations = [self._words(g.allocations_at + 128 * i, 4) for i in range(g.allocations_max)]

    def _words(self, at: int, count: int) -> tuple[int, ...]:
        return struct.unpack_from(f"<{count}Q", self._bytes, at)

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
        assert state <= CLOSED, f"{where}: no such state"
        if owner is None:
            assert state == CLOSED or word == 0, f"{where}: a slot of no living type"
        else:
            assert state != CLOSED, f"{where}: closed in a living type"
        if state in (EMPTY, ZERO, CLOSED):
            assert not dirty, f"{where}: dirty with nothing to write"
            assert payload == 0, f"{where}: a payload with nothing to say"
        elif state == SPILLED:
            assert not dirty, f"{where}: in the file and dirty"
        else:
            assert payload < pages, f"{where}: names no page"
            life, key = s.life[payload], s.key[payload]
            fits = life >> 62 == PUBLISHED and key == (owner or 0) << 48 | slot
            if payload < nursery:
                assert fits, f"{where}: names nursery page {payload}, life {life:#x}, key {key:#x}"
            assert not dirty or payload < nursery, f"{where}: dirty outside the nursery"
            if fits:  # else: taken for a buffer since, and to be healed when it is read
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
    for index, (first, pages, lent, held) in enumerate(s.areas):
        assert first == end, f"area {index} begins at page {first}, expected {end}"
        end = first + pages
        states = Counter(life >> 62 for life in s.life[first:end])
        assert states[PUBLISHED] == lent, f"area {index}: {states[PUBLISHED]} pages hold cache, its gauge says {lent}"
        assert states[BUFFER] == held, f"area {index}: {states[BUFFER]} pages are buffers', its gauge says {held}"
        assert lent + held <= pages, f"area {index}: more than full"
    assert end == s.geometry.pages, "pages that belong to nothing"


def _check_buffers(s: Snapshot) -> None:
    bought: set[int] = set()
    for state, first, pages, area in s.allocations:
        if state & 0xFF:
            where = range(first, first + pages)
            assert s.areas[area][0] <= first, "a buffer before its area"
            assert first + pages <= s.areas[area][0] + s.areas[area][1], "a buffer beyond its area"
            assert not bought.intersection(where), "buffers overlap"
            bought.update(where)
    held = {page for page, life in enumerate(s.life) if life >> 62 == BUFFER}
    assert held == bought, f"the table of buffers and the descriptors differ in {held ^ bought}"


def _check_files(s: Snapshot, memory: memoryview, spill_dir: Path) -> None:
    """A clean page is in the file as it is in memory: promise 2 for areas, and what eviction relies on for the nursery."""
    size = s.geometry.page_size
    for type_, (life, base, slots, _flags) in enumerate(s.types):
        if not life & 1:
            continue
        with (spill_dir / f"{type_:03}.{life}").open("rb") as file:
            for slot in range(base, base + slots):
                word = s.words[slot]
                page = word & _LOW
                if word >> 33 & 7 != CACHED or word & _DIRTY:
                    continue
                if s.life[page] >> 62 != PUBLISHED or s.key[page] != type_ << 48 | slot:
                    continue
                file.seek((slot - base) * size)
                at = s.geometry.page_at(page)
                assert file.read(size) == memory[at : at + size], (
                    f"slot {slot - base} of type {type_}: page {page} and file differ"
                )


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
                _check_buffers(snapshot)
                if spill_dir is not None:
                    _check_files(snapshot, memory, spill_dir)
                more(snapshot)
            except (AssertionError, FileNotFoundError):
                if time.monotonic() > deadline:
                    raise
            else:
                break
    arena.memory.close()
