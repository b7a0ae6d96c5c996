"""How many requests of each kind are under way from an event loop, and who waits until there is room for one more. Sends nothing; `room` of its
methods tells how many of a kind there may be.

Invariant: whoever has entered leaves, however that ends; first come, first served.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

Room = Callable[[str], int]


class Rooms:
    """By kind."""

    def __init__(self) -> None:
        self._under_way: dict[str, int] = {}
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}

    def has(self, kind: str, room: Room) -> bool:
        """Whether one more may be under way."""
        return self._under_way.get(kind, 0) < room(kind)

    def enter(self, kind: str) -> None:
        """One more is under way."""
        self._under_way[kind] = self._under_way.get(kind, 0) + 1

    async def enter_in_turn(self, kind: str, room: Room, deadline: float) -> None:
        """As soon as there is room, or the line was broken up. Raises TimeoutError when it is time."""
        line = self._lines.setdefault(kind, deque())
        if not line and self.has(kind, room):
            self.enter(kind)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.append(turn)
        try:
            async with asyncio.timeout_at(deadline):
                await turn
        except BaseException:
            if turn in line:
                line.remove(turn)
            elif not turn.cancelled():  # its turn had come
                self.leave(kind, room)
            raise

    def leave(self, kind: str, room: Room) -> None:
        """One less is under way."""
        self._under_way[kind] -= 1
        self.admit(room)

    def admit(self, room: Room) -> None:
        """There may be more room than before."""
        for kind, line in self._lines.items():
            while line and self.has(kind, room):
                self._let_in(kind, line)

    def break_up(self) -> None:
        """Nobody needs to wait any more: what they ask is refused."""
        for kind, line in self._lines.items():
            while line:
                self._let_in(kind, line)

    def _let_in(self, kind: str, line: deque[asyncio.Future[None]]) -> None:
        turn = line.popleft()
        if not turn.done():
            self.enter(kind)
            turn.set_result(None)
