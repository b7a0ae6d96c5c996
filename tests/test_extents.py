"""Extents against a naive bitmap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gcma_shm.broker.extents import Extents

COUNT_MAX = 40
positions = st.integers(-3, COUNT_MAX + 8)
counts = st.integers(1, COUNT_MAX + 3)


class AgainstBitmap(RuleBasedStateMachine):
    """`free[i]` says whether `first + i` is free."""

    @initialize(first=st.sampled_from([0, 1, 5, 1000]), count=st.integers(0, COUNT_MAX))
    def begin(self, first: int, count: int) -> None:
        self.first = first
        self.extents = Extents(first, count)
        self.free = [True] * count

    def _is_free(self, start: int, count: int) -> bool:
        return start >= 0 and start + count <= len(self.free) and all(self.free[start : start + count])

    def _runs(self) -> list[tuple[int, int]]:
        """Maximal free runs as (length, start)."""
        runs, start = [], None
        for i, free in enumerate([*self.free, False]):
            if free and start is None:
                start = i
            if not free and start is not None:
                runs.append((i - start, start))
                start = None
        return runs

    @rule(start=positions, count=counts)
    def take(self, start: int, count: int) -> None:
        if self._is_free(start, count):
            self.extents.take(self.first + start, count)
            self.free[start : start + count] = [False] * count
        else:
            with pytest.raises(ValueError):
                self.extents.take(self.first + start, count)

    @rule(start=positions, count=counts)
    def give(self, start: int, count: int) -> None:
        if start >= 0 and start + count <= len(self.free) and not any(self.free[start : start + count]):
            self.extents.give(self.first + start, count)
            self.free[start : start + count] = [True] * count
        else:
            with pytest.raises(ValueError):
                self.extents.give(self.first + start, count)

    @rule(count=counts, align=st.sampled_from([1, 2, 3, 4, 8, 16]))
    def choose(self, count: int, align: int) -> None:
        fits = []
        for length, start in self._runs():
            at = -(-start // align) * align
            if at + count <= start + length:
                fits.append((length, start, at))
        chosen = self.extents.choose(count, align)
        assert chosen == (self.first + min(fits)[2] if fits else None)

    @rule(count=counts, align=st.sampled_from([1, 4]))
    def choose_and_take(self, count: int, align: int) -> None:
        at = self.extents.choose(count, align)
        if at is not None:
            self.extents.take(at, count)
            self.free[at - self.first : at - self.first + count] = [False] * count

    @rule(start=positions, count=st.integers(-2, 0))
    def nothing_is_no_range(self, start: int, count: int) -> None:
        with pytest.raises(ValueError):
            self.extents.take(self.first + start, count)
        with pytest.raises(ValueError):
            self.extents.give(self.first + start, count)

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "extents"):
            return
        self.extents._check()
        assert self.extents.free == sum(self.free)
        assert self.extents.largest == max((length for length, _ in self._runs()), default=0)
        for start in range(-1, len(self.free) + 1):
            for count in (1, 3):
                assert self.extents.is_free(self.first + start, count) == self._is_free(start, count)


TestAgainstBitmap = AgainstBitmap.TestCase


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
