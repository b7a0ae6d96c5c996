"""Connections to the broker's socket: how many there may be, and which are ended when there are too many. Pure.

ZeroMQ accepts whoever comes, and ends its process when it has no descriptor left. So its monitor tells of every connection, and when
there are more than `connections_max`, those go first that no session is heard from, the oldest before the others: who comes and
introduces itself is safe, and a crowd that says nothing only drives itself out.
"""

from __future__ import annotations

from collections.abc import Callable


class Connections:
    """Those that are open and are to stay, by descriptor, in the order in which they came. `has_session(peer)` says whether messages from there
    belong to somebody.
    """

    def __init__(self, connections_max: int, has_session: Callable[[bytes], bool] = lambda _: False) -> None:
        self.connections_max = connections_max
        self.ended = 0  # how many were too many, for statistics
        self._has_session = has_session
        self._strange: dict[int, bytes | None] = {}  # the peer that sends there, if it has sent anything
        self._known: dict[int, bytes] = {}
        self._ending: dict[int, bytes | None] = {}  # told to end, and not closed yet

    def __len__(self) -> int:
        return len(self._strange) + len(self._known)

    def opened(self, fd: int) -> None:
        """A connection was accepted."""
        self.closed(fd)  # its end was not told: the descriptor is a new one's
        self._strange[fd] = None

    def closed(self, fd: int) -> bytes | None:
        """A connection has ended; the peer that it was, if it ever sent anything."""
        return self._known.pop(fd, None) or self._strange.pop(fd, None) or self._ending.pop(fd, None)

    def heard(self, fd: int, peer: bytes) -> None:
        """A message came by it, and was served."""
        if fd not in self._strange:
            return
        if self._has_session(peer):
            del self._strange[fd]
            self._known[fd] = peer
        else:
            self._strange[fd] = peer

    def too_many(self) -> list[int]:
        """Those to be ended now."""
        return self._end(len(self) - self.connections_max)

    def strangers(self) -> list[int]:
        """Those that no session is heard from, whatever their number, to be ended now."""
        return self._end(len(self))

    def all(self) -> list[int]:
        """Every one, to be ended now."""
        self._strange |= self._known
        self._known.clear()
        return self._end(len(self))

    def _end(self, count: int) -> list[int]:
        if count <= 0:
            return []
        if len(self._strange) < count:
            for fd, peer in list(self._known.items()):  # sessions that have ended since
                if not self._has_session(peer):
                    self._strange[fd] = self._known.pop(fd)
        chosen = list(self._strange)[:count]
        for fd in chosen:
            self._ending[fd] = self._strange.pop(fd)
        self.ended += len(chosen)
        return chosen

    def _check(self) -> None:
        """Raises AssertionError when an invariant is broken."""
        assert len({*self._strange, *self._known, *self._ending}) == len(self) + len(self._ending), (
            "one that counts twice"
        )
