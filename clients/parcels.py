"""Objects on their way to another process: pickled, with their large buffers in the arena.

Pickle's protocol 5 gives buffers out of band (PEP 574): arrays of NumPy, Arrow and pandas, PickleBuffer. One of `threshold` bytes or more is copied
once, into a contiguous buffer of the arena, and the other process's object lies on that very memory. What lies in a buffer of the arena
already is not copied at all. bytes and bytearrays travel so where they are arguments or results themselves; they are copied out again.

When the arena has no room, a buffer goes with the rest, through the pipe; that is counted.
"""

from __future__ import annotations

import io
import logging
import pickle
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

from gcma_shm._core import address_of
from gcma_shm.clients.buffer import Buffer
from gcma_shm.clients.client import Client
from gcma_shm.clients.handles import Reference, load_buffer
from gcma_shm.clients.reducer import reduce_array
from gcma_shm.errors import ArenaExhausted, QuotaExceeded

log = logging.getLogger(__name__)

PROTOCOL = 5
HAND_OVER_S = 60.0  # what is given away waits so long for its receiver to be taken up


@dataclass(frozen=True)
class Piece:
    """One buffer of a parcel: where in which allocation. Its sender holds that, or a handle that the reference tells of does."""

    reference: Reference
    start: int
    nbytes: int
    readonly: bool

    def open(self) -> memoryview:
        """The memory, which is held as long as the view, or anything on it."""
        view = load_buffer(self.reference).view[self.start : self.start + self.nbytes]
        return view.toreadonly() if self.readonly else view


@dataclass(frozen=True)
class Parcel:
    """A pickled object without its large buffers, and where those are."""

    data: bytes
    pieces: Sequence[Piece]

    def open(self) -> Any:
        """The object. Raises what unpickling it raises, and StaleHandle when its sender has died."""
        return pickle.loads(self.data, buffers=[piece.open() for piece in self.pieces])  # noqa: S301 - from our own pool


@dataclass(eq=False)
class Copy:
    """A copy of somebody's memory in the arena, as long as a parcel under way refers to it; and the original's export, so that nothing
    else comes to lie there.
    """

    buffer: Buffer
    original: pickle.PickleBuffer


class Packer:
    """Makes parcels. Safe across threads.

    `client`: gives the client, when there is a buffer to place. `shared`: parcels under way at the same time have one copy of the same
    memory, which is kept by the packer's process and which their receivers may only read. Otherwise each copy is given away:
    it holds itself until its receiver has it.
    """

    def __init__(self, client: Callable[[], Client], threshold: int, shared: bool) -> None:
        self._client = client
        self._threshold = threshold
        self._shared = shared
        #: Buffers that went through the pipe, for want of room.
        self.fallbacks = 0
        #: Bytes that were copied into the arena.
        self.copied = 0
        self._copies: weakref.WeakValueDictionary[tuple[int, int], Copy] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def pack(self, what: Any) -> tuple[Parcel, list[object]]:
        """The parcel, and what must be kept until it was opened. Raises what pickling raises."""
        pieces: list[Piece] = []
        kept: list[object] = []

        def in_band(given: pickle.PickleBuffer) -> bool:
            try:
                memory = given.raw()
            except BufferError:  # not contiguous
                return True
            with memory:
                placed = self._place(memory, given) if memory.nbytes >= self._threshold else None
            if placed is None:
                return True
            pieces.append(placed[0])
            kept.append(placed[1])
            return False

        stream = io.BytesIO()
        _Pickler(stream, PROTOCOL, True, in_band).dump(what)
        return Parcel(stream.getvalue(), pieces), kept

    def _place(self, memory: memoryview, given: pickle.PickleBuffer) -> tuple[Piece, object] | None:
        client = self._client()
        located = client.locate(address_of(memory), memory.nbytes)
        if located is not None:  # built there, to be shared: whoever gets it may write as its maker may
            reference, start = located
            if not self._shared:
                reference = client.hand_over(reference, HAND_OVER_S).reference
            return Piece(reference, start, memory.nbytes, memory.readonly), given
        if self._shared:
            return self._share(client, memory, given)
        buffer = self._copy(client, memory)
        if buffer is None:
            return None
        return Piece(buffer.hand_over(HAND_OVER_S).reference, 0, memory.nbytes, memory.readonly), buffer

    def _share(self, client: Client, memory: memoryview, given: pickle.PickleBuffer) -> tuple[Piece, object] | None:
        place = (address_of(memory), memory.nbytes)
        with self._lock:  # of threads that pack the same array at once one copies it
            copy = self._copies.get(place)
            if copy is None:
                buffer = self._copy(client, memory)
                if buffer is None:
                    return None
                copy = self._copies[place] = Copy(buffer, given)
        return Piece(copy.buffer.reference, 0, memory.nbytes, True), copy

    def _copy(self, client: Client, memory: memoryview) -> Buffer | None:
        try:
            buffer = client.alloc_contig(memory.nbytes)
        except (ArenaExhausted, QuotaExceeded) as error:
            if not self.fallbacks:
                log.warning("a buffer of %d bytes goes through the pipe, as others may: %s", memory.nbytes, error)
            self.fallbacks += 1
            return None
        with buffer.view as view:
            view[: memory.nbytes] = memory
        self.copied += memory.nbytes
        return buffer


class _Pickler(ForkingPickler):
    """As multiprocessing's, but for arrays, whose buffers are to be given out of band."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for kind in [kind for kind, how in self.dispatch_table.items() if how is reduce_array]:
            del self.dispatch_table[kind]


class Bytes:
    """bytes or a bytearray, pickled out of band; unpickled it is what it was, a copy."""

    def __init__(self, value: bytes | bytearray) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self._value), (pickle.PickleBuffer(self._value),)


def wrap(value: Any, threshold: int) -> Any:
    """`value`, or what stands for it in a pickle when it is a large bytes or bytearray."""
    return Bytes(value) if type(value) in (bytes, bytearray) and len(value) >= threshold else value
