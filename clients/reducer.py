"""multiprocessing's queues, pipes and pools carry Buffers, and arrays on Buffers, as handles.

`register()` once, before anything is sent, in each process that sends. What is received lies on the very memory, and holds it; on its way a
handle holds it, so that its sender may drop it at once. Arrays that lie anywhere else are pickled as ever.
"""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

from gcma_shm._core import address_of
from gcma_shm.clients.buffer import Buffer
from gcma_shm.clients.handles import Reference, load_buffer
from gcma_shm.clients.places import Place, locate, locate_array
from gcma_shm.sizes import check_seconds

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

TIMEOUT_S = 3600.0
AFTER_END_S = 600.0

array_kinds: list[type] = []  # of which this module reduces what lies in the arena
_timeout, _after_end = TIMEOUT_S, AFTER_END_S


def register(timeout: float = TIMEOUT_S, after_end: float = AFTER_END_S) -> None:
    """Makes multiprocessing send Buffers, and, where numpy is installed, arrays on them, as handles, in this process.

    What is sent and not received holds its memory for `timeout` seconds, and for no more than `after_end` seconds after this process has
    ended; whoever receives it later gets StaleHandle. Called again it changes these.
    """
    global _timeout, _after_end
    _timeout, _after_end = check_seconds("timeout", timeout), check_seconds("after_end", after_end)
    ForkingPickler.register(Buffer, _reduce_buffer)
    ForkingPickler.register(memoryview, _reduce_view)
    try:
        import numpy as np
    except ImportError:
        return
    ForkingPickler.register(np.ndarray, _reduce_array)
    array_kinds[:] = [np.ndarray]


def _reduce_buffer(buffer: Buffer) -> tuple[Any, ...]:
    return buffer.hand_over(_timeout, _after_end).__reduce__()


def _given(place: Place) -> tuple[Reference, int]:
    return place.hand_over(_timeout, _after_end), place.start


def _reduce_view(view: memoryview) -> tuple[Any, ...]:
    place = locate(address_of(view), view.nbytes) if view.c_contiguous else None
    if place is None:
        return view.__reduce_ex__(4)  # type: ignore[return-value] # raises: elsewhere they cannot be pickled
    return _load_view, (*_given(place), view.nbytes, view.format, view.shape, view.readonly)


def _load_view(
    reference: Reference, start: int, nbytes: int, kind: str, shape: tuple[int, ...], readonly: bool
) -> memoryview:
    view: memoryview = load_buffer(reference).view[start : start + nbytes].cast(kind, shape)  # type: ignore[call-overload] # any kind
    return view.toreadonly() if readonly else view


def _reduce_array(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    """For pickle: a handle, and how the array lies on it; or what it always was."""
    place = locate_array(array)
    if place is None:
        return array.__reduce_ex__(4)  # type: ignore[return-value] # as multiprocessing does
    return load_array, (*_given(place), array.dtype, array.shape, array.strides, array.flags.writeable)


def load_array(
    reference: Reference,
    start: int,
    dtype: npt.DTypeLike,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    writeable: bool,
) -> np.ndarray[Any, Any]:
    """An array over a handle's memory, which it keeps. Raises StaleHandle when it comes too late."""
    import numpy as np

    memory = np.frombuffer(load_buffer(reference).view, np.uint8)
    array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, buffer=memory, offset=start, strides=strides)
    array.flags.writeable = writeable
    return array
