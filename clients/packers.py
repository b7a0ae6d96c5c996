"""Packers make parcels: they find what is large in an object, and a place for it in the arena.

Large is what has `threshold` bytes or more: buffers that pickle's protocol 5 gives out of band (arrays of NumPy, Arrow, pandas; PickleBuffer),
bytes and bytearrays where `large_in` finds them, and the rest of the pickle, should it be large all the same (bytes deep inside, text, lists, arrays
with gaps). What lies in a buffer of the arena already is not copied. What finds no place stays in the pickle, and goes through the pipe; that is counted.
"""

from __future__ import annotations

import io
import itertools
import logging
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any, cast

from gcma_shm._core import address_of
from gcma_shm.clients.buffer import Buffer
from gcma_shm.clients.calls import Call, Told, told, without
from gcma_shm.clients.client import Client
from gcma_shm.clients.handles import Handle, Reference, load_buffer
from gcma_shm.clients.parcels import Blob, BlobPickler, Parcel, Pickler, Piece
from gcma_shm.clients.places import GONE, HOLD_S, Place, give_up, hand_over, locate
from gcma_shm.errors import ArenaExhausted, QuotaExceeded

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

ITEMS_MAX = 1000  # that are looked at for bytes: more take longer to look through than their copies
RETRY_S = 10.0  # the broker is not asked for so long after it gave no answer, or each buffer would wait for one

Placed = tuple[Piece, object]  # and what must be kept until it was opened


def large_in(value: Any, threshold: int) -> list[Any]:
    """The bytes, bytearrays and other contiguous memory of `threshold` bytes or more among `value` and what it holds, if that is a tuple,
    list or dict, or several in each other: in the first ITEMS_MAX that are met.
    """
    found = []
    items = [value]
    for item in items:  # while it grows
        kind, room = type(item), ITEMS_MAX - len(items)
        if kind is tuple or kind is list:
            items += item[:room]
        elif kind is dict:
            items += itertools.islice(item.values(), room)
        elif kind is bytes or kind is bytearray:
            if len(item) >= threshold:
                found.append(item)
        elif kind not in _SMALL and memory_of(item, threshold) is not None:
            found.append(item)
    return found


_SMALL = {type(None), bool, int, float, complex, str}


def memory_of(value: Any, least: int) -> tuple[int, int] | None:
    """The address and length of contiguous memory; None: it has less than `least` bytes, gaps, or is none to be seen."""
    try:
        with PickleBuffer(value).raw() as memory:
            return (address_of(memory), memory.nbytes) if memory.nbytes >= least else None
    except (TypeError, ValueError, BufferError):
        return None


def all_in_arena(args: Sequence[Any], arrays: Sequence[int], threshold: int) -> list[Told] | None:
    """Where these of the arguments lie, which are arrays of `plain.arrays_among`. None: one of them lies elsewhere, or has less than
    `threshold` bytes.
    """
    found = []
    for at in arrays:
        array = args[at]
        memory = memory_of(array, threshold)
        place = None if memory is None else locate(*memory)
        if place is None:
            return None
        found.append(_told_in(place, at, array))
    return found


def _told_in(place: Place, at: int, array: np.ndarray[Any, Any]) -> Told:
    """Built there, to be shared: who gets it may write as its maker may."""
    return told(at, array, place.reference, place.start, not array.flags.writeable)


class Packer(ABC):
    """Safe across threads. `client`: gives the client, when there is something to place."""

    def __init__(self, client: Callable[[], Client], threshold: int) -> None:
        self._client = client
        self._threshold = threshold
        #: How many large ones went through the pipe, for want of room.
        self.fallbacks = 0
        #: Bytes that were copied into the arena.
        self.copied = 0
        self._ask_again_at = 0.0
        self._refusal = ""  # in words: the exception itself would keep what is in its frames

    def pack(self, what: Any, large: Iterable[Any] = ()) -> tuple[Parcel, list[object]]:
        """The parcel, and what must be kept until it was opened. `large`: what is known to be large in it. Raises what pickling raises."""
        packing = _Packing(self, self._threshold, large)
        parcel = packing.pack(what)
        self.fell_back(parcel.in_pipe, self._refusal)
        return parcel, packing.kept

    def fell_back(self, count: int, why: str) -> None:
        """Counts what went through the pipe. The first is logged."""
        if count and not self.fallbacks:
            log.warning("large objects go through the pipe, for want of room in the arena: %s", why)
        self.fallbacks += count

    def place(self, given: PickleBuffer, alone: bool = False) -> Placed | None:
        """A place for large memory; None: there is none. `alone`: nobody else will have the same."""
        if time.monotonic() < self._ask_again_at:
            return None
        with given.raw() as memory:
            try:
                place = None if alone else locate(address_of(memory), memory.nbytes)
                if place is not None:
                    # Built there, to be shared: who gets it may write as its maker may.
                    return Piece(place.reference, place.start, memory.nbytes, memory.readonly, place.client), given
                return self._copy(self._client(), memory, None if alone else given)
            except (ArenaExhausted, QuotaExceeded) as error:
                self._refusal = str(error)
            except GONE as error:
                self._ask_later(error)
        return None

    def _ask_later(self, error: Exception) -> None:
        self._refusal = str(error)
        self._ask_again_at = time.monotonic() + RETRY_S

    def give(self, buffer: Buffer) -> Handle | Buffer:
        """What is pickled for a Buffer."""
        return buffer

    @abstractmethod
    def _copy(self, client: Client, memory: memoryview, original: PickleBuffer | None) -> Placed:
        """Places what lies elsewhere. `original`: of memory that other parcels may refer to as well."""

    def _make_copy(self, client: Client, memory: memoryview) -> Buffer:
        buffer = client.alloc_contig(memory.nbytes)
        with buffer.view as view:
            view[: memory.nbytes] = memory
        self.copied += memory.nbytes
        return buffer


class Copy:
    """Somebody's memory in the arena, as long as anything that refers to it is under way: from the first parcel that needs it."""

    def __init__(self) -> None:
        self.making = threading.Lock()
        self.buffer: Buffer | None = None
        self.original: PickleBuffer | None = None  # exported, so that nothing else comes to lie there


class Sharing(Packer):
    """For what its process keeps until it is done with, as a task's arguments: the same memory in several parcels is copied once, and
    all receivers may only read.
    """

    def __init__(self, client: Callable[[], Client], threshold: int) -> None:
        super().__init__(client, threshold)
        self._lock = threading.Lock()  # of the copies
        self._copies: weakref.WeakValueDictionary[tuple[int, int], Copy] = weakref.WeakValueDictionary()

    def expect(self, large: Iterable[Any]) -> list[Place | Copy]:
        """Where those of these lie that are large: a copy is there from the first parcel that needs it on, until this is dropped."""
        places = [place for value in large if (place := memory_of(value, self._threshold)) is not None]
        return [locate(*place) or self._copy_of(place) for place in places]

    def call(
        self, fn: Callable[..., Any], args: Sequence[Any], arrays: Sequence[int], expected: Sequence[Place | Copy]
    ) -> Call | None:
        """A task with large arrays, of which `expect` has told. None: one of them finds no place."""
        found = []
        for at, place in zip(arrays, expected, strict=True):
            array = args[at]
            if isinstance(place, Place):
                found.append(_told_in(place, at, array))
                continue
            if place.buffer is None:
                self.place(PickleBuffer(array))
            # There is no room; or another copy was made, as of an array that was resized since.
            if place.buffer is None:
                return None
            found.append(told(at, array, place.buffer.reference, 0, True))
        return Call(fn, without(args, arrays), found)

    def _copy_of(self, place: tuple[int, int]) -> Copy:
        with self._lock:
            return self._copies.setdefault(place, Copy())

    def _copy(self, client: Client, memory: memoryview, original: PickleBuffer | None) -> Placed:
        copy = Copy() if original is None else self._copy_of((address_of(memory), memory.nbytes))
        with copy.making:  # of threads that pack the same at once one copies it
            if copy.buffer is None:
                copy.buffer, copy.original = self._make_copy(client, memory), original
        return Piece(copy.buffer.reference, 0, memory.nbytes, True), copy


class Giving(Packer):
    """For what is given away, as a task's result: it holds itself until its receiver has it. `after_end`: and so many seconds after
    this process has ended.
    """

    def __init__(self, client: Callable[[], Client], threshold: int, after_end: float) -> None:
        super().__init__(client, threshold)
        self._after_end = after_end

    def pack(self, what: Any, large: Iterable[Any] = ()) -> tuple[Parcel, list[object]]:
        """As any packer; what is to be kept may be dropped at once."""
        parcel, kept = super().pack(what, large)
        given: dict[Reference, Reference] = {}
        try:
            # Only now: were it given away while the rest cannot be pickled, it would be nobody's.
            return parcel.by(lambda piece: self._give(piece, given)), kept
        except (*GONE, QuotaExceeded) as error:
            give_up(given.values())
            self._ask_later(error)
        return super().pack(what, large)

    def give(self, buffer: Buffer) -> Handle | Buffer:
        """A handle, or it would be gone with this process's own hold."""
        return buffer.hand_over(HOLD_S, self._after_end)

    def _give(self, piece: Piece, given: dict[Reference, Reference]) -> Reference:
        """`given`: what was, in this parcel. Of pieces of one allocation the first has the handle; with its piece the others are held."""
        if piece.reference in given:
            return piece.reference
        assert piece.holder is not None, "this process has made it"
        return given.setdefault(piece.reference, hand_over(piece.holder, piece.reference, HOLD_S, self._after_end))

    def _copy(self, client: Client, memory: memoryview, _original: PickleBuffer | None) -> Placed:
        buffer = self._make_copy(client, memory)
        return Piece(buffer.reference, 0, memory.nbytes, memory.readonly, client), buffer


class _Packing:
    """One parcel in the making."""

    def __init__(self, packer: Packer, threshold: int, large: Iterable[Any]) -> None:
        self._packer = packer
        self._threshold = threshold
        # Referred to, so that none of the numbers that go by their identity can be another's.
        self._large = {id(value): value for value in large if type(value) in (bytes, bytearray)}
        self._numbers: dict[int, int | None] = {}
        self._buffers: list[Piece] = []
        self._blobs: list[tuple[type[Blob], Piece]] = []
        self._given: list[Handle] = []
        self._refused = 0
        self.kept: list[object] = []

    def pack(self, what: Any) -> Parcel:
        stream = io.BytesIO()
        pickler = BlobPickler(stream, self._in_band, self._number_of) if self._large else Pickler(stream, self._in_band)
        cast(dict[type, Any], pickler.dispatch_table)[Buffer] = self._reduce_buffer
        try:
            pickler.dump(what)
        except BaseException:
            give_up(given.reference for given in self._given)
            raise
        data = stream.getvalue()
        refused = self._refused  # they are in the pickle now, which is large for that
        placed = self._place(PickleBuffer(data), alone=True) if len(data) >= self._threshold else None
        if placed is not None:
            return Parcel(placed, self._buffers, self._blobs, 0)
        return Parcel(data, self._buffers, self._blobs, refused or self._refused)

    def _in_band(self, given: PickleBuffer) -> bool:
        try:
            with given.raw() as memory:
                large = memory.nbytes >= self._threshold
        except BufferError:  # with gaps
            return True
        placed = self._place(given) if large else None
        if placed is None:
            return True
        self._buffers.append(placed)
        return False

    def _reduce_buffer(self, buffer: Buffer) -> tuple[Any, ...]:
        given = self._packer.give(buffer)
        if isinstance(given, Handle):
            self._given.append(given)
        return load_buffer, (given.reference,)

    def _number_of(self, value: object) -> int | None:
        key = id(value)
        if key not in self._large:
            return None
        if key not in self._numbers:
            blob: Blob = self._large[key]
            placed = self._place(PickleBuffer(blob))
            self._numbers[key] = None if placed is None else len(self._blobs)
            if placed is not None:
                self._blobs.append((type(blob), placed))
        return self._numbers[key]

    def _place(self, given: PickleBuffer, alone: bool = False) -> Piece | None:
        placed = self._packer.place(given, alone)
        if placed is None:
            self._refused += 1
            return None
        self.kept.append(placed[1])
        return placed[0]
