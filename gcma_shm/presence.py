"""Who is there: a lock on a client's record in the arena's object, which the kernel takes away when its process ends.

A pidfd tells the same, and at once, but only of a process that one can see: not of one in another container's PID namespace, not
of a child that was killed before it could write who it is, and not of a client whose process has become another program.

The lock is an open-file-description lock (fcntl(2), F_OFD_SETLK) on the record's first byte. It belongs to the open file: it goes
with the last descriptor of that, and so with the process, and with exec, as descriptors are close-on-exec. Of the other kinds,
flock(2) locks a whole file and is the broker's own lock on the arena; a POSIX record lock goes when its process closes *any*
descriptor of the object, and a forked child has none.

That a forked child shares an open file is what makes this work across a fork: the parent opens the object anew and takes the
lock of the child's record *before* the fork, and closes that descriptor afterwards; the child closes its parent's. So from the
instant of the fork the lock of the child's record lives exactly as long as the child.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
import weakref

from gcma_shm.errors import ArenaError
from gcma_shm.layout import Geometry

TAKE_S = 5.0  # what the last owner of a record's lock may take to close it
NAP_S = 0.001
_FLOCK = struct.Struct("hhqqi0q")  # struct flock: type, whence, start, length, pid, in native alignment


class Presence:
    """One open file on an arena's object, with the locks that were taken through it. Safe across threads."""

    def __init__(self, fd: int, geometry: Geometry) -> None:
        """Owns `fd`, which must be open for writing and of an open file of its own."""
        self._fd = fd
        self._geometry = geometry
        self._close = weakref.finalize(self, os.close, fd)
        self._close.atexit = False  # the kernel does it, after whatever else happens at exit

    @classmethod
    def of(cls, fd: int, geometry: Geometry) -> Presence:
        """The object that `fd` leads to, through an open file of its own."""
        return cls(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC), geometry)

    def fileno(self) -> int:
        """The descriptor. Raises OSError after `close`: its number may be another file's."""
        if self._fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._fd

    def anew(self) -> Presence:
        """The same object through another open file, without the locks of this one."""
        return self.of(self.fileno(), self._geometry)

    def take(self, number: int) -> None:
        """Locks the record of client `number`. Raises ArenaError when another process has that lock, and keeps it."""
        deadline = time.monotonic() + TAKE_S
        while True:
            try:
                self.lock(self._geometry.client_at(number))
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ArenaError(f"the record of client {number} is locked by another process") from None
                time.sleep(NAP_S)
            else:
                return

    def lock(self, at: int) -> None:
        """Locks the byte at that offset of the arena. Raises BlockingIOError when another open file has it locked."""
        fcntl.fcntl(self.fileno(), fcntl.F_OFD_SETLK, _wish(fcntl.F_WRLCK, at))

    def unlock(self, at: int) -> None:
        """Gives that lock back."""
        fcntl.fcntl(self.fileno(), fcntl.F_OFD_SETLK, _wish(fcntl.F_UNLCK, at))

    def is_held(self, number: int) -> bool:
        """Whether another open file than this one has the lock of that record."""
        found = fcntl.fcntl(self.fileno(), fcntl.F_OFD_GETLK, _wish(fcntl.F_WRLCK, self._geometry.client_at(number)))
        return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)

    def close(self) -> None:
        """Gives the locks up, unless a forked child shares the open file; a second time has no effect."""
        self._fd = -1
        self._close()


def _wish(kind: int, at: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, at, 1, 0)
