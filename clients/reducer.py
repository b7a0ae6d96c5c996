"""multiprocessing's queues, pipes and pools carry Buffers, and arrays on Buffers, as handles.

`register()` once, before anything is sent, in each process that sends. What is received lies on the very memory, and holds it; on its way a
handle holds it, so that its sender may drop it at once. Arrays that lie anywhere else are pickled as ever.
"""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

from gcma_shm._core import address_of
from gcma_shm.clients.buffer import Buffer
from gcma_shm.clients.handles import Reference, clients, load_buffer
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


def _locate(address: int, nbytes: int) -> tuple[Reference, int] | None:
    """A handle of the buffer in which this memory lies, and where; None: in none."""
    for client in list(clients):
        located = None if client.closed or not nbytes else client.locate(address, nbytes)
        if located is not None:
            reference, start = located
            return client.hand_over(reference, _timeout, _after_end).reference, start
    return None


def _reduce_view(view: memoryview) -> tuple[Any, ...]:
    located = _locate(address_of(view), view.nbytes) if view.c_contiguous else None
    if located is None:
        return view.__reduce_ex__(4)  # type: ignore[return-value] # raises: elsewhere they cannot be pickled
    return _load_view, (*located, view.nbytes, view.format, view.shape, view.readonly)


def _load_view(
    reference: Reference, start: int, nbytes: int, kind: str, shape: tuple[int, ...], readonly: bool
) -> memoryview:
    view: memoryview = load_buffer(reference).view[start : start + nbytes].cast(kind, shape)  # type: ignore[call-overload] # any kind
    return view.toreadonly() if readonly else view


def _reduce_array(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    """For pickle: a handle, and how the array lies on it; or what it always was."""
    begin, end = _bounds(array)
    located = _locate(begin, end - begin) if array.size else None
    if located is None:
        return array.__reduce_ex__(4)  # type: ignore[return-value] # as multiprocessing does
    reference, at = located
    start = at + array.__array_interface__["data"][0] - begin
    return load_array, (reference, start, array.dtype, array.shape, array.strides, array.flags.writeable)


def _bounds(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """The addresses of the first byte of an array, and of the one behind its last; strides may be negative."""
    begin = end = array.__array_interface__["data"][0]
    for count, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            begin += (count - 1) * stride
        else:
            end += (count - 1) * stride
    return begin, end + array.itemsize


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
