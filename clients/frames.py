"""Exceptions that outlive what they were raised in, without its memory.

A traceback refers to frames, these to their callers', and all of them to their variables: arrays in the arena, which would be held for as long as
somebody has the exception, be it a log, or a worker that keeps its last one until the next.
"""

from __future__ import annotations


def forget_frames(error: BaseException) -> None:
    """Takes the tracebacks off an exception, and off those that it came of or is a group of."""
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain:
        one = chain.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            chain += [one.__cause__, one.__context__]
            chain += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
