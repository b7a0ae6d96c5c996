"""Exceptions that are kept, without what they were raised in."""

from __future__ import annotations

import weakref

from gcma_shm.clients.frames import forget_frames


class Large:
    pass


def fail(large: Large) -> None:
    try:
        raise KeyError(f"planted, {type(large).__name__}")
    except KeyError as error:
        raise LookupError("of that") from error


def caught(large: Large) -> Exception:
    try:
        fail(large)
    except LookupError as error:
        return error
    raise AssertionError


def test_nothing_is_kept_by_an_exception_nor_by_what_it_came_of() -> None:
    larges = [Large() for _ in range(3)]
    gone = [weakref.ref(large) for large in larges]
    first = caught(larges.pop())
    first.__context__ = caught(larges.pop())
    first.__context__.__context__ = first  # round and round
    group = ExceptionGroup("several", [first, ExceptionGroup("inner", [caught(larges.pop())])])
    assert all(one() is not None for one in gone)
    forget_frames(group)
    assert [one() for one in gone] == [None] * 3
    assert str(group.exceptions[0].__cause__) == "'planted, Large'"
