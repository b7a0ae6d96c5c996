"""How long does a new broker take from its start to its first answer, by size of the arena that a killed one left?

The arena is full: an area full of cache, every slot of the table in use, 1,000 buffers. In each round the broker is killed and another one
started. Told apart: the interpreter's start, until the new broker has the arena's lock; from the lock to the first answer to a client that has
been asking all the while, which is held against the bound of 50 ms and 20 ms a GiB; and in that, finding and putting right what was left
(`recover`). Beside it, a broker that makes a new arena of the same size, from its start to its first answer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from _common import OUT, Section, Verdict, describe_machine, machine, scratch, tell, write_json

import gcma_shm
from gcma_shm import messages
from gcma_shm.messages import Request
from gcma_shm.sizes import format_size, parse_size

SIZES = ["64M", "256M", "1G", "4G"]
ROUNDS = 7
BUFFERS = 1000
BATCH = 256  # pages
ANSWER_S = 120.0
BOUND_MS, BOUND_MS_A_GIB = 50.0, 20.0
PAGE = 4096
LAPS_MAX, FULL = 20, 0.98  # reading all that was stored until the area is so full, at the most


# --- the broker, which says when it was where


def serve(arguments: list[str]) -> int:
    """Runs `gcma broker`, and tells on standard output, in CLOCK_MONOTONIC seconds, when it had the lock and how long `recover` took."""
    from gcma_shm import arena
    from gcma_shm.broker import cli
    from gcma_shm.broker.service import Service

    moments: dict[str, float] = {}
    try_lock, recover = arena._try_lock, Service.recover

    def noting_lock(fd: int) -> bool:
        locked = try_lock(fd)
        if locked:
            moments["lock"], moments["cpu"] = time.monotonic(), time.process_time()
        return locked

    def noting_recover(service: Service) -> None:
        begun = time.monotonic()
        recover(service)
        moments["recover_s"], moments["cpu_s"] = time.monotonic() - begun, time.process_time() - moments["cpu"]
        print(json.dumps(moments), flush=True)

    arena._try_lock = noting_lock
    Service.recover = noting_recover  # type: ignore[method-assign, assignment]
    return cli.main(arguments)


class Brokers:
    """One broker after another on the same endpoint."""

    def __init__(self, endpoint: str, size: str, spill_dir: Path) -> None:
        options = ["--endpoint", endpoint, "--size", size, "--spill-dir", str(spill_dir), "--log-level", "error"]
        self._command = [sys.executable, __file__, "--serve", "broker", *options]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """The next one."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)

    def end(self, number: int = signal.SIGTERM) -> None:
        """By that signal."""
        if self._process is not None and self._process.stdout is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process.stdout.close()
            self._process = None

    def moments(self) -> dict[str, float]:
        """What the one that runs said of its takeover."""
        assert self._process is not None
        assert self._process.stdout is not None
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        return found


@contextmanager
def brokers(endpoint: str, size: str, spill_dir: Path) -> Iterator[Brokers]:
    """The last one is stopped in the end."""
    found = Brokers(endpoint, size, spill_dir)
    try:
        yield found
    finally:
        found.end()


def first_answer(endpoint: str, start: Callable[[], Any]) -> tuple[float, float]:
    """When `start` was called, and when a client had its answer that has been asking since before."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, 1)
        socket.connect(endpoint)
        socket.send_multipart(messages.encode_request(Request(1, "areas", {})))
        begun = time.monotonic()
        start()
        if not socket.poll(int(ANSWER_S * 1000)):
            raise TimeoutError(f"no answer from the broker on {endpoint}")
        return begun, time.monotonic()


# --- what is left for it


def fill(client: gcma_shm.Client, seed: int) -> dict[str, int]:
    """An area full of cache, and all slots in use: by pages of their own, the rest by zeros."""
    pages, slots = sum(area.size for area in client.areas()) // PAGE, client.stats()["arena"]["slots"]
    swap = client.swap(0, slots // 2, "behind")
    zeros = client.swap(1, slots - slots // 2, "behind")
    random = np.random.default_rng(seed)
    batch = random.integers(0, 255, (BATCH, PAGE), np.uint8)
    own = min(pages * 5 // 4, swap.slots)
    for first in range(0, own, BATCH):
        count = min(BATCH, own - first)
        swap.store_many(range(first, first + count), batch[:count].tobytes())
    for one, begin in ((swap, own), (zeros, 0)):
        for first in range(begin, one.slots, BATCH):
            count = min(BATCH, one.slots - first)
            one.store_many(range(first, first + count), bytes(count * PAGE))
    swap.sync()
    # What is read again right after it was evicted comes back to memory, and is promoted: until the area is full.
    out = bytearray(BATCH * PAGE)
    for first in range(0, LAPS_MAX * own, BATCH):
        begin = first % own
        count = min(BATCH, own - begin)
        swap.load_many(range(begin, begin + count), memoryview(out)[: count * PAGE])
        lent = sum(area.lent for area in client.areas())
        if lent >= FULL * pages * PAGE:
            break
    return {"slots": len(swap) + len(zeros), "lent_bytes": lent, "pages": pages}


def measure(size: str, rounds: int, directory: Path) -> dict[str, Any]:
    """Figures of one size, in milliseconds."""
    endpoint = f"ipc://{directory}/{size}/broker"
    figures: dict[str, list[float]] = {name: [] for name in ("new", "start", "answer", "recover", "cpu", "whole")}
    with brokers(endpoint, size, directory) as some:
        for _ in range(rounds):
            some.end()
            begun, answered = first_answer(endpoint, some.start)
            figures["new"].append((answered - begun) * 1000)
        with gcma_shm.connect(endpoint, timeout=ANSWER_S) as client:
            buffers = [client.alloc_contig(PAGE) for _ in range(BUFFERS)]
            left = {"buffers": len(buffers)} | fill(client, len(size))
            for _ in range(rounds):
                some.end(signal.SIGKILL)
                begun, answered = first_answer(endpoint, some.start)
                moments = some.moments()
                figures["start"].append((moments["lock"] - begun) * 1000)
                figures["answer"].append((answered - moments["lock"]) * 1000)
                figures["recover"].append(moments["recover_s"] * 1000)
                figures["cpu"].append(moments["cpu_s"] * 1000)
                figures["whole"].append((answered - begun) * 1000)
    gib = parse_size(size) / (1 << 30)
    return {"left": left, "bound_ms": BOUND_MS + BOUND_MS_A_GIB * gib, "ms": figures}


# --- telling it


COLUMNS = ("arena", "slots used", "lent", "start", "answer", "worst", "least", "recover", "processor", "bound", "start to answer", "a new arena")  # fmt: skip
NOTE = (
    "ms, medians. start: until it has the lock; answer: from the lock to the first answer; recover: what of that is putting right what was left; "
    "processor: the new broker's time from the lock to the end of that; a new arena: from the start to the first answer of a broker that makes one."
)


def row(size: str, found: dict[str, Any]) -> list[object]:
    """One size: medians and the worst."""
    ms = found["ms"]
    median = {name: float(np.median(values)) for name, values in ms.items()}
    return [
        size,
        f"{found['left']['slots']}",
        format_size(found["left"]["lent_bytes"]),
        f"{median['start']:.0f}",
        f"{median['answer']:.1f}",
        f"{max(ms['answer']):.1f}",
        f"{min(ms['answer']):.1f}",
        f"{median['recover']:.1f}",
        f"{median['cpu']:.1f}",
        f"{found['bound_ms']:.0f}",
        f"{median['whole']:.0f}",
        f"{median['new']:.0f}",
    ]


def section(results: dict[str, Any]) -> Section:
    """All sizes, each against its bound."""
    rows = [row(size, one) for size, one in results.items()]
    verdicts = [
        Verdict(
            f"{size}: from lock to first answer, median, ms", one["bound_ms"], float(np.median(one["ms"]["answer"]))
        )
        for size, one in results.items()
    ]
    return Section("From a new broker's start to its first answer", COLUMNS, rows, NOTE, verdicts)


def main(argv: list[str]) -> int:
    """Measures all sizes."""
    if argv[:1] == ["--serve"]:
        return serve(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=SIZES, metavar="SIZE", help="of the arena (default: 64M to 4G, as far as there is memory for it)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="deaths of each")
    parser.add_argument("--out", type=Path, default=OUT / "takeover.json", metavar="FILE")
    options = parser.parse_args(argv)
    found = machine()
    print(describe_machine(found))
    results: dict[str, Any] = {}
    with scratch() as directory:
        for size in options.size:
            # The arena, its pages in the page cache, and half as much again for whoever else there is.
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if size == SIZES[-1] and options.size is SIZES and free < 3 * parse_size(size):
                print(f"{size}: left out, {format_size(free)} of memory are free")
                continue
            results[size] = measure(size, options.rounds, directory)
            print(f"{size}: done", flush=True)
    told = section(results)
    tell(told)
    write_json(options.out, str(__doc__).splitlines()[0], found, vars(options), results, [told])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
