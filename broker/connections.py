"""Connections to the broker's socket: how many there may be, and which are ended when there are too many. Pure.

ZeroMQ accepts whoever comes, and ends its process when it has no descriptor left. So its monitor tells of every connection, and when
there are more than `connections_max`, those go first that no session is heard from, the oldest before the others: who comes and
introduces itself is safe, and a crowd that says nothing only drives itself out.
"""

from __future__ import annotations

from collections.abc import Callable

_ADDRESS_BYTES = 5
_NUMBERS = 1 << 32


class Connections:
    """Those that are open and are to stay, by descriptor, in the order in which they came. `has_session(peer)` says whether messages
    from there belong to somebody.
    """

    def __init__(self, connections_max: int, has_session: Callable[[bytes], bool] = lambda _: False) -> None:
        self.connections_max = connections_max
        self._has_session = has_session
        self._turn = 0
        self._strange: dict[int, bytes | None] = {}  # the peer that sends there, if it has sent anything
        self._known: dict[int, tuple[bytes, int]] = {}  # the peer, and the turn in which it was heard
        self._ending: dict[int, bytes | None] = {}  # told to end, and not closed yet

    def __len__(self) -> int:
        return len(self._strange) + len(self._known)

    def opened(self, fd: int) -> None:
        """A connection was accepted."""
        self.closed(fd)  # its end was not told: the descriptor is a new one's
        self._strange[fd] = None

    def closed(self, fd: int) -> bytes | None:
        """A connection has ended; the peer that it was, if it ever sent anything."""
        if fd in self._known:
            return self._known.pop(fd)[0]
        return self._strange.pop(fd, None) or self._ending.pop(fd, None)

    def is_anothers(self, fd: int, peer: bytes) -> bool:
        """Whether that descriptor is taken for another peer's, or for nobody's: a connection has come, or one has gone and its descriptor is
        used again, and we were not told yet.
        """
        if fd not in self._known and fd not in self._strange:
            return fd >= 0 and fd not in self._ending
        before = self._known[fd][0] if fd in self._known else self._strange[fd]
        return before is not None and before != peer

    def heard(self, fd: int, peer: bytes) -> bytes | None:
        """A message came by it, and was served. Returns who has left, as far as was told: `peer`, whose connection has ended since it was
        sent; or whoever sent by that descriptor before and is not told of any more, because both came, one after the other, and went
        unserved until the second was there. (Peers that have no descriptor to tell have -1.)
        """
        if fd < 0 or fd in self._ending:
            return None
        if fd not in self._known and fd not in self._strange:
            return peer
        before = self._known[fd][0] if fd in self._known else self._strange[fd]
        if before is not None and before != peer and _came_later(before, peer):
            return peer
        if fd in self._known:
            self._known[fd] = peer, self._turn
        elif self._has_session(peer):
            del self._strange[fd]
            self._known[fd] = peer, self._turn
        else:
            self._strange[fd] = peer
        return before if before != peer else None

    def turn(self) -> None:
        """Time passes: `to_blame` looks at what was heard since."""
        self._turn += 1

    def too_many(self) -> list[int]:
        """Those to be ended now, because there are more than `connections_max`."""
        count = len(self) - self.connections_max
        if count <= 0:
            return []
        if len(self._strange) < count:
            self._estrange(lambda peer, _: not self._has_session(peer))  # sessions that have ended since
        return self._end(count)

    def to_blame(self, looks: int) -> list[int]:
        """Those to be ended now, because somebody sends what has no end: whoever has no session; at the second look in a row, also
        whoever was not heard in the last turn, or this one, for such a message is never heard; at the third, everybody. It is the look
        that counts, for innocent strangers are there again by then.
        """
        self._estrange(
            lambda peer, turn: not self._has_session(peer) or looks > 2 or (looks > 1 and turn < self._turn - 1)
        )
        return self._end(len(self._strange))

    def _estrange(self, which: Callable[[bytes, int], bool]) -> None:
        for fd, (peer, turn) in list(self._known.items()):
            if which(peer, turn):
                self._strange[fd] = self._known.pop(fd)[0]

    def _end(self, count: int) -> list[int]:
        chosen = list(self._strange)[:count]
        for fd in chosen:
            self._ending[fd] = self._strange.pop(fd)
        return chosen

    def _check(self) -> None:
        """Raises AssertionError when an invariant is broken."""
        together = {*self._strange, *self._known, *self._ending}
        assert len(together) == len(self) + len(self._ending), "a connection that counts twice"
        assert all(turn <= self._turn for _, turn in self._known.values()), "one heard in a turn to come"


def _came_later(one: bytes, than: bytes) -> bool:
    """By the addresses that ZeroMQ gives to peers: a zero byte and a number, the next one each time. Who has chosen its own did not, as far
    as anybody can tell: the one that is served last counts.
    """
    if not (len(one) == len(than) == _ADDRESS_BYTES and one[0] == than[0] == 0):
        return False
    return 0 < (int.from_bytes(one[1:]) - int.from_bytes(than[1:])) % _NUMBERS < _NUMBERS // 2
