"""Extents against a naive bitmap."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gcma_shm.broker.extents import LOOK_MAX, Extents

COUNT_MAX = 40
positions = st.integers(-3, COUNT_MAX + 8)
counts = st.integers(1, COUNT_MAX + 3)
alignments = st.sampled_from([1, 2, 3, 4, 8, 16])


class Bitmap:
    """`free[i]` says whether `first + i` is free."""

    def __init__(self, first: int, count: int, origin: int | None) -> None:
        self.first = first
        self.origin = first if origin is None else origin
        self.free = [True] * count

    def is_free(self, start: int, count: int) -> bool:
        at = start - self.first
        return at >= 0 and at + count <= len(self.free) and all(self.free[at : at + count])

    def is_taken(self, start: int, count: int) -> bool:
        at = start - self.first
        return at >= 0 and at + count <= len(self.free) and not any(self.free[at : at + count])

    def mark(self, start: int, count: int, free: bool) -> None:
        at = start - self.first
        self.free[at : at + count] = [free] * count

    def runs(self) -> list[tuple[int, int]]:
        """Maximal free runs as (length, start), the smallest first, of equal ones the lowest."""
        found, start = [], None
        for i, free in enumerate([*self.free, False]):
            if free and start is None:
                start = i
            if not free and start is not None:
                found.append((i - start, self.first + start))
                start = None
        return sorted(found)

    def fitting(self, count: int, align: int) -> list[tuple[int, int, int]]:
        """Each run that has room for `count`, best fit first: where the room begins, and the run."""
        found = []
        for size, start in self.runs():
            at = next(at for at in range(start, start + align) if (at - self.origin) % align == 0)
            if at + count <= start + size:
                found.append((at, start, size))
        return found


class AgainstBitmap(RuleBasedStateMachine):
    """Every method, in any order, does as the bitmap does or refuses and changes nothing."""

    @initialize(
        first=st.sampled_from([0, 1, 5, 1000]),
        count=st.integers(0, COUNT_MAX),
        before=st.none() | st.integers(0, 20),
    )
    def begin(self, first: int, count: int, before: int | None) -> None:
        """`before`: how far below the first the origin is; the later parts of an area count from its start."""
        origin = None if before is None else first - before
        self.extents = Extents(first, count, origin)
        self.bitmap = Bitmap(first, count, origin)

    def _at(self, start: int) -> int:
        return self.bitmap.first + start

    @rule(start=positions, count=counts)
    def take(self, start: int, count: int) -> None:
        if self.bitmap.is_free(self._at(start), count):
            self.extents.take(self._at(start), count)
            self.bitmap.mark(self._at(start), count, False)
        else:
            with pytest.raises(ValueError):
                self.extents.take(self._at(start), count)

    @rule(start=positions, count=counts)
    def give(self, start: int, count: int) -> None:
        if self.bitmap.is_taken(self._at(start), count):
            self.extents.give(self._at(start), count)
            self.bitmap.mark(self._at(start), count, True)
        else:
            with pytest.raises(ValueError):
                self.extents.give(self._at(start), count)

    @rule(count=counts, align=alignments)
    def choose(self, count: int, align: int) -> None:
        fits = self.bitmap.fitting(count, align)
        assert list(self.extents.fitting(count, align)) == fits, "all that has room, best fit first"
        assert self.extents.choose(count, align) == (fits[0][0] if fits else None)

    @rule(count=st.integers(1, 12), align=alignments)
    def choose_and_take(self, count: int, align: int) -> None:
        at = self.extents.choose(count, align)
        if at is not None:
            self.extents.take(at, count)
            self.bitmap.mark(at, count, False)

    @rule(count=st.integers(1, 10))
    def grow(self, count: int) -> None:
        if len(self.bitmap.free) + count <= 2 * COUNT_MAX:
            self.extents.grow(count)
            self.bitmap.free += [True] * count

    @rule(count=st.integers(-1, 2 * COUNT_MAX + 1))
    def cut(self, count: int) -> None:
        end = self._at(len(self.bitmap.free))
        if count > 0 and self.bitmap.is_free(end - count, count):
            self.extents.cut(count)
            del self.bitmap.free[-count:]
        else:
            with pytest.raises(ValueError):
                self.extents.cut(count)

    @rule(start=positions, count=st.integers(-2, 0))
    def nothing_is_no_range(self, start: int, count: int) -> None:
        with pytest.raises(ValueError):
            self.extents.take(self._at(start), count)
        with pytest.raises(ValueError):
            self.extents.give(self._at(start), count)

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "extents"):
            return
        extents, bitmap = self.extents, self.bitmap
        extents._check()
        runs = bitmap.runs()
        end = self._at(len(bitmap.free))
        assert (extents.first, extents.count, extents.free) == (bitmap.first, len(bitmap.free), sum(bitmap.free))
        assert extents.ranges() == sorted((start, size) for size, start in runs)
        assert extents.largest == (runs[-1][0] if runs else 0)
        assert extents.free_at_end == next((size for size, start in runs if start + size == end), 0)
        for at in range(bitmap.first - 2, end + 3):
            length = next((start + size - at for size, start in runs if start <= at < start + size), 0)
            assert extents.run_at(at) == length
            for count in (1, 3):
                assert extents.is_free(at, count) == bitmap.is_free(at, count)


TestAgainstBitmap = AgainstBitmap.TestCase


@st.composite
def fragmented(draw: st.DrawFn) -> tuple[Extents, Bitmap]:
    """More free ranges than are looked at, most of them about as small as each other."""
    first, before = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5 * LOOK_MAX))
    sizes[draw(st.integers(0, len(sizes) - 1))] = draw(st.integers(1, 40))
    gaps = draw(st.lists(st.integers(1, 5), min_size=len(sizes), max_size=len(sizes)))
    count = sum(sizes) + sum(gaps)
    extents, bitmap = Extents(first, count, first - before), Bitmap(first, count, first - before)
    at = first
    for size, gap in zip(sizes, gaps, strict=True):
        extents.take(at + size, gap)
        bitmap.mark(at + size, gap, False)
        at += size + gap
    return extents, bitmap


@settings(max_examples=400, deadline=None)
@given(made=fragmented(), count=st.integers(1, 12), align=st.sampled_from([1, 2, 4, 8, 16]))
def test_a_place_is_found_whenever_there_is_one(made: tuple[Extents, Bitmap], count: int, align: int) -> None:
    """Beyond LOOK_MAX ranges the order may give way, so that the first answer is quick; what fits never does."""
    extents, bitmap = made
    extents._check()
    fits = bitmap.fitting(count, align)
    found = list(extents.fitting(count, align))
    assert sorted(found) == sorted(fits)
    assert (extents.choose(count, align) is None) == (not fits)
    for at, start, size in found:
        assert start <= at
        assert at + count <= start + size
        assert (at - extents.origin) % align == 0
    large = count + align - 1
    tight = [run for run in bitmap.runs() if count <= run[0] < large]
    if len(tight) <= LOOK_MAX or extents.largest < large:
        assert found == fits, "best fit first"
    else:
        looked = {start for _, start in tight[:LOOK_MAX]}
        surely = [fit for fit in fits if fit[2] >= large]
        early, late = (
            [fit for fit in fits if fit[2] < large and (fit[1] in looked) is is_looked] for is_looked in (True, False)
        )
        assert found == early + surely + late


@pytest.mark.parametrize("align", [2, 64, 512])
def test_the_only_aligned_place_among_many_that_are_not(align: int) -> None:
    """Each of the ranges before it is as large, and begins one behind a multiple of `align`."""
    many = 4 * LOOK_MAX
    extents = Extents(0, many * align)
    for n in range(many):
        extents.take(n * align + (align - 1 if n == many - 1 else 0), 1)
        extents._check()
    extents.take((many - 1) * align - 1, 1)  # else the last range would begin there
    assert extents.choose(align - 1, align) == (many - 1) * align
    assert extents.choose(1, align) == (many - 1) * align
    assert extents.choose(align, align) is None


@given(st.permutations(range(12)))
def test_given_back_in_any_order_it_is_one_range_again(order: list[int]) -> None:
    extents = Extents(100, 36)
    for i in range(12):
        extents.take(100 + 3 * i, 3)
    assert extents.free == extents.largest == 0
    for i in order:
        extents.give(100 + 3 * i, 3)
        extents._check()
    assert extents.largest == 36
    assert extents.choose(36) == 100


def test_best_fit_spares_the_large_range() -> None:
    extents = Extents(0, 100)
    extents.take(10, 1)
    extents.take(30, 1)
    assert extents.choose(9) == 0, "the smallest of 10, 19 and 69"
    assert extents.choose(11) == 11
    assert extents.choose(20) == 31
    assert extents.choose(70) is None


def test_alignment_counts_from_the_origin() -> None:
    extents = Extents(100, 20, origin=93)
    assert extents.choose(4, 8) == 101
    assert extents.choose(12, 8) == 101
    assert extents.choose(20, 8) is None
    extents.take(100, 2)
    assert extents.choose(4, 8) == 109
    extents.grow(8)
    assert list(extents.fitting(19, 8)) == [(109, 102, 26)]
