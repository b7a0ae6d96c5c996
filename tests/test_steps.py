"""The steps of a request as a client that blocks takes them: wherever Ctrl-C is heard, the steps hear of it."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from gcma_shm.clients.steps import Ask, Leave, Step, Steps, drive

LINES_MAX = 200  # of `drive` that one request goes through


class Waits:
    """A request that waits in line until its third look, and leaves the line when anything interrupts it there."""

    def __init__(self) -> None:
        self.is_in_line = False
        self.asked: list[str] = []

    def steps(self) -> Steps[int]:
        ticket: int = yield Ask("alloc_contig")
        try:
            for _ in range(3):
                got: int = yield Ask("collect")
        except BaseException:
            yield Leave(ticket)
            raise
        return got

    def do(self, step: Step) -> Any:
        if isinstance(step, Leave):
            self.is_in_line = False
            return None
        assert isinstance(step, Ask)
        self.asked.append(step.operation)
        self.is_in_line = 2 <= len(self.asked) < 4  # with a ticket that the steps have been told
        return 7


def interrupted(waits: Waits, at: int) -> bool:
    """Drives it, and interrupts `drive` itself once, before the line that it comes to as number `at` while it is in line; whether
    there were as many.
    """
    lines = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal lines
        if frame.f_code is not drive.__code__:
            return None
        if event == "line" and waits.is_in_line:
            lines += 1
            if lines == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        drive(waits.steps(), waits.do)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_steps_are_done_in_order() -> None:
    waits = Waits()
    assert drive(waits.steps(), waits.do) == 7
    assert waits.asked == ["alloc_contig", "collect", "collect", "collect"]


def test_an_error_of_the_steps_is_raised_and_not_told_to_them() -> None:
    def failing() -> Steps[None]:
        yield Ask("ping")
        raise ValueError("from the steps")

    with pytest.raises(ValueError, match="from the steps"):
        drive(failing(), lambda _: None)


def test_wherever_it_is_interrupted_the_line_is_left() -> None:
    """Also between a step and the next, where neither the steps nor what does them are at work."""
    places = 0
    for at in range(1, LINES_MAX):
        waits = Waits()
        if not interrupted(waits, at):
            break
        assert not waits.is_in_line, f"interrupted at place {at}"
        places += 1
    assert 2 <= places < LINES_MAX - 1
