"""`multiprocessing.shared_memory` over named buffers of an arena: the import is changed, and nothing else.

Owns what the standard library's classes are made of here. A segment is a buffer that has been cleared, given its name, and *kept* by
the broker in one step: until `unlink`, or, with `track` (the default), until the root of this process's tree (tree.py) has ended,
however it ends. `close`, or the end of a process, ends that process's hold; the memory is free after the last one. Nothing here needs
a resource tracker, and nothing is done or said at exit.

Segments are in the arena of `default_client()`, or of the client of `using(client)`; one that was pickled finds its own.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import partial
from multiprocessing import managers
from multiprocessing import shared_memory as _stdlib
from typing import TYPE_CHECKING, Any, TypeVar

from gcma_shm.clients.allocator import Allocator
from gcma_shm.clients.buffer import Buffer
from gcma_shm.clients.default import default_client
from gcma_shm.clients.handles import client_of
from gcma_shm.clients.tree import root
from gcma_shm.errors import ArenaExhausted, BufferExists, Closed, GcmaError, NoSuchBuffer, QuotaExceeded, StaleHandle
from gcma_shm.layout import NAME_BYTES

if TYPE_CHECKING:
    from multiprocessing.shared_memory import ShareableList as _StdlibList

    _SHM_NAME_PREFIX: str
    _USE_POSIX: bool

    def _make_filename() -> str: ...
    def _dispatch(connection: Any, ident: None, method: str, arguments: tuple[Any, ...]) -> Any: ...

    class _StdlibTracker:
        shared_memory_context_name: str
        segment_names: list[str]

        def __init__(self, name: str, segment_names: list[str]) -> None: ...

else:
    from multiprocessing.managers import _SharedMemoryTracker as _StdlibTracker
    from multiprocessing.managers import dispatch as _dispatch
    from multiprocessing.shared_memory import _SHM_NAME_PREFIX, _USE_POSIX, _make_filename  # noqa: F401 - code that looks for these

    # A copy of the module for this one's own use: its list makes its segments by the name `SharedMemory`, which is given to it below.
    _copy = importlib.util.module_from_spec(importlib.util.find_spec("multiprocessing.shared_memory"))
    _copy.__spec__.loader.exec_module(_copy)
    _StdlibList = _copy.ShareableList

__all__ = ["ShareableList", "SharedMemory", "SharedMemoryManager", "buffer_name", "using"]

NAME_MAX = 255  # bytes of a name, the leading slash not counted: as of a POSIX shared-memory object on Linux
HASHED = "shm#"  # what the buffer's name begins with where a segment's own cannot be one

_Item = TypeVar("_Item", int, float, bool, str, bytes, None)
_client: ContextVar[Allocator | None] = ContextVar("gcma_shm.clients.shared_memory", default=None)


@contextlib.contextmanager
def using(client: Allocator) -> Iterator[None]:
    """Segments, lists and managers that are made in this block, by this thread, are in the arena of `client`, which must map it."""
    token = _client.set(client)
    try:
        yield
    finally:
        _client.reset(token)


def buffer_name(name: str) -> str:
    """What the buffer of a segment is called, in `client.attach`, `client.names()` and `gcma holders`: the segment's name without the
    leading slash; or, if that has more than 48 bytes, characters that are not printable, or begins with `shm#`, then `shm#` and its
    BLAKE2b hash of 20 bytes in hexadecimal.

    Raises what the standard library does: ValueError for a null character, OSError (EINVAL) for what no segment can be called.
    """
    if "\0" in name:
        raise ValueError("embedded null character")
    bare = name.lstrip("/")
    encoded = bare.encode()
    if bare in ("", ".", "..") or "/" in bare or len(encoded) > NAME_MAX:
        raise _error(errno.EINVAL, name)
    if len(encoded) <= NAME_BYTES and bare.isprintable() and not bare.startswith(HASHED):
        return bare
    return HASHED + hashlib.blake2b(encoded, digest_size=20).hexdigest()


class SharedMemory(_stdlib.SharedMemory):
    """A segment, made or attached to as the standard library's is, with the same errors. `size` is what was asked for, rounded up to
    pages. Safe across threads as that one is; a forked child has it too, and closes its own.

    `track`, on every Python: whether it goes with the root of this process's tree, if nobody has unlinked it. False: it stays until it
    is unlinked or the arena ends. Attaching to a segment never decides when it goes.

    Raises FileExistsError, FileNotFoundError, ValueError; OSError with ENOSPC when the arena has no room for it, with EDQUOT when this
    process, or its tree, may not hold more; BrokerUnavailable, which is an OSError too.
    """

    _name: str | None
    _buf: memoryview | None
    _flags: int
    _prepend_leading_slash: bool
    _client: Allocator
    _buffer: Buffer | None = None

    def __init__(self, name: str | None = None, create: bool = False, size: int = 0, *, track: bool = True) -> None:
        if not size >= 0:
            raise ValueError("'size' must be a positive integer")
        if create:
            self._flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
            if size == 0:
                raise ValueError("'size' must be a positive number different from zero")
        if name is None and not self._flags & os.O_EXCL:
            raise ValueError("'name' can only be None if create=True")
        self._track = track
        self._client = _client.get() or default_client()
        if name is None:
            while self._buffer is None:
                name = _make_filename()
                with contextlib.suppress(FileExistsError):
                    self._buffer = self._create(name, size)
        else:
            name = "/" + name if self._prepend_leading_slash else name
            self._buffer = self._open(name, size)
        assert self._buffer is not None
        # Of the memory itself, and not `view`: what refers to that as its base, np.ndarray(shape, dtype, buffer=segment.buf), keeps the
        # memory and does not stand in the way of `close`, as it does not in the standard library.
        self._name, self._size, self._buf = name, self._buffer.nbytes, memoryview(self._buffer._living())

    def _open(self, name: str, size: int) -> Buffer:
        """As the flags say."""
        try:
            found = self._attach(name)
        except FileNotFoundError:
            if not self._flags & os.O_CREAT:
                raise
            if not self._flags & os.O_EXCL:
                raise ValueError("cannot mmap an empty file") from None
            return self._create(name, size)
        if self._flags & os.O_CREAT and self._flags & os.O_EXCL:
            found.free()
            raise _error(errno.EEXIST, name)
        return found

    def _attach(self, name: str) -> Buffer:
        try:
            return self._client.attach(buffer_name(name))
        except NoSuchBuffer as error:
            raise _error(errno.ENOENT, name) from error
        except QuotaExceeded as error:
            raise _error(errno.EDQUOT, name, error) from error

    def _create(self, name: str, size: int) -> Buffer:
        called = buffer_name(name)
        try:
            buffer = self._client.alloc_contig(size, zero=True)
            try:
                # Cleared before it has its name: nobody attaches to what is not.
                until = root() if self._track else None
                self._client._keep(buffer._number, called, (until.pid, until.start) if until is not None else None)
            except BaseException:
                # Refused; or interrupted (Ctrl-C), and it may have been done: nobody knows of the segment who could unlink it.
                with contextlib.suppress(GcmaError):
                    self._client._unkeep(buffer._number, called)
                buffer.free()
                raise
        except BufferExists as error:
            raise _error(errno.EEXIST, name) from error
        except ArenaExhausted as error:
            raise _error(errno.ENOSPC, name, error) from error
        except QuotaExceeded as error:
            raise _error(errno.EDQUOT, name, error) from error
        return buffer

    def close(self) -> None:
        """Ends this object's access to the segment, which stays. Raises BufferError while a view of it, or an array that has one
        (`np.frombuffer`, `np.asarray`), is alive. An `np.ndarray(shape, dtype, buffer=segment.buf)` has none: it may outlive this, and keeps
        the memory.
        """
        if self._buf is not None:
            self._buf.release()
            self._buf = None
        if self._buffer is not None:
            if self._buffer.exports:
                raise BufferError("cannot close exported pointers exist")
            # Nothing refers to it any more, and it is given back: the broker is told, and not waited for.
            self._buffer = None

    def unlink(self) -> None:
        """Takes the name off the segment. Whoever has it open goes on; the name may be used again at once, the memory when all of
        them have closed it or ended. Raises FileNotFoundError: it was unlinked before, or its arena has ended; BrokerUnavailable: it may
        have been done.
        """
        if self._name:
            try:
                self._client.unlink(buffer_name(self._name))
            except (NoSuchBuffer, Closed) as error:
                if isinstance(error, Closed) and self._client.closed:
                    raise
                raise _error(errno.ENOENT, self._name) from error  # or the arena has ended with all that was in it

    def __del__(self) -> None:
        """Nothing: the memory is given back when this object and the last view of it are gone, also where those are not dropped yet."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (partial(type(self), self.name, False, self.size), self._client.endpoint, self._client.arena_id)


class ShareableList(_StdlibList[_Item]):
    """The standard library's own list, on a segment of an arena."""

    shm: SharedMemory

    def __reduce__(self) -> tuple[Any, ...]:
        client = self.shm._client
        return _load, (partial(type(self), name=self.shm.name), client.endpoint, client.arena_id)


if not TYPE_CHECKING:
    _copy.SharedMemory = SharedMemory

# In the manager, these names are methods.
_Segment = SharedMemory
_List = ShareableList


class _Tracker(_StdlibTracker):
    """Of the segments of one manager, in its server's process."""

    def __init__(self, name: str, segment_names: list[str], client: Allocator) -> None:
        super().__init__(name, segment_names)
        self._client = client

    def destroy_segment(self, segment_name: str) -> None:
        """Unlinks a segment, unless somebody has."""
        self.segment_names.remove(segment_name)
        with contextlib.suppress(NoSuchBuffer):
            self._client.unlink(buffer_name(segment_name))


class _Server(managers.SharedMemoryServer):
    shared_memory_context: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        name = self.shared_memory_context.shared_memory_context_name
        self.shared_memory_context = _Tracker(name, [], _client.get() or default_client())


class SharedMemoryManager(managers.SharedMemoryManager):
    """The standard library's, whose segments are in the arena of `using(client)` or `default_client()`."""

    _Server = _Server
    _Client: Any
    _address: Any
    _authkey: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        managers.BaseManager.__init__(self, *args, **kwargs)  # the one in between starts a resource tracker
        self._client = _client.get() or default_client()

    def start(self, initializer: Callable[..., object] | None = None, initargs: Iterable[Any] = ()) -> None:
        """As BaseManager's; the server's process uses the same arena."""
        super().start(_begin, (self._client.endpoint, self._client.arena_id, initializer, initargs))

    def SharedMemory(self, size: int) -> _Segment:  # noqa: N802 - the standard library's name
        """A new segment that is unlinked when the manager shuts down."""
        with using(self._client):
            segment = _Segment(create=True, size=size)
        self._track(segment)
        return segment

    def ShareableList(self, sequence: Any) -> _List[Any]:  # noqa: N802 - the standard library's name
        """A new list that is unlinked when the manager shuts down."""
        with using(self._client):
            made: _List[Any] = _List(sequence)
        self._track(made.shm)
        return made

    def _track(self, segment: _Segment) -> None:
        try:
            with self._Client(self._address, authkey=self._authkey) as connection:
                _dispatch(connection, None, "track_segment", (segment.name,))
        except BaseException:
            segment.unlink()
            raise


def _begin(
    endpoint: str, arena_id: bytes, initializer: Callable[..., object] | None, initargs: tuple[Any, ...]
) -> None:
    """In a manager's server process, before it serves."""
    _client.set(client_of(endpoint, arena_id))
    if initializer is not None:
        initializer(*initargs)


def _load(make: Callable[[], Any], endpoint: str, arena_id: bytes) -> Any:
    """What was pickled, on the arena that it was in."""
    try:
        client = client_of(endpoint, arena_id)
    except StaleHandle as error:
        raise FileNotFoundError(errno.ENOENT, f"the arena of this segment has ended: {error}") from error
    with using(client):
        return make()


def _error(number: int, name: str, why: Exception | None = None) -> OSError:
    """Of the class that fits the number."""
    return OSError(number, os.strerror(number) + (f": {why}" if why is not None else ""), name)
