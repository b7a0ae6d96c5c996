"""Which connections are ended when there are too many, or when somebody sends what has no end."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gcma_shm.broker.connections import Connections


class Kept:
    """Connections, and which peers have a session."""

    def __init__(self, connections_max: int) -> None:
        self.sessions: set[bytes] = set()
        self.connections = Connections(connections_max, self.sessions.__contains__)

    def come(self, fd: int, session: bool = False) -> None:
        self.connections.opened(fd)
        if session:
            self.sessions.add(b"%d" % fd)
            self.connections.heard(fd, b"%d" % fd)


def test_the_oldest_stranger_goes_first() -> None:
    kept = Kept(4)
    for fd in range(4):
        kept.come(fd, session=fd in (0, 2))
    assert kept.connections.too_many() == []
    kept.come(4)
    assert kept.connections.too_many() == [1]
    assert kept.connections.too_many() == [], "once"
    kept.come(5)
    assert kept.connections.too_many() == [3]
    assert kept.connections.closed(3) is None
    assert len(kept.connections) == 4


def test_a_descriptor_that_is_used_again_is_noticed() -> None:
    kept = Kept(4)
    kept.come(0, session=True)
    kept.come(1)
    kept.come(2)
    kept.connections.heard(2, b"stranger")
    assert not kept.connections.is_anothers(0, b"0")
    assert kept.connections.is_anothers(0, b"new")
    assert kept.connections.is_anothers(9, b"new"), "nobody has told of it"
    assert not kept.connections.is_anothers(1, b"new"), "nobody has sent anything there"
    assert kept.connections.is_anothers(2, b"new")
    assert kept.connections.closed(0) == b"0"
    kept.connections.opened(0)
    assert not kept.connections.is_anothers(0, b"new")


def test_who_said_goodbye_is_a_stranger_again() -> None:
    kept = Kept(2)
    kept.come(0, session=True)
    kept.come(1, session=True)
    kept.sessions.remove(b"1")
    kept.come(2, session=True)
    assert kept.connections.too_many() == [1]
    assert kept.connections.closed(1) == b"1"


def test_a_crowd_of_sessions_stays() -> None:
    """There are only as many as client records."""
    kept = Kept(1)
    kept.come(0, session=True)
    kept.come(1, session=True)
    assert kept.connections.too_many() == []


def test_a_descriptor_that_is_used_again() -> None:
    kept = Kept(4)
    kept.come(0, session=True)
    kept.come(0)
    assert kept.connections.closed(0) is None, "another's"
    assert len(kept.connections) == 0


def address(number: int) -> bytes:
    """As ZeroMQ makes them."""
    return b"\0" + number.to_bytes(4)


@pytest.mark.parametrize("sessions", [True, False])
@pytest.mark.parametrize(("first", "second"), [(address(7), address(8)), (address(2**32 - 1), address(3))])
def test_of_two_that_had_one_descriptor_the_one_that_came_first_has_left(
    first: bytes, second: bytes, sessions: bool
) -> None:
    """Both are served when the second is there, in any order."""
    for order in ((first, second), (second, first), (first, second, first), (second, first, second)):
        kept = Kept(4)
        kept.sessions |= {first, second} if sessions else set()
        kept.come(0)
        left = [kept.connections.heard(0, peer) for peer in order]
        assert set(left) - {None} == {first}, order
        assert kept.connections.closed(0) == second
    kept = Kept(4)
    kept.come(0)
    assert kept.connections.heard(0, b"own") is None
    assert kept.connections.heard(0, second) == b"own", "nobody can tell: the one that was served last counts"
    assert kept.connections.heard(0, b"chosen") == second
    assert kept.connections.heard(1, first) == first, "gone since"
    assert kept.connections.heard(-1, first) is None


def test_to_blame_are_strangers_then_the_quiet_then_all() -> None:
    kept = Kept(9)
    for fd in range(3):
        kept.come(fd, session=True)
    kept.come(3)
    for _ in range(2):
        kept.connections.turn()
        kept.connections.heard(0, b"0")
    assert kept.connections.to_blame(1) == [3]
    kept.come(3)  # an innocent stranger is there again at once; it must not be all that is ended, for ever
    assert kept.connections.to_blame(2) == [3, 1, 2], "0 was heard"
    assert kept.connections.to_blame(3) == [0]
    assert kept.connections.to_blame(4) == []


class Crowd(RuleBasedStateMachine):
    """Against what must be, whatever comes."""

    CONNECTIONS_MAX = 5

    def __init__(self) -> None:
        super().__init__()
        self.kept = Kept(self.CONNECTIONS_MAX)
        self.open: set[int] = set()

    fds = st.integers(0, 12)

    @rule(fd=fds)
    def come(self, fd: int) -> None:
        self.kept.connections.opened(fd)
        self.open.add(fd)

    @rule(fd=fds, session=st.booleans())
    def say(self, fd: int, session: bool) -> None:
        if session and len(self.kept.sessions) < 3:
            self.kept.sessions.add(b"%d" % fd)
        self.kept.connections.heard(fd, b"%d" % fd)

    @rule(fd=fds)
    def leave(self, fd: int) -> None:
        self.kept.connections.closed(fd)
        self.kept.sessions.discard(b"%d" % fd)
        self.open.discard(fd)

    @rule()
    def time_passes(self) -> None:
        self.kept.connections.turn()

    @rule()
    def end_those_too_many(self) -> None:
        ended = self.kept.connections.too_many()
        assert set(ended) <= self.open
        assert len(self.kept.connections) <= self.CONNECTIONS_MAX
        self.open -= set(ended)

    @rule(looks=st.integers(1, 4))
    def blame(self, looks: int) -> None:
        ended = self.kept.connections.to_blame(looks)
        assert set(ended) <= self.open
        self.open -= set(ended)
        assert looks < 3 or not self.open

    @invariant()
    def all_are_counted(self) -> None:
        self.kept.connections._check()
        assert len(self.kept.connections) == len(self.open)


TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
