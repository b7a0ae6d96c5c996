"""Contiguous buffers in a worker's hands."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from gcma_shm._core import Exporter, Span
from gcma_shm.clients.handles import Handle, Reference, load_buffer
from gcma_shm.errors import StaleHandle
from gcma_shm.process import start_time

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from gcma_shm.clients.allocator import Allocator
    from gcma_shm.clients.member import Member

DLPACK_CPU = (1, 0)  # kDLCPU, its only device


class Held(Exporter):
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
        return memoryview(self)

    def numpy(self, shape: int | Sequence[int], dtype: npt.DTypeLike = "uint8") -> np.ndarray[Any, Any]:
        """A writable array over the same memory, from its first byte; it keeps the memory. Needs numpy.

        Raises ValueError when the buffer is too small for it, StaleHandle after `free`.
        """
        try:
            import numpy as np
        except ImportError:
            raise ImportError("Buffer.numpy needs numpy: pip install 'gcma-shm[numpy]'") from None
        of_type = np.dtype(dtype)
        dimensions: tuple[int, ...]
        try:
            dimensions = (operator.index(cast(int, shape)),)  # numpy's integers, too
        except TypeError:
            dimensions = tuple(cast(Sequence[int], shape))
        wanted = math.prod(dimensions) * of_type.itemsize
        if not 0 <= wanted <= self.nbytes:
            raise ValueError(
                f"an array of {wanted} bytes, shape {dimensions} of {of_type}: the buffer has {self.nbytes}"
            )
        return np.frombuffer(self.view, np.uint8)[:wanted].view(of_type).reshape(dimensions)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """All bytes. NumPy asks by the buffer protocol first; that of a freed buffer raises, which NumPy ignores, and it would make an
        array of one object, this buffer, if there were not this call, which raises again.
        """
        import numpy as np

        return np.array(self.numpy(self.nbytes), dtype, copy=copy)

    def __dlpack__(self, **options: Any) -> Any:
        """All bytes, for `from_dlpack` of NumPy, PyTorch, JAX. Raises StaleHandle after `free`."""
        return self.numpy(self.nbytes).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return DLPACK_CPU

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

    def _keeper(self, process: int | None) -> tuple[int, int] | None:
        """Who is to keep it: its number and when it started; None: nobody, until it is unlinked."""
        self._living()
        return None if process is None else (process, start_time(process) or 0)

    def __repr__(self) -> str:
        state = "freed" if self.freed else f"{self.nbytes} bytes at page {self.offset}"
        return f"<buffer {f'{self.name!r} ' if self.name else ''}in {self.area!r}: {state}>"


class Buffer(Held):
    """A contiguous range of an arena, this client's until `free`.

    It exports its memory, all of it as writable bytes: by the buffer protocol (`memoryview(buf)`, `np.asarray(buf)`,
    `pyarrow.py_buffer(buf)`) and, where numpy is installed, by DLPack (`torch.from_dlpack(buf)`). What lies on it keeps the memory,
    and `free` is refused meanwhile.

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

    def keep(self, name: str, process: int | None = None) -> None:
        """Gives it that name, unless it has it already, and has it kept: also when nobody holds it any more, it is there to be
        attached to, until `client.unlink(name)`. `process`: or until the process of that number has ended; until this one has, when
        that is over, or the broker does not see it (another container's).

        Raises BufferExists, StaleHandle after `free`, QuotaExceeded (what is kept until one process ends may be as much as a client
        may hold, and what is kept until it is unlinked as much as that together), ValueError, BrokerUnavailable.
        """
        self._client._keep(self._number, name, self._keeper(process))
        self.name = name

    def hand_over(self, timeout: float = 60, after_end: float | None = None) -> Handle:
        """A handle that holds the memory until a process has attached with it, or for `timeout` seconds, at most a day: this one may
        free its buffer, or end, meanwhile. `after_end`: and for no more than that many seconds after this process has ended,
        or its client closed. Pickle it to another process of the arena; loading it there gives a Buffer.

        (A pickled Buffer is a handle that holds nothing: its maker has to keep the buffer until it is loaded.) Raises StaleHandle
        after `free`, QuotaExceeded, BrokerUnavailable, ValueError.
        """
        self._living()
        return self._client._hand_over(self._number, self._claim, timeout, after_end)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.free()
