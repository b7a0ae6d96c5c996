"""The broker's areas: where guests go, drained and resized areas."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gcma_shm import layout
from gcma_shm.areas import SHARE_WHOLE, AreaSpec
from gcma_shm.broker.areas import Areas
from gcma_shm.broker.room import AreaRoom, Place, Wanted
from gcma_shm.errors import ArenaError, ArenaExhausted, NoSuchArea
from tests.conftest import Bare, private_bare
from tests.invariants import BUFFER, PUBLISHED
from tests.rooms import ANY, PAGE, areas_of, life, lives, made, offset_of, take

# --- where a guest goes


def test_an_arena_has_the_areas_of_its_plan() -> None:
    areas, bare = made(ANY)
    assert [(room.name, room.pages, room.free) for room in areas.of(None)] == [("a", 40, 40), ("b", 80, 80)]
    assert areas.spare == 0
    assert [part.first for room in areas.of(None) for part in room.parts] == [area.first for area in bare.arena.areas]
    with pytest.raises(NoSuchArea, match="a, b"):
        areas.of("c")


def test_the_smallest_area_with_room_and_in_it_the_smallest_range() -> None:
    areas, _ = made(ANY)
    assert offset_of(areas, None, 30) == ("a", 0)
    assert offset_of(areas, None, 41) == ("b", 0)
    assert offset_of(areas, None, 81) is None
    assert offset_of(areas, "a", 41) is None
    take(areas, "b", 10, 10)
    take(areas, "b", 40, 10)  # leaves 10, 20 and 30
    assert offset_of(areas, "b", 9) in (("b", 0), ("b", 1)), "at one end of the smallest"
    assert offset_of(areas, "b", 11) in (("b", 20), ("b", 29))
    assert offset_of(areas, "b", 21) == ("b", 50), "from below in the last range"
    assert offset_of(areas, "b", 31) is None


def test_buffers_grow_from_below() -> None:
    areas, _ = made(ANY)
    for n in range(8):
        place = areas.find(Wanted(areas.of("b"), 10))
        assert place is not None
        assert place.offset == 10 * n
        place.area.take(place)
    assert areas.find(Wanted(areas.of("b"), 1)) is None
    areas._check()


def test_exactly_there_or_nowhere() -> None:
    areas, _ = made(ANY)
    take(areas, "a", 5, 10)
    for offset, pages, free in (
        (0, 5, True),
        (0, 6, False),
        (15, 25, True),
        (15, 26, False),
        (14, 1, False),
        (40, 1, False),
    ):
        place = areas.find(Wanted(areas.of("a"), pages, offset))
        assert (place is not None) == free
        assert place is None or place.offset == offset


def test_aligned_within_the_area_by_what_is_asked_and_by_its_own() -> None:
    areas, bare = made({"a": 40 * PAGE, "b": AreaSpec(80 * PAGE, align=4 * PAGE)})
    b = bare.arena.areas[1]
    assert bare.arena.geometry.page_at(b.first) % (4 * PAGE) == 0
    take(areas, "b", 0, 1)
    assert offset_of(areas, "b", 1) == ("b", 4)
    assert offset_of(areas, "b", 1, 2) == ("b", 4)
    assert offset_of(areas, "b", 1, 32) == ("b", 32)
    assert offset_of(areas, "b", 17, 64) is None
    assert offset_of(areas, "b", 16, 64) == ("b", 64)
    take(areas, "a", 0, 1)
    assert offset_of(areas, "a", 1) == ("a", 1)
    areas._check()


def test_a_share_of_the_area_is_always_the_caches() -> None:
    areas, _ = made({"a": AreaSpec(40 * PAGE, share=50), "b": 80 * PAGE})
    (a,) = areas.of("a")
    assert (a.allowance, a.largest) == (20, 20)
    assert offset_of(areas, None, 21) == ("b", 0)
    assert offset_of(areas, "a", 21) is None
    one, other = take(areas, "a", 0, 15), take(areas, "a", 30, 5)
    assert (a.allowance, a.largest, a.free) == (0, 0, 20)
    assert offset_of(areas, "a", 1) is None
    a.give(other)
    assert (a.allowance, a.largest) == (5, 5)
    assert offset_of(areas, "a", 5) is not None
    assert offset_of(areas, "a", 6) is None
    a.give(one)
    areas._check()
    assert a.largest == 20


def test_a_pure_reserve_is_kept_from_the_cache() -> None:
    _, bare = made({"a": "160K,cache=off", "b": 80 * PAGE})
    a, b = bare.arena.areas
    assert lives(bare, a.first, a.pages) == {BUFFER}
    assert lives(bare, b.first, b.pages) == {0}


def cached(bare: Bare) -> None:
    """Fills both areas of the arena with cache."""
    g = bare.arena.geometry
    (bare.spill_dir / "000.1").touch(0o600)
    slots = bare.plane.slots(0, bare.plane.begin_type(0, 0, g.slots, 0), 5.0)
    for n in range(g.slots):
        slots.store(n, struct.pack("<Q", n + 1) * 512)
        bare.plane.sweep(0)
    for area in bare.arena.areas:
        assert lives(bare, area.first, area.pages) == {PUBLISHED}


def drop_cache(areas: Areas, name: str, offset: int, pages: int) -> None:
    """A guest comes and goes there: the range is free and without cache."""
    place = take(areas, name, offset, pages)
    place.area.offer(place.part, place.first, place.pages)
    place.area.give(place)
    areas._check()


@pytest.mark.parametrize("without", [0, 105])
def test_of_equal_ranges_the_one_with_less_cache(bare: Bare, without: int) -> None:
    """How much cache there is, is known by blocks of 64 pages; the one in which `b` begins has the end of `a`, too."""
    cached(bare)
    areas = areas_of(bare)
    take(areas, "b", 95, 10)  # leaves 95 and 95
    drop_cache(areas, "b", without, 95)
    place = areas.find(Wanted(areas.of("b"), 64))
    assert place is not None
    assert place.offset in range(without, without + 95 - 64 + 1)


def test_of_the_ends_of_a_range_the_one_with_less_cache(bare: Bare) -> None:
    cached(bare)
    areas = areas_of(bare)
    take(areas, "b", 150, 50)
    bare.plane.take(0, bare.arena.areas[0].first, 100)  # in the block of the first pages of `b`, too
    drop_cache(areas, "b", 60, 90)
    assert offset_of(areas, "b", 20) == ("b", 130), "the upper end: there is no cache"
    assert offset_of(areas, "b", 20, 16) == ("b", 128), "aligned there, too"
    drop_cache(areas, "b", 0, 60)
    assert offset_of(areas, "b", 20) == ("b", 0)


@pytest.mark.parametrize(("larger_by", "chosen"), [(0, 100), (2, 100), (3, 50)])
def test_a_range_that_is_larger_by_little_fits_equally_well(bare: Bare, larger_by: int, chosen: int) -> None:
    """The range at 100 has no cache near it; the one at 50 fits best."""
    cached(bare)
    areas = areas_of(bare)
    take(areas, "b", 0, 50)
    take(areas, "b", 66, 34)
    take(areas, "b", 116 + larger_by, 84 - larger_by)
    drop_cache(areas, "b", 100, 16 + larger_by)
    # The block that holds the range at 100, absolutely 384 to 447, still holds the cache below and above it: as guests' it is gone.
    for offset, pages in ((66, 34), (116 + larger_by, 84 - larger_by)):
        bare.plane.take(1, bare.arena.areas[1].first + offset, pages, 1)
    place = areas.find(Wanted(areas.of("b"), 10))
    assert place is not None
    assert place.offset in range(chosen, chosen + 16 + larger_by)


# --- drained, resumed, resized


def test_a_drained_area_takes_no_guests_and_no_cache(bare: Bare) -> None:
    cached(bare)
    areas = areas_of(bare)
    guest = take(areas, "a", 10, 10)
    bare.plane.take(0, guest.first, guest.pages, 7)
    before = [life(bare, page) for page in range(guest.first, guest.first + guest.pages)]
    areas.drain("a")
    (a,) = areas.of("a")
    assert (a.drained, a.lends, a.allowance, a.largest, a.free) == (True, False, 0, 0, 90)
    assert offset_of(areas, "a", 1) is None
    assert areas.find(Wanted(areas.of("a"), 1, 0)) is None
    assert offset_of(areas, None, 1) is not None
    first = bare.arena.areas[0].first
    assert lives(bare, first, 100) == {BUFFER}
    assert [life(bare, page) for page in range(guest.first, guest.first + guest.pages)] == before, "it is not disturbed"
    _, described, _ = layout.read_header(memoryview(bare.arena.memory), bare.arena.geometry.size)
    assert [area.state for area in described] == [1, 0]
    areas._check()
    a.offer(guest.part, guest.first, guest.pages)
    a.give(guest)
    assert lives(bare, first, 100) == {BUFFER}, "what is given back is kept from the cache as well"
    areas.drain("a")
    areas.resume("a")
    assert lives(bare, first, 100) == {0}
    assert offset_of(areas, "a", 100) == ("a", 0)
    areas.resume("a")
    areas._check()
    for change in (areas.drain, areas.resume, lambda name: areas.resize(name, 1)):
        with pytest.raises(NoSuchArea):
            change("c")


def test_a_pure_reserve_stays_one_when_it_is_resumed() -> None:
    areas, bare = made({"a": "160K,cache=off", "b": 80 * PAGE})
    areas.drain("a")
    areas.resume("a")
    a = bare.arena.areas[0]
    assert lives(bare, a.first, a.pages) == {BUFFER}
    assert offset_of(areas, "a", 40) == ("a", 0)


def test_what_one_area_gives_up_another_one_gets_in_parts() -> None:
    areas, bare = made({"a": 40 * PAGE, "b": 80 * PAGE, "c": 20 * PAGE})
    a, b, c = areas.of(None)
    guest = take(areas, "a", 5, 5)
    areas.resize("b", 50)
    assert (b.pages, areas.spare) == (50, 30)
    areas._check()
    with pytest.raises(ArenaExhausted) as raised:
        areas.resize("a", 71)
    assert (raised.value.requested, raised.value.largest_free) == (31 * PAGE, 30 * PAGE)
    assert (a.pages, areas.spare) == (40, 30)
    areas.resize("a", 60)
    assert [(part.pages, part.base) for part in a.parts] == [(40, 0), (20, 40)]
    assert a.parts[1].first == b.parts[0].end
    assert guest.offset == 5
    assert offset_of(areas, "a", 31) is None, "a guest is never in two parts"
    assert take(areas, "a", 40, 20).first == b.parts[0].end
    assert areas.find(Wanted(areas.of("a"), 2, 39)) is None
    areas.resize("b", 50)
    areas.resize("c", 30)
    assert areas.spare == 0
    assert [part.base for part in c.parts] == [0, 20]
    areas._check()
    _, described, _ = layout.read_header(memoryview(bare.arena.memory), bare.arena.geometry.size)
    assert sorted((area.name, area.first, area.pages) for area in described) == sorted(
        (room.name, part.first, part.pages) for room in (a, b, c) for part in room.parts
    )


def test_an_area_grows_at_its_end_first() -> None:
    areas, _ = made({"a": 40 * PAGE, "b": 80 * PAGE})
    (a,) = areas.of("a")
    areas.resize("a", 10)
    guest = take(areas, "a", 9, 1)
    areas.resize("a", 40)
    assert [(part.pages, part.base) for part in a.parts] == [(40, 0)]
    assert guest.offset == 9
    assert offset_of(areas, "a", 30) == ("a", 10)
    areas._check()


def test_what_is_grown_is_what_its_area_is() -> None:
    areas, bare = made({"a": "160K,cache=off", "b": 80 * PAGE})
    for name, state in (("a", BUFFER), ("b", 0)):
        (room,) = areas.of(name)
        areas.resize("b" if name == "a" else "a", 10)
        areas.resize(name, room.pages + 20)
        for part in room.parts:
            assert lives(bare, part.first, part.pages) == {state}
    areas._check()


def test_a_guest_is_in_the_way_of_less(bare: Bare) -> None:
    cached(bare)
    areas = areas_of(bare)
    (a,) = areas.of("a")
    guest = take(areas, "a", 60, 5)
    before = bytes(bare.arena.memory[:])
    for pages in (64, 60, 1):
        with pytest.raises(ArenaExhausted, match="260 KiB is the least") as raised:
            areas.resize("a", pages)
        assert (raised.value.requested, raised.value.largest_free) == ((100 - pages) * PAGE, 35 * PAGE)
        assert bytes(bare.arena.memory[:]) == before, "refused, and changed something"
        areas._check()
    for pages in (0, -1):
        with pytest.raises(ValueError, match="at least one"):
            areas.resize("a", pages)
    areas.resize("a", 65)
    assert (a.pages, areas.spare) == (65, 35)
    first = bare.arena.areas[0].first
    assert lives(bare, first + 65, 35) == {BUFFER}, "nobody's, whatever the reclaim thread has read"
    assert lives(bare, first, 60) == {PUBLISHED}, "the rest is not disturbed"
    a.give(guest)
    areas.resize("a", 1)
    areas._check()


def test_an_area_has_no_more_parts_than_the_table() -> None:
    areas, _ = made({f"a{n}": 3 * PAGE for n in range(layout.AREAS_MAX)})
    for n in (10, 20):
        areas.resize(f"a{n}", 2)
    with pytest.raises(ArenaError, match="parts"):
        areas.resize("a30", 4)
    areas._check()
    assert (areas.of("a30")[0].pages, areas.spare) == (3, 2)
    areas.resize("a10", 3)
    areas._check()


@pytest.mark.parametrize("in_parts", [8, 7])
def test_an_area_that_cannot_have_all_its_parts_gets_none(in_parts: int) -> None:
    """One entry of the table is left. The last part grows by what is behind it, which counts as no part of its own."""
    areas, _ = made({f"a{n}": 7 * PAGE for n in range(layout.AREAS_MAX - 1)})
    for name, pages in (("a0", 3), ("a10", 5), ("a20", 5)):
        areas.resize(name, pages)
    with pytest.raises(ArenaError, match="parts"):
        areas.resize("a0", 3 + in_parts)
    areas._check()
    assert (areas.of("a0")[0].pages, areas.spare) == (3, 8)
    areas.resize("a0", 9)
    areas._check()
    assert [part.pages for part in areas.of("a0")[0].parts] == [7, 2]


# --- any order of it all


SPECS: dict[str, int | str | AreaSpec] = {
    "plain": 24 * PAGE,
    "aligned": AreaSpec(20 * PAGE, align=4 * PAGE),
    "reserve": AreaSpec(12 * PAGE, cache=False),
    "shared": AreaSpec(16 * PAGE, share=50),
}
names = st.sampled_from(sorted(SPECS))


class Machine(RuleBasedStateMachine):
    """Guests, drained and resized areas in any order, against what the rules say."""

    def __init__(self) -> None:
        super().__init__()
        self.bare = private_bare(SPECS, 1 << 20)
        self.areas = areas_of(self.bare)
        self.guests: list[tuple[Place, int]] = []  # with the owner in its lives
        self.owners = 0
        self.drained: set[str] = set()
        self.pages = {room.name: room.pages for room in self.areas.of(None)}
        self.total = sum(self.pages.values()) + self.areas.spare

    def _rooms(self, chosen: set[str]) -> tuple[AreaRoom, ...]:
        return tuple(room for room in self.areas.of(None) if room.name in chosen)

    def _busy(self, name: str) -> set[int]:
        """Offsets that guests have."""
        mine = [place for place, _ in self.guests if place.area.name == name]
        return {offset for place in mine for offset in range(place.offset, place.offset + place.pages)}

    def _offsets(self, room: AreaRoom, wanted: Wanted) -> Iterator[int]:
        """Where it could go, by the rules."""
        busy = self._busy(room.name)
        left = room.pages * room.described.share // SHARE_WHOLE - len(busy)
        if room.name in self.drained or wanted.pages > left:
            return
        align = max(wanted.align, room.described.alignment)
        for part in room.parts:
            for offset in range(part.base, part.base + part.pages - wanted.pages + 1):
                there = wanted.offset == offset if wanted.offset is not None else offset % align == 0
                if there and not busy.intersection(range(offset, offset + wanted.pages)):
                    yield offset

    def _ask(self, wanted: Wanted, reserve: bool) -> None:
        could = {(room.name, offset) for room in wanted.areas for offset in self._offsets(room, wanted)}
        place = self.areas.find(wanted)
        assert (place is not None) == bool(could), f"{wanted} into {could}"
        if place is None:
            return
        assert (place.area.name, place.offset) in could
        for room in wanted.areas:
            every = [(one.area.name, one.offset) for one in room.places(wanted)]
            assert set(every) <= could
            assert len(every) == len(set(every))
        self.owners += 1
        place.area.take(place)
        if reserve:
            place.area.offer(place.part, place.first, place.pages, self.owners)
        else:
            self.bare.plane.take(place.part.index, place.first, place.pages, self.owners)
        self.guests.append((place, self.owners))

    @rule(
        chosen=st.sets(names, min_size=1),
        pages=st.integers(1, 12) | st.integers(1, 30),
        align=st.sampled_from([1, 2, 8, 16]),
        reserve=st.booleans(),
    )
    def anywhere(self, chosen: set[str], pages: int, align: int, reserve: bool) -> None:
        self._ask(Wanted(self._rooms(chosen), pages, None, align), reserve)

    @rule(name=names, offset=st.integers(0, 40), pages=st.integers(1, 20))
    def there(self, name: str, offset: int, pages: int) -> None:
        self._ask(Wanted(self._rooms({name}), pages, offset), False)

    @precondition(lambda self: self.guests)
    @rule(which=st.integers(0, 1 << 10))
    def leave(self, which: int) -> None:
        place, _ = self.guests.pop(which % len(self.guests))
        place.area.offer(place.part, place.first, place.pages)
        place.area.give(place)

    @rule(name=names)
    def drain(self, name: str) -> None:
        self.areas.drain(name)
        self.drained.add(name)

    @rule(name=names)
    def resume(self, name: str) -> None:
        self.areas.resume(name)
        self.drained.discard(name)

    @rule(name=names, pages=st.integers(1, 50))
    def resize(self, name: str, pages: int) -> None:
        (room,) = self.areas.of(name)
        last = max(self._busy(name), default=-1)
        fits = pages > last if pages < room.pages else pages - room.pages <= self.areas.spare
        before = bytes(self.bare.arena.memory[:])
        try:
            self.areas.resize(name, pages)
        except ArenaExhausted:
            assert not fits or name == "aligned", "there may be room, and not where offsets are aligned in memory"
            assert bytes(self.bare.arena.memory[:]) == before, "refused, and changed something"
        else:
            assert fits
            self.pages[name] = pages

    @invariant()
    def sound(self) -> None:
        self.areas._check()
        assert {room.name: room.pages for room in self.areas.of(None)} == self.pages
        assert sum(self.pages.values()) + self.areas.spare == self.total
        for room in self.areas.of(None):
            assert room.free == room.pages - len(self._busy(room.name))

    @invariant()
    def offsets_stay(self) -> None:
        """An offset is a page number for as long as a guest is there."""
        for place, _ in self.guests:
            (room,) = self.areas.of(place.area.name)
            (part,) = [part for part in room.parts if part.base <= place.offset < part.base + part.pages]
            assert part is place.part
            assert part.first + place.offset - part.base == place.first

    @invariant()
    def aligned_in_the_area_is_aligned_in_memory(self) -> None:
        (room,) = self.areas.of("aligned")
        for part in room.parts:
            assert self.bare.arena.geometry.page_at(part.first - part.base) % (4 * PAGE) == 0

    @invariant()
    def pages_say_whose_they_are(self) -> None:
        owner = {
            page: number for place, number in self.guests for page in range(place.first, place.first + place.pages)
        }
        for room in self.areas.of(None):
            lends = room.name not in self.drained and room.name != "reserve"
            for part in room.parts:
                for page in range(part.first, part.end):
                    found = life(self.bare, page)
                    assert found >> 46 & 0xFFFF == owner.get(page, 0)
                    if page not in owner:
                        assert found >> 62 == (0 if lends else BUFFER)

    @invariant()
    def the_arena_tells_the_same(self) -> None:
        _, described, _ = layout.read_header(memoryview(self.bare.arena.memory), self.bare.arena.geometry.size)
        assert sorted((area.name, area.first, area.pages, area.state) for area in described) == sorted(
            (room.name, part.first, part.pages, int(room.name in self.drained))
            for room in self.areas.of(None)
            for part in room.parts
        )


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrder = Machine.TestCase
