"""How joblib's batches and results are pickled: by loky, with their large arrays in the arena.

loky pickles with cloudpickle, and asks a reducer for each array, wherever in a batch it is. Ours answers with a place in the arena: of the
array itself where it lies on a Buffer, else of a copy. What it has no answer for goes as it always did: arrays mapped from a file by
the file's name, small ones, arrays of objects, and those that find no room, through the pipe.

A copy for the workers (`Given`) is one for all tasks of a Parallel call that are given the same memory. It lives until the call is over or
the original has gone, and as long as a task that it was packed for is under way. A copy of a result (`Returned`) is given away.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from joblib._memmapping_reducer import _get_backing_memmap, get_memmapping_reducers
from joblib.externals.loky.backend.reduction import dumps

from gcma_shm.clients.buffer import Buffer
from gcma_shm.clients.client import Client
from gcma_shm.clients.handles import Reference
from gcma_shm.clients.packers import RETRY_S
from gcma_shm.clients.places import AFTER_END_S, GONE, HOLD_S, give_up, locate_array
from gcma_shm.clients.reducer import load_array
from gcma_shm.errors import ArenaExhausted, BrokerUnavailable, QuotaExceeded

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Reduced = tuple[Any, ...]  # what a reducer returns: a function, and its arguments
T = TypeVar("T")
Refused = Callable[[str], None]  # told why a large array went through the pipe


class Room:
    """Room for copies in an arena. `client`: gives this process's client of it; it is called at the first need, and may raise."""

    def __init__(self, client: Callable[[], Client]) -> None:
        self._connect = client
        self._refusal = ""  # in words: the exception itself would keep what is in its frames
        self._ask_again_at = 0.0

    @functools.cached_property
    def client(self) -> Client:
        """Raises BrokerUnavailable, StaleHandle."""
        return self._connect()

    def alloc(self, nbytes: int) -> Buffer:
        """Raises ArenaExhausted, and what `ask` does."""
        return self.ask(lambda: self.client.alloc_contig(nbytes))

    def ask(self, request: Callable[[], T]) -> T:
        """What the broker answers. Raises QuotaExceeded; BrokerUnavailable when it, or its arena, has gone, or lets this process not in: at
        once, for a while after the first, or each array would wait.
        """
        if time.monotonic() < self._ask_again_at:
            raise BrokerUnavailable(self._refusal)
        try:
            return request()
        except GONE as error:
            self._refusal, self._ask_again_at = str(error), time.monotonic() + RETRY_S
            raise BrokerUnavailable(self._refusal) from None


@dataclass(frozen=True, eq=False)
class _Copy:
    """A copy of an array, from the buffer's first byte. `layout`: dtype, shape, strides."""

    buffer: Buffer
    layout: tuple[Any, ...]


@dataclass(frozen=True)
class _Placed:
    """What a reducer returns for an array in the arena, and what holds the memory until that was loaded."""

    reduced: Reduced
    keep: object = None


@dataclass(frozen=True)
class _Shared:
    """A copy that many tasks have, and who owns the original's memory."""

    owner: weakref.ref[Array]
    copy: _Copy


class _Arrays:
    """Pickles what may contain arrays. `max_nbytes`: an array larger than that is copied into `room`; None: none is."""

    def __init__(self, room: Room, max_nbytes: int | None, refused: Refused, usual: dict[type, Any]) -> None:
        self._room = room
        self._max_nbytes = max_nbytes
        self._refused = refused
        self._usual = usual  # by type (numpy's; none without numpy), what reduces the arrays that are not ours to carry

    def dumps(self, what: object) -> tuple[bytes, list[object]]:
        """The pickle, and what must be kept until it was loaded. Raises what pickling raises."""
        kept: list[object] = []
        reducers = {kind: functools.partial(self._reduce, usual, kept) for kind, usual in self._usual.items()}
        return bytes(dumps(what, reducers=reducers)), kept

    def _reduce(self, usual: Callable[[Array], Reduced], kept: list[object], array: Array) -> Reduced:
        placed = self._where_it_lies(array) or self._copied(array)
        if placed is None:
            return usual(array)
        kept.append(placed.keep)
        return placed.reduced

    def _where_it_lies(self, array: Array) -> _Placed | None:
        """For an array on a Buffer."""
        raise NotImplementedError

    def _copied(self, array: Array) -> _Placed | None:
        """For any other."""
        raise NotImplementedError

    def _is_large(self, array: Array) -> bool:
        return (
            self._max_nbytes is not None
            and array.nbytes > self._max_nbytes
            and not array.dtype.hasobject
            and not _is_mapped_from_file(array)
        )

    def _copy(self, array: Array) -> _Copy | None:
        """A copy, with the elements in the original's order if that is C's or Fortran's. None: there is no room for it."""
        import numpy as np

        try:
            buffer = self._room.alloc(array.nbytes)
        except (ArenaExhausted, QuotaExceeded, BrokerUnavailable) as error:
            self._refused(f"{array.nbytes} bytes: {error}")
            return None
        fortran = array.flags.f_contiguous and not array.flags.c_contiguous
        copy = buffer.numpy(array.size, array.dtype).reshape(array.shape, order="F" if fortran else "C")
        np.copyto(copy, array, casting="no")
        return _Copy(buffer, (copy.dtype, copy.shape, copy.strides))


class Given(_Arrays):
    """What the tasks of one Parallel call are given. Safe across threads.

    `mmap_mode`: "r": they may read the copy; "r+", "w+": write to it, and see what others write; "c", None: each has its own.
    """

    def __init__(self, room: Room, max_nbytes: int | None, mmap_mode: str | None, refused: Refused) -> None:
        # Told to copy nothing to files, joblib's own reducers still pass what is mapped from a file by its name.
        super().__init__(room, max_nbytes, refused, get_memmapping_reducers(max_nbytes=None)[0])
        self._mode = mmap_mode
        self._copied_bytes = 0
        # By where and how the original lies. The memory is its owner's: as long as that lives, nothing else comes to lie there.
        self._copies: dict[Hashable, _Shared] = {}
        self._lock = threading.Lock()

    def end(self) -> int:
        """The call is over: what was given may change, and would be copied anew. Returns how many bytes were copied."""
        with self._lock:
            copied, self._copied_bytes = self._copied_bytes, 0
            self._copies.clear()
            return copied

    def _where_it_lies(self, array: Array) -> _Placed | None:
        place = locate_array(array)
        if place is None:
            return None
        # One that its user did not build there to be shared, or may not write to himself, is as any other to the tasks, but for the copy.
        shared = array.flags.writeable and id(_owner(array)) not in _results
        if not shared and self._mode in ("r+", "w+"):
            return None
        load = load_array if shared or self._mode == "r" else load_own
        layout = (array.dtype, array.shape, array.strides)
        return _Placed((load, (place.reference, place.start, *layout, shared)), array)

    def _copied(self, array: Array) -> _Placed | None:
        copy = self._share(array) if self._is_large(array) else None
        if copy is None:
            return None
        load = load_own if self._mode in ("c", None) else load_array
        return _Placed((load, (copy.buffer.reference, 0, *copy.layout, self._mode != "r")), copy)

    def _share(self, array: Array) -> _Copy | None:
        place = (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype)
        owner = _owner(array)
        with self._lock:  # of threads that pack the same array at once one copies it
            known = self._copies.get(place)
            if known is not None and known.owner() is owner:
                return known.copy
            copy = self._copy(array)
            if copy is not None:
                self._copies[place] = _Shared(weakref.ref(owner, functools.partial(self._forget, place)), copy)
                self._copied_bytes += array.nbytes
            return copy

    def _forget(self, place: Hashable, owner: weakref.ref[Array]) -> None:
        """The original has gone. Called at any moment in any thread, so without the lock; should another array be copied from the same
        place just now, the worst that can come of it is that it is copied once more.
        """
        known = self._copies.get(place)
        if known is not None and known.owner is owner:
            self._copies.pop(place, None)


class Returned(_Arrays):
    """What a task returns."""

    def __init__(self, room: Room, max_nbytes: int | None, refused: Refused) -> None:
        super().__init__(room, max_nbytes, refused, get_memmapping_reducers(max_nbytes=None)[1])
        #: What was given away.
        self.handles: list[Reference] = []

    def dumps(self, what: object) -> tuple[bytes, list[object]]:
        """As for all; what is given away is nobody's when that fails."""
        try:
            return super().dumps(what)
        except BaseException:
            give_up(self.handles)
            raise

    def _where_it_lies(self, array: Array) -> _Placed | None:
        # What the worker may only read is others' as well, and a result is to be the caller's own.
        place = locate_array(array) if array.flags.writeable else None
        if place is None:
            return None
        load = load_result if id(_owner(array)) in _results else load_array
        layout = (array.dtype, array.shape, array.strides)
        try:
            handle = self._room.ask(lambda: place.hand_over(HOLD_S, AFTER_END_S))
        except (BrokerUnavailable, QuotaExceeded):
            return None  # a copy of it may be had, in the arena or else through the pipe
        self.handles.append(handle)
        return _Placed((load, (handle, place.start, *layout, True)))

    def _copied(self, array: Array) -> _Placed | None:
        copy = self._copy(array) if self._is_large(array) else None
        if copy is None:
            return None
        try:
            handle = self._room.ask(lambda: copy.buffer.hand_over(HOLD_S, AFTER_END_S)).reference
        except (BrokerUnavailable, QuotaExceeded) as error:
            self._refused(f"{array.nbytes} bytes: {error}")
            return None
        self.handles.append(handle)
        return _Placed((load_result, (handle, 0, *copy.layout, True)))


# Owners of the memory of results in this process: arrays that lie in the arena without their users' knowing.
_results: weakref.WeakValueDictionary[int, Array] = weakref.WeakValueDictionary()


def load_result(*placed: Any) -> Array:
    """A result, the caller's own. Raises StaleHandle when it comes too late."""
    array = load_array(*placed)
    owner = _owner(array)
    _results[id(owner)] = owner
    return array


def load_own(*placed: Any) -> Array:
    """A copy, in the process's own memory. Raises StaleHandle."""
    return load_array(*placed).copy(order="K")


def _owner(array: Array) -> Array:
    """The array that lives as long as the memory does, or not longer; it may be the array itself."""
    import numpy as np

    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _is_mapped_from_file(array: Array) -> bool:
    """By numpy.memmap, or joblib.load(..., mmap_mode=...), it or what it is a part of."""
    import numpy as np

    return isinstance(_get_backing_memmap(array), np.memmap)
