"""The control loop's order: which connection a message came by, when others came and went just before it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from gcma_shm.broker.connections import Connections
from gcma_shm.broker.door import Door, Doorway
from gcma_shm.broker.server import Server
from gcma_shm.broker.stop import StopSignals
from gcma_shm.messages import Frame, Reply

from .processes import descriptors, eventually
from .zmtp import Raw

PAGE = 4096


class Noting:
    """A service that keeps a session for each peer that has sent anything, until it is told that it has gone. `meanwhile` is called with the
    count of messages while each of them is served.
    """

    def __init__(self, meanwhile: Callable[[int], None]) -> None:
        self.peers: list[bytes] = []
        self.gone: list[bytes] = []
        self.sessions: Any = SimpleNamespace(has_session=self.peers.__contains__)
        self._meanwhile = meanwhile

    def request(self, peer: bytes, _frames: list[Frame], _sender: object) -> Reply | None:
        self.peers.append(peer)
        self._meanwhile(len(self.peers))
        return None

    def peer_gone(self, peer: bytes) -> None:
        self.gone.append(peer)


class Visitors:
    """Connections made while the loop is busy, each of which sends one message."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._here: list[Raw] = []

    def comes(self) -> None:
        """Until its message is there."""
        self._here.append(Raw(self._door.endpoints[0]).greet())
        self._here[-1].request(1, "ping")
        assert eventually(lambda: bool(int(self._door.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN))

    def all_go(self) -> None:
        while self._here:
            self._here.pop().close()


def come_and_stay(visitors: Visitors, served: int) -> None:
    """Their messages are served before the loop asks who has come."""
    if served == 1:
        for _ in range(3):
            visitors.comes()


def come_and_go(visitors: Visitors, served: int) -> None:
    """They have left, and ZeroMQ knows it, when their messages are served."""
    if served == 1:
        before = descriptors()
        for _ in range(3):
            visitors.comes()
            visitors.all_go()
        assert eventually(lambda: descriptors() == before)


def come_one_after_the_other(visitors: Visitors, served: int) -> None:
    """By one descriptor; all of their messages are served when the last one is there."""
    if served == 1:
        before = descriptors()
        for turn in range(3):
            visitors.comes()
            if turn < 2:
                visitors.all_go()
                assert eventually(lambda: descriptors() == before)


def take_turns(visitors: Visitors, served: int) -> None:
    """Each leaves while its message is served, and the next one has its descriptor."""
    visitors.all_go()
    if served < 4:
        visitors.comes()


@pytest.mark.parametrize("what", [come_and_stay, come_and_go, come_one_after_the_other, take_turns])
def test_who_comes_and_goes_while_the_loop_is_busy_is_missed_by_nobody(what: Callable[[Visitors, int], None]) -> None:
    with StopSignals() as stop:
        door = Door(f"ipc://{tempfile.gettempdir()}/door", Doorway(), PAGE, 8)
        server, visitors = Server(door, stop, PAGE), Visitors(door)
        service: Any = Noting(lambda served: what(visitors, served))
        connections = Connections(door.connections_max, service.sessions.has_session)
        try:
            with Raw(door.endpoints[0]).greet() as first:
                first.request(1, "ping")
                assert eventually(lambda: not server._serve(connections, service) and len(service.peers) == 4)
                visitors.all_go()

                def all_are_told() -> bool:
                    server._count(connections, service)
                    return len(service.gone) == 3

                assert eventually(all_are_told)
                assert sorted(service.gone) == sorted(service.peers[1:])
                assert len(connections) == 1
                connections._check()
        finally:
            visitors.all_go()
            server.close()
            door.close()
            Path(door.endpoints[0].removeprefix("ipc://")).unlink(missing_ok=True)
