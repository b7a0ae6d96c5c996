"""Image batches in a frame buffer that is guaranteed, and a cache while nobody needs it.

A batch has to lie in memory in one piece, for a GPU's upload or a codec. Two workers decode frames straight into it. The
buffer is reserved once, so claiming it for a batch cannot fail; between two batches its memory holds cached previews.

    python examples/image_batches.py        needs numpy
"""

from __future__ import annotations

import math
import multiprocessing
import time
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

import gcma_shm
from gcma_shm.clients.executor import ArenaExecutor
from gcma_shm.clients.mapping import SwapMapping

Images = npt.NDArray[Any]

BATCHES = 6
SHAPE = (8, 480, 640, 3)  # frames, rows, columns, colours: 7 MiB


def camera(number: int) -> bytes:
    """A frame as it comes from outside: compressed."""
    picture = np.indices(SHAPE[1:]).sum(axis=0) * (number + 1)
    return zlib.compress(picture.astype(np.uint8).tobytes(), 1)


def decode(packed: bytes, frame: Images) -> bytes:
    """In a worker. `frame` is a part of the batch itself: what is written there, the main process has. Returns a preview."""
    frame[:] = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(frame.shape)
    return frame[::2, ::2].tobytes()


def main() -> None:
    """Runs the pipeline, and checks what comes out against the plain computation."""
    films = [[camera(batch * SHAPE[0] + n) for n in range(SHAPE[0])] for batch in range(BATCHES)]
    spawn = multiprocessing.get_context("spawn")  # a forked worker would hold the batch that there is just then
    with gcma_shm.embedded("16M") as client, ArenaExecutor(2, spawn, client=client) as pool:
        previews = SwapMapping(client, type=1, slots=4000)
        reserved = client.reserve(math.prod(SHAPE))
        for number, film in enumerate(films):
            lent, begun = client.areas()[0].lent, time.perf_counter()
            buffer = reserved.claim()  # no message, no failure: what was cached here makes way
            took = time.perf_counter() - begun
            batch = buffer.numpy(SHAPE)
            for n, preview in enumerate(pool.map(decode, film, batch)):
                previews[f"{number}/{n}"] = preview
            assert batch.mean() == np.mean([np.frombuffer(zlib.decompress(packed), np.uint8) for packed in film])
            print(f"batch {number}: claimed in {took * 1e6:.0f} µs while {lent >> 10} KiB were lent to the cache")
            del batch, buffer  # the last that lies on it: lent again
        for number, film in enumerate(films):
            for n, packed in enumerate(film):
                frame = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(SHAPE[1:])
                assert previews[f"{number}/{n}"] == frame[::2, ::2].tobytes()
        print(f"{len(previews)} previews cached; what made way came back from the spill file, none is lost")


if __name__ == "__main__":
    main()
