"""Runs plasma's store and times creations in it, for `plasma.py`; needs nothing but pyarrow 11, in an environment of its own.

Reads lines from standard input, and answers each with one line of JSON. "fill": stores 4 KiB objects in place of those that were evicted. A size:
creates an object; nanoseconds to `create`'s return, and until each page of it was written to.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pyarrow import plasma

SMALL = 4096
PROBE = 64  # objects between two looks whether the first one is still there
START_S = 20.0

Touch = Callable[[int, int], None]


class Store:
    """A store that is full of 4 KiB objects."""

    def __init__(self, path: Path, nbytes: int, touch: Touch) -> None:
        self._touch = touch
        socket = path / "plasma"
        program = Path(sys.executable).parent / "plasma_store"
        silence = subprocess.DEVNULL
        self.process = subprocess.Popen([program, "-m", str(nbytes), "-s", socket], stdout=silence, stderr=silence)
        deadline = time.monotonic() + START_S
        while not socket.exists() and time.monotonic() < deadline and self.process.poll() is None:
            time.sleep(0.01)
        self._client = plasma.connect(str(socket))
        self._small = os.urandom(SMALL)
        # One object of most of the store, written to: from then on no creation costs this process a fault. That favours plasma.
        self.sample(nbytes * 9 // 10)
        self._full = self._first_fill()

    def _first_fill(self) -> int:
        """Small objects until the store evicts; so many it holds, to within PROBE."""
        first = self._put()
        count = 1
        while self._client.contains(first):
            for _ in range(PROBE):
                self._put()
            count += PROBE
        return count - PROBE

    def _put(self) -> plasma.ObjectID:
        name = plasma.ObjectID.from_random()
        self._client.create_and_seal(name, self._small)
        return name

    def fill(self) -> dict[str, int]:
        """As many small objects as were evicted; how many that was."""
        evicted = self._full - len(self._client.list())
        for _ in range(evicted):
            self._put()
        return {"stored": evicted}

    def sample(self, nbytes: int) -> dict[str, int]:
        """One object, removed again."""
        name, clock = plasma.ObjectID.from_random(), time.perf_counter_ns
        start = clock()
        buffer = self._client.create(name, nbytes)
        created = clock()
        self._touch(buffer.address, nbytes)
        used = clock()
        self._client.seal(name)
        del buffer
        self._client.delete([name])
        return {"hand_over": created - start, "usable": used - start}


def main() -> None:
    """Serves until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory", type=int, required=True)
    parser.add_argument("--floor", required=True, help="the C floor's library")
    options = parser.parse_args()
    touch = ctypes.CDLL(options.floor).touch
    touch.argtypes, touch.restype = [ctypes.c_void_p, ctypes.c_size_t], None
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory), options.memory, touch)
        try:
            print("ready", flush=True)
            for line in sys.stdin:
                answer = store.fill() if line == "fill\n" else store.sample(int(line))
                print(json.dumps(answer), flush=True)
        finally:
            store.process.kill()
            store.process.wait()


if __name__ == "__main__":
    main()
