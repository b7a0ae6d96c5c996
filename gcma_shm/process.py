"""Who a process is: its number alone is used again by others, its number and start time together are not."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of process `pid` (proc(5), `stat` field 22); None when there is no such
    process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command in parentheses and may itself hold blanks and parentheses.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in b"ZX" else int(fields[19])


def pid_namespace() -> int:
    """What tells this process's PID namespace from others: the numbers of processes mean something within it alone."""
    return Path("/proc/self/ns/pid").stat().st_ino


def open_pidfd(pid: int, start: int) -> int | None:
    """A pidfd of the process that began at `start`; None when it is gone. The caller closes it; it polls readable when
    the process ends.

    Raises OSError when it cannot be told (out of descriptors, say): that is no reason to take a process for dead.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except (ProcessLookupError, OverflowError):
        return None
    except OSError as error:
        if error.errno == errno.EINVAL:  # no number that a process could have
            return None
        raise
    try:
        if start_time(pid) == start:  # looked at after the pidfd holds on to whoever has the number now
            return pidfd
    except BaseException:
        os.close(pidfd)
        raise
    os.close(pidfd)
    return None
