"""The loops that tests of the asyncio client run in, asyncio's own and uvloop's, and the small area they use there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

import gcma_shm
from gcma_shm import aio
from tests.client import held
from tests.processes import WAIT_S

PAGE = 4096
AREA_PAGES = 16
SIZE = AREA_PAGES * PAGE
Runs = Callable[[Coroutine[Any, Any, Any]], Any]
NEW_LOOP: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def nothing_is_left(client: gcma_shm.Client) -> bool:
    return held(client) == 0 and client.stats()["broker"]["in_line"] == 0


async def soon(condition: Callable[[], bool]) -> bool:
    """As `eventually`, and the loop goes on meanwhile."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.002)
            return True
    return False


async def steps(count: int) -> None:
    """So many turns of the loop."""
    for _ in range(count):
        await asyncio.sleep(0)


async def give_back(result: Any) -> None:
    if isinstance(result, aio.Buffer):
        await result.free()
    elif isinstance(result, aio.Reservation):
        await result.release()
