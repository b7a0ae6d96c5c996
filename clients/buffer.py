"""Contiguous buffers in a worker's hands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gcma_shm._core import Span
from gcma_shm.clients.handles import Handle, Reference, load_buffer
from gcma_shm.errors import StaleHandle

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from gcma_shm.clients.allocator import Allocator
    from gcma_shm.clients.member import Member


class Held:
    """What a buffer is, however its client asks the broker."""

    def __init__(
        self,
        span: Span,
        place: Mapping[str, Any],
        client: Member,
        number: int,
        free: Callable[[], Any],
        claim: int = 0,
    ) -> None:
        self._span = span
        self._client = client
        self._number = number
        self._claim = claim  # the generation of the reservation's claim that it is; 0: an allocation of its own
        self._free = free
        self._freed = False
        span.held = (number, claim)
        #: Bytes, whole pages.
        self.nbytes: int = span.nbytes
        #: The area's name.
        self.area: str = place["area"]
        #: Pages from the area's start.
        self.offset: int = place["offset"]
        #: The name that it was made with, or None.
        self.name: str | None = place.get("name")

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

    @property
    def reference(self) -> Reference:
        """What a handle that holds nothing says. Raises StaleHandle after `free`."""
        self._living()
        return Reference(self._client.endpoint, self._client.arena_id, self._number, self._claim)

    @property
    def freed(self) -> bool:
        """Whether `free` was called, or the client closed."""
        return self._freed or self._span.sealed or self._client.closed

    def __reduce__(self) -> tuple[object, ...]:
        return load_buffer, (self.reference,)

    @property
    def exports(self) -> int:
        """How many views and arrays of the memory are alive."""
        return self._span.exports

    def _living(self) -> Span:
        if self.freed:
            raise StaleHandle("this buffer was freed")
        return self._span

    def _end(self) -> bool:
        """No view can be made any more; False: it had ended before. Raises BufferError while there is one."""
        if self.freed:
            return False
        if not self._span.seal():
            raise BufferError(
                f"buffer of {self.nbytes} bytes in {self.area!r} cannot be freed: {self._span.exports} views or arrays of "
                "it are alive; release() or del them first"
            )
        self._freed = True
        return True

    def __repr__(self) -> str:
        state = "freed" if self.freed else f"{self.nbytes} bytes at page {self.offset}"
        return f"<buffer {f'{self.name!r} ' if self.name else ''}in {self.area!r}: {state}>"


class Buffer(Held):
    """A contiguous range of an arena, this client's until `free`.

    Safe across threads. A forked child holds it too, from the instant of the fork, and frees its own hold. A buffer
    that nothing refers to any more, neither this object nor a view or array of it, is given back. Pickled and loaded in
    another process of the arena it is a Buffer over the same memory, which that process holds as well.
    """

    _client: Allocator

    def free(self) -> None:
        """Gives the memory back; a second time has no effect. Raises BufferError while a view or array of it is
        alive.
        """
        if self._end():
            self._free()

    def hand_over(self, timeout: float = 60) -> Handle:
        """A handle that holds the memory until a process has attached with it, or for `timeout` seconds: this one may free its
        buffer, or end, meanwhile. Pickle it to another process of the arena; loading it there gives a Buffer.

        (A pickled Buffer is a handle that holds nothing: its maker has to keep the buffer until it is loaded.) Raises StaleHandle
        after `free`, QuotaExceeded, BrokerUnavailable, ValueError.
        """
        self._living()
        return self._client._hand_over(self._number, self._claim, timeout)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.free()
