"""Who may pass whom in the line, and what could ever be had: decided by the broker's areas alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcma_shm.areas import LENT, SHARE_WHOLE, Area, AreaSpec
from gcma_shm.broker import areas as areas_module
from gcma_shm.broker.areas import PASSING_MAX
from gcma_shm.broker.room import LOOK_MAX, AreaRoom, Part, Place, Wanted, delays
from tests.rooms import PAGE, made, offset_of, take

MANY_EXAMPLES = pytest.mark.timeout(600)  # seconds of a processor that may not be ours alone


# --- who may pass


def room_of(
    pages: int, guests: list[tuple[int, int]], base: int = 0, alignment: int = 1, share: int = SHARE_WHOLE
) -> AreaRoom:
    """An area of one part, the offset of whose first page is `base`; the plane is not asked here."""
    room = AreaRoom(None, Area("a", 1000, pages, LENT, share, alignment))  # type: ignore[arg-type] # on purpose
    room.parts.append(Part(0, 1000, pages, base))
    for first, count in guests:
        room.take(place_in(room, first, count))
    return room


def place_in(room: AreaRoom, first: int, pages: int) -> Place:
    return Place(room, room.parts[0], 1000 + first, pages)


def mask(first: int, pages: int) -> int:
    return ((1 << pages) - 1) << first


def by_brute_force(
    pages: int,
    guests: list[tuple[int, int]],
    base: int,
    waiting: Wanted,
    align: int,
    new: tuple[int, int],
    limit: int = 1 << 30,
) -> bool | None:
    """Whether there are guests that, once gone, let `waiting` in without the new guest and not with it. None: it fits now."""

    def fits(busy: int) -> bool:
        if busy.bit_count() + waiting.pages > limit:
            return False
        if waiting.offset is not None:
            starts = range(waiting.offset - base, waiting.offset - base + 1)
        else:
            starts = range(-base % align, pages, align)
        return any(
            start >= 0 and start + waiting.pages <= pages and not busy & mask(start, waiting.pages) for start in starts
        )

    masks = [mask(*guest) for guest in guests]
    if fits(sum(masks)):
        return None
    for gone in range(1 << len(masks)):
        busy = sum(one for n, one in enumerate(masks) if not gone >> n & 1)
        if fits(busy) and not fits(busy | mask(*new)):
            return True
    return False


@st.composite
def lines(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], int, int, int, int, int | None, tuple[int, int]]:
    """A part, its guests, and a free range for a new one; and who waits."""
    runs = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=6))
    guests: list[tuple[int, int]] = []
    at = 0
    for gap, count in runs:
        if at + gap + count <= 14:
            guests.append((at + gap, count))
            at += gap + count
    pages = draw(st.integers(max(at, 1), 14))
    base = draw(st.integers(0, 5))
    free = [
        (first, count)
        for first in range(pages)
        for count in range(1, pages - first + 1)
        if not any(mask(first, count) & mask(*guest) for guest in guests)
    ]
    new = draw(st.sampled_from(free)) if free else (0, 0)
    asked, own = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    offset = draw(st.none() | st.none() | st.integers(0, 20))
    return pages, guests, base, asked, own, draw(st.integers(1, pages)), offset, new


@MANY_EXAMPLES
@settings(max_examples=3000, deadline=None)
@given(lines())
def test_nobody_is_delayed_and_nobody_waits_for_nothing(
    line: tuple[int, list[tuple[int, int]], int, int, int, int, int | None, tuple[int, int]],
) -> None:
    """Exactly the places that some order of frees would make the first in line wait for are refused."""
    pages, guests, base, asked, own, size, offset, new = line
    if not new[1]:
        return
    room = room_of(pages, guests, base, own)
    waiting = Wanted((room,), size, offset, asked)
    truth = by_brute_force(pages, guests, base, waiting, max(asked, own), new)
    if truth is None or (offset is not None and not base <= offset <= base + pages - size):
        return  # it would be served, or never (refused before it waits)
    assert delays(waiting, place_in(room, *new)) == truth


@MANY_EXAMPLES
@settings(max_examples=1500, deadline=None)
@given(lines(), st.integers(20, 99))
def test_nobody_is_delayed_where_guests_have_a_share(
    line: tuple[int, list[tuple[int, int]], int, int, int, int, int | None, tuple[int, int]], share: int
) -> None:
    pages, guests, base, asked, own, size, offset, new = line
    room = room_of(pages, guests, base, own, share)
    if 0 < new[1] <= room.allowance:
        waiting = Wanted((room,), size, offset, asked)
        if by_brute_force(pages, guests, base, waiting, max(asked, own), new, room.limit):
            assert delays(waiting, place_in(room, *new))


def every_line(pages: int) -> Iterator[list[tuple[int, int]]]:
    """Every way in which guests can lie in a part."""

    def behind(at: int) -> Iterator[list[tuple[int, int]]]:
        if at == pages:
            yield []
            return
        yield from behind(at + 1)
        for count in range(1, pages - at + 1):
            yield from ([(at, count), *rest] for rest in behind(at + count))

    return behind(0)


@pytest.mark.parametrize(("base", "align"), [(0, 1), (0, 2), (1, 2), (3, 4)])
def test_every_small_case(base: int, align: int) -> None:
    answers = {True: 0, False: 0}
    for pages in range(1, 7):
        for guests in every_line(pages):
            room = room_of(pages, guests, base)
            busy = sum(mask(*guest) for guest in guests)
            for first, count in ((f, c) for f in range(pages) for c in range(1, pages - f + 1)):
                if busy & mask(first, count):
                    continue
                for size in range(1, pages + 1):
                    waiting = Wanted((room,), size, None, align)
                    truth = by_brute_force(pages, guests, base, waiting, align, (first, count))
                    if truth is not None:
                        assert delays(waiting, place_in(room, first, count)) == truth
                        answers[truth] += 1
    assert min(answers.values()) > 100, "both answers occur"


def test_who_may_pass_in_a_row_of_guests() -> None:
    """The cases of which the docstring of `delays` speaks."""
    room = room_of(10, [(0, 4)])  # 6 free behind one guest
    waiting = Wanted((room,), 8)
    assert not delays(waiting, place_in(room, 8, 2)), "once the guest has gone, 8 are free all the same"
    assert delays(waiting, place_in(room, 7, 2))
    assert delays(waiting, place_in(room, 4, 1))
    room = room_of(10, [(0, 2), (5, 2)])
    waiting = Wanted((room,), 6)  # for the second to go
    for first, delayed in ((2, False), (3, False), (4, True), (7, True), (8, False), (9, False)):
        assert delays(waiting, place_in(room, first, 1)) == delayed, first
    assert delays(Wanted((room,), 5), place_in(room, 2, 1)), "with the first gone, 0 to 4 would have been free"
    room = room_of(10, [(0, 2), (4, 2), (8, 2)])
    assert not delays(Wanted((room,), 11), place_in(room, 2, 2)), "it never fits here, whoever goes"
    assert delays(Wanted((room,), 10), place_in(room, 2, 1)), "all of it"
    assert delays(Wanted((room,), 3, 3), place_in(room, 3, 1)), "exactly there"
    assert not delays(Wanted((room,), 3, 3), place_in(room, 2, 1))
    assert not delays(Wanted((room,), 3, 3), place_in(room, 6, 2))


def test_elsewhere_nobody_is_in_the_way() -> None:
    room, other = room_of(10, [(0, 4)]), room_of(10, [(0, 4)])
    assert not delays(Wanted((other,), 8), place_in(room, 4, 6))
    assert delays(Wanted((other, room), 8), place_in(room, 4, 6))
    room.parts.append(Part(1, 2000, 10, 10))
    assert not delays(Wanted((room,), 12), Place(room, room.parts[1], 2000, 3)), "larger than any part"
    assert delays(Wanted((room,), 9), Place(room, room.parts[1], 2003, 3))
    assert not delays(Wanted((room,), 2, 3), Place(room, room.parts[1], 2003, 3)), "an offset in the first part"
    assert delays(Wanted((room,), 2, 13), Place(room, room.parts[1], 2003, 3))


def test_in_an_area_with_a_share_who_could_use_it_up_does_not_pass() -> None:
    room = room_of(10, [(0, 4)], share=50)
    assert delays(Wanted((room,), 4), place_in(room, 8, 1)), "one page of the share is left, and four are waited for"
    room = room_of(20, [(0, 4)], share=80)  # 12 more
    assert not delays(Wanted((room,), 10), place_in(room, 18, 2))
    assert delays(Wanted((room,), 10), place_in(room, 17, 3))
    assert delays(Wanted((room,), 10), place_in(room, 9, 2)), "the share would do, the place would not"


def test_more_guests_than_one_looks_at_let_nobody_pass() -> None:
    """A bound on the time that a look takes; where few are looked at, it does not matter how many there are."""
    many = 2 * LOOK_MAX
    room = room_of(2 * many + 10, [(2 * n, 1) for n in range(many)])
    end = 2 * many
    assert delays(Wanted((room,), 2 * LOOK_MAX + 100), place_in(room, end + 9, 1)), "perhaps not, but who knows"
    assert not delays(Wanted((room,), 12), place_in(room, end + 9, 1))
    assert delays(Wanted((room,), 12), place_in(room, end, 1))


@pytest.mark.parametrize(("guests", "delayed"), [(LOOK_MAX - 1, False), (LOOK_MAX, True)])
def test_so_many_guests_are_looked_at(guests: int, delayed: bool) -> None:
    room = room_of(guests + 10, [(n, 1) for n in range(guests)])
    waiting = Wanted((room,), guests + 9, None, 1 << 10)  # from the first page on, or nowhere
    assert delays(waiting, place_in(room, guests + 9, 1)) == delayed


def test_the_place_of_who_passes() -> None:
    """`find_passing` passes over places that delay, and takes the next that does not."""
    areas, _ = made({"a": 40 * PAGE, "b": 80 * PAGE})
    take(areas, "a", 0, 1)
    take(areas, "b", 0, 40)
    front = Wanted(areas.of(None), 70)
    assert areas.find(front) is None
    assert offset_of(areas, None, 10) == ("a", 1)
    for pages, found in ((10, "a"), (39, "a"), (40, None), (10, "a")):
        place = areas.find_passing(Wanted(areas.of(None), pages), front)
        assert (None if place is None else place.area.name) == found


def test_of_the_ends_of_a_range_the_one_that_lets_who_passes_by() -> None:
    areas, _ = made({"a": 40 * PAGE, "b": 80 * PAGE})
    take(areas, "b", 0, 30)
    take(areas, "b", 75, 5)
    front = Wanted(areas.of("b"), 60)
    place = areas.find_passing(Wanted(areas.of("b"), 10), front)
    assert place is not None
    assert place.offset == 65, "with the first guest gone, 0 to 64 are left for 60"
    assert areas.find_passing(Wanted(areas.of("b"), 16), front) is None


def test_who_passes_may_have_the_very_end_of_an_area() -> None:
    """Which is taken last by whoever passes nobody: there the cache is."""
    areas, _ = made({"a": AreaSpec(80 * PAGE, align=4 * PAGE)})
    take(areas, "a", 0, 40)
    front = Wanted(areas.of("a"), 60)
    assert offset_of(areas, "a", 5) == ("a", 40)
    for pages, offset in ((4, 76), (5, 72), (20, 60)):
        place = areas.find_passing(Wanted(areas.of("a"), pages), front)
        assert place is not None
        assert place.offset == offset
    assert areas.find_passing(Wanted(areas.of("a"), 21), front) is None
    assert [place.offset for place in areas.of("a")[0].places(Wanted(areas.of("a"), 5))] == [40]


def test_so_many_places_are_tried_for_who_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Place] = []

    def delayed(_front: Wanted, place: Place) -> bool:
        tried.append(place)
        return True

    monkeypatch.setattr(areas_module, "delays", delayed)
    areas, _ = made({"a": 40 * PAGE, "b": 80 * PAGE})
    for name, pages in (("a", 40), ("b", 80)):
        for offset in range(0, pages - 4, 8):
            take(areas, name, offset, 4)
    wanted = Wanted(areas.of(None), 2)
    assert areas.find_passing(wanted, Wanted(areas.of(None), 50)) is None
    assert [place.area.name for place in tried] == ["a"] * PASSING_MAX + ["b"] * PASSING_MAX
    assert len({place.first for place in tried}) == 2 * PASSING_MAX


# --- what could ever be


def test_how_much_guests_may_have_together() -> None:
    areas, _ = made({"a": AreaSpec(41 * PAGE, share=50), "b": 80 * PAGE})
    a, b = areas.of(None)
    assert (a.limit, b.limit) == (20, 80)
    take(areas, "a", 0, 15)
    areas.drain("a")
    assert (a.limit, a.allowance) == (20, 0), "whoever is there, and whatever its state"
    areas.resize("a", 20)
    assert a.limit == 10


@st.composite
def parts(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int, int, int, int | None, int]:
    """First page and pages of each part; share, the area's alignment, and what is wanted: pages, offset, alignment."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    gaps = draw(st.lists(st.integers(0, 5), min_size=len(sizes), max_size=len(sizes)))
    placed, at = [], 1000
    for gap, size in zip(gaps, sizes, strict=True):
        placed.append((at + gap, size))
        at += gap + size
    own, asked = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4, 8]))
    offset = draw(st.none() | st.integers(0, 20))
    return placed, draw(st.integers(1, 100)), own, draw(st.integers(1, 12)), offset, asked


@MANY_EXAMPLES
@settings(max_examples=1500, deadline=None)
@given(parts())
def test_what_could_ever_be_is_what_an_empty_area_has_room_for(
    drawn: tuple[list[tuple[int, int]], int, int, int, int | None, int],
) -> None:
    placed, share, own, pages, offset, asked = drawn
    room = AreaRoom(None, Area("a", placed[0][0], placed[0][1], 0, share, own))  # type: ignore[arg-type] # no plane is asked
    for index, (first, count) in enumerate(placed):
        room.parts.append(Part(index, first, count, room.pages))
    wanted = Wanted((room,), pages, offset, asked)
    align = max(own, asked)
    truth = pages <= room.pages * share // 100 and any(
        part.base <= at and at + pages <= part.base + part.pages
        for part in room.parts
        for at in ([offset] if offset is not None else range(0, room.pages, align))
    )
    assert room.could_ever(wanted) == truth
    assert (next(room.places(wanted), None) is not None) == truth, "nobody is here"
    for part in room.parts:  # whoever comes
        free = next(iter(part.extents.ranges()))[0]
        room.take(Place(room, part, free, 1))
    assert room.could_ever(wanted) == truth
