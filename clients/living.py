"""A set of what is alive: its members are collected as if they were in none."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Living(Generic[T]):
    """Objects by identity. Safe across threads: an iteration is over those of one moment, where a WeakSet's raises RuntimeError when
    another thread adds one meanwhile.
    """

    def __init__(self) -> None:
        self._by_identity: weakref.WeakValueDictionary[int, T] = weakref.WeakValueDictionary()

    def add(self, one: T) -> None:
        """A second time has no effect."""
        self._by_identity[id(one)] = one

    def discard(self, one: T) -> None:
        """Has no effect on what is not in it."""
        self._by_identity.pop(id(one), None)

    def __contains__(self, one: T) -> bool:
        return self._by_identity.get(id(one)) is one

    def __iter__(self) -> Iterator[T]:
        # One call of C: the values of a dict made a list.
        return iter([one for reference in self._by_identity.valuerefs() if (one := reference()) is not None])
