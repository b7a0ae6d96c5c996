"""Contiguous buffers in a worker's hands."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gcma_shm._core import Span
from gcma_shm.errors import StaleHandle

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Buffer:
    """A contiguous range of an arena, this client's until `free`.

    Safe across threads. A forked child holds it too, from the instant of the fork, and frees its own hold. A buffer
    that nothing refers to any more, neither this object nor a view or array of it, is given back.
    """

    def __init__(
        self,
        span: Span,
        number: int,
        area: str,
        offset: int,
        free: Callable[[int], None],
        give_up: Callable[[int], None],
    ) -> None:
        self._span: Span | None = span
        self._free = free
        self.number = number
        #: Bytes, whole pages.
        self.nbytes: int = span.nbytes
        #: The area's name.
        self.area = area
        #: Pages from the area's start.
        self.offset = offset
        # On the memory's exporter, not on this object: a view or array that outlives the Buffer keeps the memory.
        self._finalizer = weakref.finalize(span, give_up, number)
        self._finalizer.atexit = False  # the broker sees the process end

    @property
    def view(self) -> memoryview:
        """A new writable memoryview of all bytes. Raises StaleHandle after `free`."""
        return memoryview(self._living())

    def numpy(self, shape: int | Sequence[int], dtype: npt.DTypeLike = "uint8") -> np.ndarray[Any, Any]:
        """A writable array over the same memory, from its first byte; it keeps the memory. Needs numpy.

        Raises ValueError when the buffer is too small for it, StaleHandle after `free`.
        """
        try:
            import numpy as np
        except ImportError:
            raise ImportError("Buffer.numpy needs numpy: pip install 'gcma-shm[numpy]'") from None
        return np.ndarray(shape, dtype, buffer=memoryview(self._living()))

    def free(self) -> None:
        """Gives the memory back; a second time has no effect. Raises BufferError while a view or array of it is
        alive.
        """
        if self._span is None:
            return
        if self._span.exports:
            raise BufferError(
                f"buffer of {self.nbytes} bytes in {self.area!r} cannot be freed: {self._span.exports} views or arrays of it are alive; "
                "release() or del them first"
            )
        span, self._span = self._span, None
        try:
            self._free(self.number)
        except BaseException:
            self._span = span
            raise
        self._finalizer.detach()

    @property
    def freed(self) -> bool:
        """Whether `free` was called, or the client closed."""
        return self._span is None

    @property
    def exports(self) -> int:
        """How many views and arrays of the memory are alive."""
        return self._span.exports if self._span is not None else 0

    def _forget(self) -> None:
        """The client is closed, and all of its memory given back at once."""
        self._span = None
        self._finalizer.detach()

    def _living(self) -> Span:
        if self._span is None:
            raise StaleHandle("this buffer was freed")
        return self._span

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.free()

    def __repr__(self) -> str:
        state = "freed" if self.freed else f"{self.nbytes} bytes at page {self.offset}"
        return f"<buffer in {self.area!r}: {state}>"
