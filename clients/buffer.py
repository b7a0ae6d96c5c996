"""Contiguous buffers in a worker's hands."""

from __future__ import annotations

import math
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
        self, span: Span, area: str, offset: int, free: Callable[[], None], is_freed: Callable[[], bool]
    ) -> None:
        self._span = span
        self._free = free
        self._is_freed = is_freed
        #: Bytes, whole pages.
        self.nbytes: int = span.nbytes
        #: The area's name.
        self.area = area
        #: Pages from the area's start.
        self.offset = offset

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
        of_type = np.dtype(dtype)
        dimensions = (shape,) if isinstance(shape, int) else tuple(shape)
        wanted = math.prod(dimensions) * of_type.itemsize
        if not 0 <= wanted <= self.nbytes:
            raise ValueError(
                f"an array of {wanted} bytes, shape {dimensions} of {of_type}: the buffer has {self.nbytes}"
            )
        # frombuffer keeps the memoryview, and with it the export; ndarray(buffer=…) would keep the memory, but not be
        # counted.
        return np.frombuffer(self.view, np.uint8)[:wanted].view(of_type).reshape(dimensions)

    def free(self) -> None:
        """Gives the memory back; a second time has no effect. Raises BufferError while a view or array of it is
        alive.
        """
        if self.freed:
            return
        if self._span.exports:
            raise BufferError(
                f"buffer of {self.nbytes} bytes in {self.area!r} cannot be freed: {self._span.exports} views or arrays of "
                "it are alive; release() or del them first"
            )
        self._free()

    @property
    def freed(self) -> bool:
        """Whether `free` was called, or the client closed."""
        return self._is_freed()

    @property
    def exports(self) -> int:
        """How many views and arrays of the memory are alive."""
        return self._span.exports

    def _living(self) -> Span:
        if self.freed:
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
