"""How much this process has grown: ZeroMQ bounds the frames that it takes, and how many messages it keeps, but not a message of endless
frames.
"""

from __future__ import annotations

import ctypes
import os

from gcma_shm import messages
from gcma_shm.broker.service import window_of

GROWTH_BYTES = 64 << 20  # whatever the clients do
# A session's pages under way, at most: the window, ZeroMQ's queues of twice and four times that, and one of each kind in the kernel.
# And batches, stored and loaded (what was not read counts, see `broker/window.py`).
WINDOWS_A_CLIENT = 8
_PAGE = os.sysconf("SC_PAGESIZE")
_STATM = os.open(
    "/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC
)  # once: there may be no descriptor left when it matters


def growth_max(page_size: int, sessions: int) -> int:
    """What a broker with so many sessions may have grown by, in bytes, before somebody abuses it. Not by the sessions that there might
    be: what one peer sends without end would be let grow to what all of them are for.
    """
    singles = WINDOWS_A_CLIENT * window_of(page_size) * page_size
    batches = 2 * messages.BATCHES * messages.batch_max(page_size) * page_size
    return GROWTH_BYTES + sessions * (singles + batches)


def private_bytes() -> int:
    """The memory of this process that is no file's and not shared: the arena does not count."""
    _size, resident, shared, *_ = map(int, os.pread(_STATM, 256, 0).split())
    return (resident - shared) * _PAGE


def give_back() -> None:
    """Memory that was freed goes back to the system, so that `private_bytes` tells what is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
