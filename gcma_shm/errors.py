"""The errors that gcma-shm raises.

`GcmaError` is the root. Each error also derives from the built-in that fits, so that ordinary handlers (`except
OSError`, `except MemoryError`, `except TimeoutError`) work without knowing this package.
"""

from __future__ import annotations

import os

__all__ = [
    "ArenaError",
    "ArenaExhausted",
    "BrokerUnavailable",
    "BufferExists",
    "Closed",
    "Forbidden",
    "GcmaError",
    "NoSuchArea",
    "NoSuchBuffer",
    "NoSuchType",
    "NurseryFull",
    "ProtocolError",
    "QuotaExceeded",
    "SlotBusy",
    "SpillCorrupt",
    "SpillError",
    "StaleHandle",
]


class GcmaError(Exception):
    """Root of all errors of this package.

    `done` counts the pages of a batch (`store_many`, `load_many`) that were served before the error; 0 for single
    operations.
    """

    done: int = 0


class ArenaError(GcmaError, OSError):
    """The arena cannot be created, found or trusted."""


class ArenaExhausted(GcmaError, MemoryError):
    """Buffers (never cache) leave no range this large.

    `requested` and `largest_free` are bytes; `holders` maps the number of each client that holds buffers where the
    request looked to the bytes that it holds.
    """

    def __init__(
        self, message: str, requested: int = 0, largest_free: int = 0, holders: dict[int, int] | None = None
    ) -> None:
        super().__init__(message)
        self.requested = requested
        self.largest_free = largest_free
        self.holders = holders or {}


class QuotaExceeded(GcmaError, MemoryError):
    """This client may not hold that much; or a table of the arena is full (clients, buffers, handles under way).

    `returning`: how many client records are about to be free, as those of clients that have just ended are.
    """

    def __init__(self, message: str, returning: int = 0) -> None:
        super().__init__(message)
        self.returning = returning


class NurseryFull(GcmaError, TimeoutError):
    """No page to store into became free within the bound; nothing has changed."""


class Closed(GcmaError, ValueError):
    """The client, type or broker of this object has ended."""


class Forbidden(GcmaError, PermissionError):
    """The key that this client has shown to the broker gives no right to this; or its right was taken away."""


class NoSuchType(GcmaError, LookupError):
    """No type of this number is declared."""


class NoSuchArea(GcmaError, LookupError):
    """The arena has no area of this name."""


class NoSuchBuffer(GcmaError, LookupError):
    """Nothing of this identity is held by this client, or nothing has this name."""


class BufferExists(GcmaError, FileExistsError):
    """There is a buffer or reservation of this name."""


class StaleHandle(GcmaError, ReferenceError):
    """A handle whose buffer is gone."""


class SlotBusy(GcmaError, TimeoutError):
    """The value is stored and visible, but another process has been writing this slot to the spill file for longer
    than the bound.
    """


class BrokerUnavailable(GcmaError, ConnectionError):
    """A request that needs the broker got no answer in time."""


class SpillError(GcmaError, OSError):
    """The spill file could not be written or read.

    `errno` is the system's. `stored` says whether the value is safe: True after a store whose page stays readable in
    the arena, pinned until the file takes it; False when nothing could be read.
    """

    def __init__(self, errno: int = 0, message: str = "", stored: bool = False) -> None:
        super().__init__(errno, message)
        self.stored = stored


class SpillCorrupt(SpillError):
    """The page read back is not the page that was written."""


class ProtocolError(GcmaError, ValueError):
    """A malformed or unsupported message."""


def in_words(error: BaseException) -> str:
    """What an error says to people, without the number that the system has for it."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else str(error.strerror)
