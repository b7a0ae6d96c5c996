"""Where in an arena this process's memory lies, whichever of its clients holds that, and the way of it to others.

A process may have several clients of one arena: its parent's, which it was forked with, its own, and one of asyncio. It owns nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from gcma_shm.clients.handles import Reference, async_clients, clients, load_buffer
from gcma_shm.errors import ArenaError, BrokerUnavailable, Closed, GcmaError, StaleHandle

if TYPE_CHECKING:
    import numpy as np

    from gcma_shm.clients.member import Member

HOLD_S = 86400.0  # what a worker gives away waits so long for its receiver, stopped or busy, while that worker lives
AFTER_END_S = 60.0  # ... and so long when it was killed

#: Raised where memory is asked for: the broker, or its arena, or the client, has gone, or lets this process not in.
GONE = (BrokerUnavailable, ArenaError, Closed, StaleHandle)


class Place(NamedTuple):
    """Memory on a buffer, `start` bytes from that buffer's own, and the client that holds it."""

    client: Member
    reference: Reference
    start: int

    def hand_over(self, timeout: float, after_end: float) -> Reference:
        """As the function of that name."""
        return hand_over(self.client, self.reference, timeout, after_end)


def hand_over(holder: Member, reference: Reference, timeout: float, after_end: float) -> Reference:
    """A handle's, of what `holder` holds meanwhile. Blocks. Raises QuotaExceeded, BrokerUnavailable."""
    for client in clients:
        if client is holder:
            return client.hand_over(reference, timeout, after_end).reference
    # One of asyncio's, whose requests are its loop's: this process's client that blocks holds it as well, for this moment.
    with load_buffer(reference) as buffer:
        return buffer.hand_over(timeout, after_end).reference


def give_up(handles: Iterable[Reference]) -> None:
    """Nobody will come for these any more. Those that somebody has come for stay his."""
    for handle in handles:
        with contextlib.suppress(GcmaError):
            load_buffer(handle).free()


def locate(address: int, nbytes: int) -> Place | None:
    """The place of this memory; None: not all of it lies in one buffer, or there is none of it."""
    for client in (*clients, *async_clients) if nbytes else ():
        located = None if client.closed else client.locate(address, nbytes)
        if located is not None:
            return Place(client, *located)
    return None


def locate_array(array: np.ndarray[Any, Any]) -> Place | None:
    """The place of an array's first element; None: not all that its strides reach lies in one buffer."""
    begin, end = _bounds(array)
    place = locate(begin, end - begin) if array.size else None
    if place is None:
        return None
    return Place(place.client, place.reference, place.start + array.__array_interface__["data"][0] - begin)


def _bounds(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """The addresses of the first byte of an array, and of the one behind its last; strides may be negative."""
    begin = end = array.__array_interface__["data"][0]
    for count, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            begin += (count - 1) * stride
        else:
            end += (count - 1) * stride
    return begin, end + array.itemsize
