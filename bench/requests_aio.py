"""The asyncio client for `requests.py`: beside the client that blocks, and beside a bare echo of the same frames over zmq.asyncio."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import msgpack
import numpy as np
import zmq
import zmq.asyncio
from _common import Ratio, Section, Summary
from requests_echo import LINGER_MS, Bare, Wanted

import gcma_shm
import gcma_shm.aio

AT_ONCE = 64  # tasks that ask
BUFFER = 1 << 16

T = TypeVar("T")
Figures = dict[str, Any]
Act = Callable[[], Awaitable[object]]


class AsyncBare:
    """A DEALER over zmq.asyncio that speaks the protocol by hand, to the echo."""

    def __init__(self, stack: ExitStack, endpoint: str) -> None:
        context = stack.enter_context(zmq.asyncio.Context())
        self._socket = stack.enter_context(context.socket(zmq.DEALER))
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.connect(endpoint)
        self._numbers = itertools.count(1)

    async def _send(self, wanted: Wanted) -> None:
        operation, parameters, pages = wanted
        await self._socket.send_multipart([msgpack.packb([1, next(self._numbers), operation, parameters]), *pages])

    async def _receive(self) -> None:
        _version, _number, status, results = msgpack.unpackb((await self._socket.recv_multipart())[0])
        assert status == "ok", results

    async def round(self, frames: list[Wanted]) -> None:
        """These, one after another."""
        for wanted in frames:
            await self._send(wanted)
            await self._receive()

    async def seconds(self, frames: list[Wanted], count: int) -> float:
        """Of so many rounds, AT_ONCE requests ahead of their replies."""
        begun = time.perf_counter()
        requests = count * len(frames)
        for number, wanted in zip(range(requests + AT_ONCE), itertools.cycle(frames), strict=False):
            if number >= AT_ONCE:
                await self._receive()
            if number < requests:
                await self._send(wanted)
        return time.perf_counter() - begun


async def times(act: Act, count: int) -> list[int]:
    """Nanoseconds of each of so many, one after another."""
    clock, taken = time.perf_counter_ns, []
    for _ in range(count):
        begun = clock()
        await act()
        taken.append(clock() - begun)
    return taken


async def seconds(act: Act, count: int) -> float:
    """Of so many, by AT_ONCE tasks."""

    async def work() -> None:
        for _ in range(count // AT_ONCE):
            await act()

    begun = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return time.perf_counter() - begun


def beside(rounds: int, count: int, spill_dir: Path, bare: Bare) -> Figures:
    """Each job one at a time and many at once, by all three in turns. The one that blocks does many one after another, too."""
    count = -(-count // AT_ONCE) * AT_ONCE
    with (
        ExitStack() as stack,
        gcma_shm.embedded("64M", spill_dir=spill_dir) as owner,
        gcma_shm.connect(owner.endpoint) as blocking,
        asyncio.Runner() as runner,
    ):
        run = runner.run

        async def open_bare() -> AsyncBare:
            return AsyncBare(stack, bare.endpoint)

        echo = run(open_bare())
        client = run(connected(owner.endpoint))

        async def alloc() -> None:
            await (await client.alloc_contig(BUFFER)).free()

        def alloc_blocking() -> None:
            blocking.alloc_contig(BUFFER).free()

        place: list[Wanted] = [("alloc_contig", {"nbytes": BUFFER}, ()), ("free_contig", {"buffer": 1 << 24}, ())]
        jobs: dict[str, tuple[Act, Callable[[], object], list[Wanted]]] = {
            "ping": (
                lambda: client._channel.request("ping"),
                lambda: blocking._channel.request("ping"),
                [("ping", {}, ())],
            ),
            "alloc + free 64 KiB": (alloc, alloc_blocking, place),
        }
        found: Figures = {}
        for name, (act, block, frames) in jobs.items():
            alone: dict[str, list[list[int]]] = {"asyncio": [], "blocking": [], "echo": []}
            together: dict[str, list[float]] = {"asyncio": [], "blocking": [], "echo": []}
            run(seconds(act, count))
            for _ in range(rounds):
                alone["asyncio"].append(run(times(act, count)))
                alone["blocking"].append(blocked := block_times(block, count))
                alone["echo"].append(run(times(lambda frames=frames: echo.round(frames), count)))  # type: ignore[misc] # bound
                together["asyncio"].append(run(seconds(act, count)))
                together["blocking"].append(sum(blocked) / 1e9)
                together["echo"].append(run(echo.seconds(frames, count)))
            medians = {who: [statistics.median(each) for each in lists] for who, lists in alone.items()}
            found[name] = {
                "one at a time": {who: Summary.of(np.concatenate(lists).astype(float)) for who, lists in alone.items()},
                "many at once": {who: count / statistics.median(each) for who, each in together.items()},
                "ratios": {
                    "one at a time": [Ratio.of(medians["asyncio"], medians[who]) for who in ("blocking", "echo")],
                    "many at once": [Ratio.of(together["asyncio"], together[who]) for who in ("blocking", "echo")],
                },
            }
        run(client.close())
        return found


async def connected(endpoint: str) -> gcma_shm.aio.Client:
    """In this loop."""
    return await gcma_shm.aio.connect(endpoint)


def block_times(act: Callable[[], object], count: int) -> list[int]:
    """As `times`, of the client that blocks."""
    clock, taken = time.perf_counter_ns, []
    for _ in range(count):
        begun = clock()
        act()
        taken.append(clock() - begun)
    return taken


def beside_section(where: str, found: Figures) -> Section:
    """Microseconds one at a time; how many a second with many at once."""
    rows: list[list[object]] = []
    for name, one in found.items():
        for how in ("one at a time", "many at once"):
            told = [value.median / 1e3 if how == "one at a time" else value for value in one[how].values()]
            unit = "µs" if how == "one at a time" else "a second"
            rows.append([name, f"{how}, {unit}", *told, *map(str, one["ratios"][how])])
    columns = ["", "", "asyncio", "blocking", "echo, zmq.asyncio", "time, asyncio / blocking", "time, asyncio / echo"]
    note = f"Many at once: by {AT_ONCE} tasks; the client that blocks does as many one after another."
    return Section(f"The asyncio client, {where}", columns, rows, note)
