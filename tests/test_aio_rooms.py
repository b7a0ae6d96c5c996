"""How many requests of a kind are under way from an event loop: first come, first served, and whoever has entered leaves, however that ends."""

from __future__ import annotations

import asyncio

import pytest

from gcma_shm.clients.aio_rooms import Rooms
from tests.loops import Runs, steps

KIND = "kind"


class Line:
    """Those who want to enter, in the order in which they came; `room` of them may be in."""

    def __init__(self, room: int = 1) -> None:
        self.room = room
        self.rooms = Rooms()
        self.entered: list[int] = []

    async def enter(self, number: int, wait_s: float = 1e6) -> None:
        deadline = asyncio.get_running_loop().time() + wait_s
        await self.rooms.enter_in_turn(KIND, lambda _: self.room, deadline)
        self.entered.append(number)

    def leave(self) -> None:
        self.rooms.leave(KIND, lambda _: self.room)

    async def wait(self, *numbers: int) -> list[asyncio.Task[None]]:
        tasks = [asyncio.ensure_future(self.enter(number)) for number in numbers]
        await steps(2)
        return tasks


def test_first_come_first_served(run: Runs) -> None:
    async def main() -> None:
        line = Line(room=2)
        await line.wait(*range(6))
        assert line.entered == [0, 1]
        assert not line.rooms.has(KIND, lambda _: 2)
        assert line.rooms.has("another", lambda _: 2)
        line.leave()
        line.leave()
        await steps(2)
        assert line.entered == [0, 1, 2, 3]
        line.room = 4
        line.rooms.admit(lambda _: 4)
        await steps(2)
        assert line.entered == list(range(6))

    run(main())


def test_nobody_passes_those_who_wait(run: Runs) -> None:
    async def main() -> None:
        line = Line()
        await line.wait(0, 1)
        line.room = 2
        late = asyncio.ensure_future(line.enter(2))
        await steps(2)
        assert line.entered == [0], "there is room for one more, which is not told yet"
        line.rooms.admit(lambda _: 2)
        await steps(2)
        assert line.entered == [0, 1]
        line.leave()
        await late
        assert line.entered == [0, 1, 2]

    run(main())


def test_who_is_cancelled_when_his_turn_has_come_gives_it_to_the_next(run: Runs) -> None:
    async def main() -> None:
        line = Line()
        _, first, second, _third = await line.wait(0, 1, 2, 3)
        second.cancel()  # while he waits
        line.leave()
        first.cancel()  # before he knows
        await steps(4)
        assert line.entered == [0, 3]
        line.leave()
        assert line.rooms.has(KIND, lambda _: 1)

    run(main())


def test_who_waits_for_too_long_leaves_the_line(run: Runs) -> None:
    async def main() -> None:
        line = Line()
        await line.wait(0)
        with pytest.raises(TimeoutError):
            await line.enter(1, 0.001)
        assert not line.rooms._lines[KIND]
        waiting = await line.wait(2)
        line.leave()
        await waiting[0]
        assert line.entered == [0, 2]

    run(main())


def test_a_line_that_is_broken_up_lets_all_in(run: Runs) -> None:
    """Whoever is let in is refused elsewhere; and leaves like others."""

    async def main() -> None:
        line = Line()
        tasks = await line.wait(*range(4))
        tasks[1].cancel()
        line.rooms.break_up()
        await steps(2)
        assert line.entered == [0, 2, 3]
        for _ in line.entered:
            line.leave()
        assert line.rooms.has(KIND, lambda _: 1)

    run(main())
