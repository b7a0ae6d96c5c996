"""An asyncio web service that hands its uploads to a process pool, without a copy.

A request's body is received into a buffer of the arena, by the asyncio client; the worker gets a handle, and computes on that very
memory. Buffers are also the limit of how much is under way: an upload that finds no room waits in line for a moment, and then
is told to come again (503).

    python examples/web_service.py           needs aiohttp and numpy; asks itself some questions, and ends
    python examples/web_service.py 8080      serves until it is interrupted (0: a port that the system chooses):
    curl --data-binary @picture.raw http://127.0.0.1:8080/histogram
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import sys

import numpy as np
import numpy.typing as npt
from aiohttp import ClientSession, web

import gcma_shm
import gcma_shm.aio
from gcma_shm.clients.executor import ArenaExecutor

UPLOAD_MAX = 4 << 20  # bytes
WAIT_S = 60  # for room in the arena

CLIENT = web.AppKey("client", gcma_shm.aio.Client)
POOL = web.AppKey("pool", ArenaExecutor)


def histogram(pixels: npt.NDArray[np.uint8]) -> list[int]:
    """How many pixels have each of 16 brightnesses."""
    counts, _ = np.histogram(pixels, bins=16, range=(0, 256))
    return [int(count) for count in counts]


def work(buffer: gcma_shm.Buffer | gcma_shm.aio.Buffer, length: int) -> list[int]:
    """In a worker: of what was received into a buffer, which is pickled as a handle and comes as a `gcma_shm.Buffer`."""
    return histogram(buffer.numpy(length))


async def upload(request: web.Request) -> web.Response:
    """POST /histogram: the body is the picture, a byte a pixel."""
    length = request.content_length
    if not length or length > UPLOAD_MAX:
        raise web.HTTPRequestEntityTooLarge(UPLOAD_MAX, length or 0)
    try:
        buffer = await request.app[CLIENT].alloc_contig(length, timeout=WAIT_S)
    except gcma_shm.ArenaExhausted:
        raise web.HTTPServiceUnavailable(headers={"Retry-After": "1"}) from None
    async with buffer:  # freed with the answer, also when the client goes away
        received = 0
        async for piece in request.content.iter_any():
            buffer.view[received : received + len(piece)] = piece
            received += len(piece)
        counts = await asyncio.get_running_loop().run_in_executor(request.app[POOL], work, buffer, length)
    return web.json_response({"pixels": length, "histogram": counts})


async def ask(session: ClientSession, url: str, seed: int) -> str:
    """Uploads a random picture, and checks the answer against the plain computation."""
    pixels = np.random.default_rng(seed).integers(0, 200, 3 << 20, dtype=np.uint8)
    async with session.post(url, data=pixels.tobytes()) as response:
        answer = await response.json()
    assert answer == {"pixels": pixels.size, "histogram": histogram(pixels)}
    return f"{answer['pixels']} pixels: {answer['histogram'][:4]} ..., as computed here"


async def main(port: int | None = None) -> None:
    """Serves on loopback. Without a port, on one that the system chooses, for as long as its own questions take."""
    app = web.Application()
    app.router.add_post("/histogram", upload)
    spawn = multiprocessing.get_context("spawn")  # a forked worker would hold the buffers that there are just then
    with gcma_shm.embedded("16M") as owner, ArenaExecutor(2, spawn, client=owner) as pool:
        app[CLIENT], app[POOL] = await gcma_shm.aio.connect(owner.endpoint), pool
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port or 0).start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}/histogram"
            print(f"serving {url}", flush=True)
            if port is not None:
                await asyncio.Event().wait()
            async with ClientSession() as session:  # twelve at once, three times what the arena holds
                for line in await asyncio.gather(*(ask(session, url, seed) for seed in range(12))):
                    print(line)
        finally:
            await runner.cleanup()
            await app[CLIENT].close()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(*map(int, sys.argv[1:])))
