"""The tree of processes that this one is part of: a program, and what it started by multiprocessing.

Owns the answer to one question: which process is the root, at whose end the program is over. It is this one, unless multiprocessing (or
something on top of it) started it; then it is known by inheritance: over a fork by memory, else by what multiprocessing gives its
children of each process's own settings (its authkey, say), which no program that is started by `subprocess` has part in: that one is a
root of its own, also when its children alone ask. `$GCMA_ROOT` tells it to a child that has not been given them yet, as it imports its
main module still.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from dataclasses import dataclass
from typing import Any

from gcma_shm.process import start_time

ROOT = "GCMA_ROOT"  # "pid:start", set by this module alone, in the environment and in multiprocessing's settings


@dataclass(frozen=True)
class Process:
    """`start`: in clock ticks from boot."""

    pid: int
    start: int

    @property
    def lives(self) -> bool:
        """Whether it is there. To ask the kernel costs as much as a request, so this process does not ask about itself."""
        return self == _self or start_time(self.pid) == self.start


def root() -> Process:
    """The root of this process's tree; when that cannot be told, or is over, the parent or this process itself."""
    global _root  # noqa: PLW0603 - one a process, inherited over a fork
    if _root is None or not _root.lives:
        _root = _inherited()
        _tell_children(_root)
    return _root


def _inherited() -> Process:
    parent = multiprocessing.parent_process()
    told: tuple[Process | None, ...] = ()
    if parent is not None:
        told = (_named(_settings().get(ROOT, "")), _process(parent.pid or 0))
    elif _is_started_by_multiprocessing():
        told = (_named(os.environ.get(ROOT, "")),)
    for found in told:
        if found is not None and found.lives:
            return found
    return _this()


def _settings() -> dict[str, Any]:
    """Of this process as multiprocessing knows it; each child starts with a copy of its parent's."""
    return getattr(multiprocessing.current_process(), "_config", {})


def _tell_children(root: Process) -> None:
    _settings()[ROOT] = os.environ[ROOT] = f"{root.pid}:{root.start}"


def _this() -> Process:
    global _self  # noqa: PLW0603 - one a process
    if _self is None:
        _self = Process(os.getpid(), start_time(os.getpid()) or 0)
    return _self


def _process(pid: int) -> Process | None:
    start = start_time(pid)
    return None if start is None else Process(pid, start)


def _named(text: str) -> Process | None:
    pid, separator, start = text.partition(":")
    return Process(int(pid), int(start)) if separator and pid.isdecimal() and start.isdecimal() else None


def _is_started_by_multiprocessing() -> bool:
    """While a child imports its main module it knows no parent yet; the command line of its interpreter tells, and so does
    multiprocessing's own mark for that time, which libraries on top of it set as well.
    """
    words = " ".join(sys.orig_argv)
    return (
        multiprocessing.parent_process() is not None
        or "--multiprocessing-fork" in words
        or "multiprocessing.forkserver" in words
        or bool(getattr(multiprocessing.current_process(), "_inheriting", False))
    )


def _after_fork_in_child() -> None:
    global _self  # noqa: PLW0603 - it is another process
    _self = None


os.register_at_fork(after_in_child=_after_fork_in_child)
_self: Process | None = None  # this one, if it was asked for

# A root says so when it is imported: a forkserver that is started later has it for all of its children.
_root: Process | None = None
if not _is_started_by_multiprocessing():
    _root = _this()
    _tell_children(_root)
