"""Objects on their way to another process of the arena: pickled, with what is large in them in the arena.

A parcel says where its pieces lie; opening it gives the object, on that very memory where its kind allows that. What makes parcels, and
holds the memory meanwhile, are packers.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, cast

from gcma_shm.clients import reducer
from gcma_shm.clients.calls import ViewOf
from gcma_shm.clients.handles import Reference, load_buffer
from gcma_shm.errors import GcmaError

if TYPE_CHECKING:
    from gcma_shm.clients.member import Member

PROTOCOL = 5  # of pickle: buffers out of band (PEP 574)

Blob = bytes | bytearray


@dataclass(frozen=True)
class Piece:
    """A part of one allocation. Its sender holds that, through `holder`, or a handle that the reference tells of does."""

    reference: Reference
    start: int
    nbytes: int
    readonly: bool
    holder: Member | None = None  # not in its pickle

    def open(self, view_of: ViewOf) -> memoryview:
        """The memory, which is held as long as the view, or anything on it. Raises what `view_of` raises."""
        view = view_of(self.reference)[self.start : self.start + self.nbytes]
        return view.toreadonly() if self.readonly else view

    def __reduce__(self) -> tuple[Any, ...]:
        # Plain values: of two dataclasses pickle makes and reads the names and a dict each, which takes ten times as long.
        to = self.reference
        return _piece, (
            to.endpoint, to.arena_id, to.number, to.claim, to.token, self.start, self.nbytes, self.readonly
        )  # fmt: skip


def _piece(
    endpoint: str, arena_id: bytes, number: int, claim: int, token: int, start: int, nbytes: int, readonly: bool
) -> Piece:
    return Piece(Reference(endpoint, arena_id, number, claim, token), start, nbytes, readonly)


def attached(reference: tuple[Any, ...]) -> memoryview:
    """What a reference stands for, held as long as the view. Raises StaleHandle, QuotaExceeded, BrokerUnavailable."""
    return load_buffer(Reference(*reference)).view


class Parcel:
    """A pickled object without what is large in it.

    `data`: the pickle, in the arena when it is large itself. `buffers`: what was given out of band, in order. `blobs`: bytes and
    bytearrays by the number that the pickle has for them. `in_pipe`: how many large ones found no place, and are in `data`.
    """

    def __init__(
        self, data: bytes | Piece, buffers: Sequence[Piece], blobs: Sequence[tuple[type[Blob], Piece]], in_pipe: int
    ) -> None:
        self._data = data
        self._buffers = buffers
        self._blobs = blobs
        self.in_pipe = in_pipe

    def by(self, way: Callable[[Piece], Reference]) -> Parcel:
        """The same, whose pieces are reached by other references; `way` is asked in the order in which they are opened."""

        def led(piece: Piece) -> Piece:
            return replace(piece, reference=way(piece))

        buffers = [led(piece) for piece in self._buffers]
        blobs = [(kind, led(piece)) for kind, piece in self._blobs]
        data = led(self._data) if isinstance(self._data, Piece) else self._data
        return Parcel(data, buffers, blobs, self.in_pipe)

    def _pieces(self) -> list[Piece]:
        pickled = [self._data] if isinstance(self._data, Piece) else []
        return [*self._buffers, *(piece for _, piece in self._blobs), *pickled]

    @property
    def references(self) -> set[tuple[Any, ...]]:
        """Of the memory that its pieces lie on: they, or tuples that equal them."""
        return {piece.reference for piece in self._pieces()}

    def open(self, view_of: ViewOf = attached) -> Any:
        """The object. Raises what unpickling it raises, StaleHandle when its sender has died, QuotaExceeded, BrokerUnavailable."""
        opened = _open_all(self._pieces(), view_of)
        data: bytes | memoryview = opened.pop() if isinstance(self._data, Piece) else self._data
        buffers, blobs = opened[: len(self._buffers)], opened[len(self._buffers) :]
        if blobs:
            return _BlobUnpickler(data, buffers, [kind for kind, _ in self._blobs], blobs).load()
        return pickle.loads(data, buffers=buffers)  # noqa: S301 - from a process of our own pool

    def __reduce__(self) -> tuple[Any, ...]:
        return Parcel, (self._data, self._buffers, self._blobs, self.in_pipe)


def _open_all(pieces: Sequence[Piece], view_of: ViewOf) -> list[memoryview]:
    """All of them are tried, should one fail: what a handle holds is free when somebody has come for it."""
    views: list[memoryview] = []
    failed: Exception | None = None
    for piece in pieces:
        try:
            views.append(piece.open(view_of))
        except GcmaError as error:
            failed = failed or error
    if failed is not None:
        views.clear()  # the exception has this frame, and the frame has the exception: they go late
        raise failed
    return views


class Pickler(pickle.Pickler):
    """As multiprocessing's, but for arrays, whose buffers are to be given out of band."""

    def __init__(self, stream: io.BytesIO, in_band: Callable[[pickle.PickleBuffer], bool]) -> None:
        super().__init__(stream, PROTOCOL, buffer_callback=in_band)
        # One table. ForkingPickler's own is a chain of two, whose look-ups are Python's.
        self.dispatch_table = {**copyreg.dispatch_table, **cast(Any, ForkingPickler)._extra_reducers}
        for kind in reducer.array_kinds:
            self.dispatch_table.pop(kind, None)


class BlobPickler(Pickler):
    """For what has large bytes in it. Apart from the other since it is slower: pickle calls it for each object."""

    def __init__(
        self,
        stream: io.BytesIO,
        in_band: Callable[[pickle.PickleBuffer], bool],
        number_of: Callable[[object], int | None],
    ) -> None:
        super().__init__(stream, in_band)
        self._number_of = number_of

    def persistent_id(self, value: object) -> int | None:
        """The number of a blob that is not in the pickle."""
        return self._number_of(value)


class _BlobUnpickler(pickle.Unpickler):
    def __init__(
        self, data: bytes | memoryview, buffers: list[memoryview], kinds: list[type[Blob]], blobs: list[memoryview]
    ) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self._kinds = kinds
        self._blobs = blobs
        self._opened: dict[int, Blob] = {}

    def persistent_load(self, number: int) -> Blob:
        if number not in self._opened:  # the same object wherever it is referred to
            self._opened[number] = self._kinds[number](self._blobs[number])
        return self._opened[number]
