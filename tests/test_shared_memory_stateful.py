"""Segments against a naive model: any order of creating, attaching, writing, closing and unlinking, in two processes' worth of clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

import gcma_shm
from gcma_shm import Client
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.shared_memory import SharedMemory, using
from tests.processes import eventually

PAGE = 4096
NAMES = ("a", "b", "n" * 60)


@dataclass(eq=False)
class Segment:
    """What the model knows of one."""

    pages: int
    value: int = 0
    tracked: bool = True


@dataclass(eq=False)
class Open:
    """A segment that was opened: by the model, and ours."""

    segment: Segment
    ours: SharedMemory
    name: str
    client: int


class Machine(RuleBasedStateMachine):
    client: EmbeddedClient

    opened = Bundle("opened")

    @initialize()
    def begin(self) -> None:
        self.clients: list[Client] = [gcma_shm.connect(self.client.endpoint) for _ in range(2)]
        self.names: dict[str, Segment] = {}
        self.open: list[Open] = []

    @rule(
        target=opened,
        name=st.sampled_from(NAMES),
        size=st.integers(1, 3 * PAGE),
        track=st.booleans(),
        who=st.integers(0, 1),
    )
    def create(self, name: str, size: int, track: bool, who: int) -> Any:
        with using(self.clients[who]):
            if name in self.names:
                with pytest.raises(FileExistsError):
                    SharedMemory(name, create=True, size=size, track=track)
                return multiple()
            ours = SharedMemory(name, create=True, size=size, track=track)
        segment = self.names[name] = Segment(-(-size // PAGE), tracked=track)
        return self._opened(Open(segment, ours, name, who))

    @rule(target=opened, name=st.sampled_from(NAMES), who=st.integers(0, 1))
    def attach(self, name: str, who: int) -> Any:
        with using(self.clients[who]):
            if name not in self.names:
                with pytest.raises(FileNotFoundError):
                    SharedMemory(name)
                return multiple()
            return self._opened(Open(self.names[name], SharedMemory(name), name, who))

    def _opened(self, one: Open) -> Open:
        self.open.append(one)
        return one

    @rule(one=opened, value=st.integers(1, 255))
    def write(self, one: Open, value: int) -> None:
        if one.ours.buf is not None:
            one.ours.buf[:] = bytes([value]) * one.ours.size
            one.segment.value = value

    @rule(one=consumes(opened))
    def close(self, one: Open) -> None:
        one.ours.close()
        self.open.remove(one)

    @rule(one=opened)
    def unlink(self, one: Open) -> None:
        """By name: of whatever has it now."""
        if one.ours._client.closed:
            return
        if one.name in self.names:
            one.ours.unlink()
            del self.names[one.name]
        else:
            with pytest.raises(FileNotFoundError):
                one.ours.unlink()

    @rule(name=st.sampled_from(NAMES))
    def unlink_by_a_third(self, name: str) -> None:
        if name in self.names:
            with using(self.client):
                third = SharedMemory(name)
            third.close()
            third.unlink()
            del self.names[name]

    @rule(who=st.integers(0, 1))
    def end(self, who: int) -> None:
        """A client closes all that it has, and leaves; another one comes in its place."""
        for one in self.open:
            if one.client == who:
                one.ours.close()
        self.clients[who].close()
        self.clients[who] = gcma_shm.connect(self.client.endpoint)

    def teardown(self) -> None:
        for one in self.open:
            one.ours.close()
        for name in self.names:
            with using(self.client):
                third = SharedMemory(name)
            third.close()
            third.unlink()
        for client in self.clients:
            client.close()
        assert not self.held()

    def held(self) -> int:
        return sum(area.held for area in self.client.areas())

    @invariant()
    def look(self) -> None:
        for one in self.open:
            if one.ours.buf is not None:
                assert bytes(one.ours.buf) == bytes([one.segment.value]) * (one.segment.pages * PAGE)
        told = {info.name: info.kept_by for info in self.client.names()}
        assert len(told) == len(self.names)
        assert sum(keepers == (1,) for keepers in told.values()) == sum(not one.tracked for one in self.names.values())
        living = {*self.names.values(), *(one.segment for one in self.open if one.ours.buf is not None)}
        expected = PAGE * sum(segment.pages for segment in living)
        assert eventually(lambda: self.held() == expected), "to close is to tell the broker, and not to wait for it"


def test_segments_are_what_a_naive_model_says(client: EmbeddedClient) -> None:
    class OnThatArena(Machine):
        pass

    OnThatArena.client = client
    run_state_machine_as_test(OnThatArena, settings=settings(max_examples=40, stateful_step_count=25, deadline=None))
