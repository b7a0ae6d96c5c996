"""Does anybody wait longer because of hostile peers? A client's loads by message and its buffers, beside each kind of them, as a ratio.

Rounds without and with the peers take turns in one run, on one broker; the ratio is that of their medians. The peers run in a process of their
own. (Clients that map the arena load and store without the broker, so nothing here concerns them.)
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the hand-spoken protocol of the tests

from _common import OUT, Section, Verdict, describe_machine, machine, tell, write_json  # noqa: E402

import gcma_shm  # noqa: E402
from gcma_shm import messages  # noqa: E402
from gcma_shm.process import start_time  # noqa: E402
from tests.zmtp import GREETING, LONG, MORE, Raw, frame  # noqa: E402

RATIO_MAX = 2.0


def hello(raw: Raw) -> None:
    """A session for this process."""
    raw.request(1, "hello", {"pid": os.getpid(), "start": start_time(os.getpid()) or 0, "mapped": False})
    raw.receive()


def half_open(endpoint: str) -> list[Raw]:
    """A hundred that say nothing, or half a greeting."""
    peers = [Raw(endpoint) for _ in range(100)]
    for peer in peers[::2]:
        peer.socket.sendall(GREETING[:11])
    return peers


def crowd(endpoint: str) -> list[Raw]:
    """A thousand connections."""
    return [Raw(endpoint) for _ in range(1000)]


def deaf(endpoint: str) -> list[Raw]:
    """10,000 requests without reading a reply."""
    raw = Raw(endpoint).greet()
    hello(raw)
    many = frame(bytes(messages.encode_request(messages.Request(1, "areas", {}))[0])) * 100
    for _ in range(100):
        raw.socket.sendall(many)
    return [raw]


def gigabyte(endpoint: str) -> list[Raw]:
    """Frames that say they have a gigabyte, up to a hundred a second."""
    for _ in range(50):
        time.sleep(0.01)
        with Raw(endpoint).greet() as raw, contextlib.suppress(OSError):
            raw.socket.sendall(bytes([LONG]) + (1 << 30).to_bytes(8, "big") + bytes(1000))
            raw.is_ended()
    return []


def endless(endpoint: str) -> list[Raw]:
    """A message of endless frames, until its connection is ended."""
    chunk = frame(bytes(200), MORE) * 1000
    with Raw(endpoint).greet() as raw, contextlib.suppress(OSError):
        while True:
            raw.socket.sendall(chunk)
    return []


PEERS: dict[str, Callable[[str], list[Raw]]] = {
    "half open": half_open,
    "a thousand connections": crowd,
    "10,000 unread replies": deaf,
    "a frame of 1 GiB": gigabyte,
    "a message without end": endless,
}


FLOOD = "a message without end"  # as fast as a process can send, so it also takes its share of the processors: no bound is promised
AGAIN = ("a frame of 1 GiB", FLOOD)


def peers(kind: str, endpoint: str) -> None:
    """The process of the peers: does its worst until its input ends, and says so once it has begun; what is over at once again and again."""
    begun, held = False, list[Raw]()
    while not select.select([sys.stdin], [], [], 0)[0]:
        if not begun and kind in AGAIN:
            print("there", flush=True)
            begun = True
        held = PEERS[kind](endpoint)
        if held:
            print("there", flush=True)
            sys.stdin.read()
            break
    for raw in held:
        raw.close()


def sample(swap: gcma_shm.Swap, client: gcma_shm.Client, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of single loads, and of single buffers (asked for and freed)."""
    loads, buffers = [], []
    end = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        swap.load(0)
        loaded = time.perf_counter()
        client.alloc_contig(1 << 16).free()
        loads.append(loaded - begun)
        buffers.append(time.perf_counter() - loaded)
    return loads, buffers


def add(into: tuple[list[float], list[float]], samples: tuple[list[float], list[float]]) -> None:
    """Loads to loads, buffers to buffers."""
    for kept, more in zip(into, samples, strict=True):
        kept.extend(more)


def section(rows: list[list[object]], figures: dict[str, dict[str, float]]) -> Section:
    """The table, and the bound for all but the flood."""
    promised = {kind: max(figure["load"], figure["buffer"]) for kind, figure in figures.items() if kind != FLOOD}
    verdicts = [
        Verdict(f"beside {kind}: the worse of the two ratios", RATIO_MAX, worse) for kind, worse in promised.items()
    ]
    note = f"Medians, alone and as a ratio; no bound is promised for {FLOOD}, which also takes its share of the processors."
    columns = ["beside", "load, alone µs", "ratio", "buffer, alone µs", "ratio", "worst ms"]
    return Section("Latency of others", columns, rows, note, verdicts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each sample (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT / "adversity.json")
    parser.add_argument("--peers", nargs=2, metavar=("KIND", "ENDPOINT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peers:
        peers(*arguments.peers)
        return
    print(describe_machine(found := machine()))
    rows: list[list[object]] = []
    figures: dict[str, dict[str, float]] = {}
    with gcma_shm.embedded("32M") as client, gcma_shm.connect(client.endpoint, mapped=False) as messenger:
        swap = messenger.swap(0, 100, "behind")
        swap.store(0, os.urandom(client.page_size))
        for kind in PEERS:
            alone: tuple[list[float], list[float]] = ([], [])
            beside: tuple[list[float], list[float]] = ([], [])
            for _ in range(arguments.rounds):
                add(alone, sample(swap, client, arguments.seconds))
                command = [sys.executable, __file__, "--peers", kind, client.endpoint]
                with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hostile:
                    assert hostile.stdin is not None
                    assert hostile.stdout is not None
                    hostile.stdout.readline()
                    add(beside, sample(swap, client, arguments.seconds))
                    hostile.stdin.close()
            medians = [statistics.median(one) for one in (*alone, *beside)]
            load, buffer = medians[2] / medians[0], medians[3] / medians[1]
            figures[kind] = {
                "load": load,
                "buffer": buffer,
                "load_alone_us": medians[0] * 1e6,
                "buffer_alone_us": medians[1] * 1e6,
            }
            worst = max(*beside[0], *beside[1]) * 1e3
            rows.append(
                [
                    kind,
                    f"{medians[0] * 1e6:.0f}",
                    f"{load:.2f}",
                    f"{medians[1] * 1e6:.0f}",
                    f"{buffer:.2f}",
                    f"{worst:.1f}",
                ]
            )
    told = section(rows, figures)
    tell(told)
    options = {"rounds": arguments.rounds, "seconds": arguments.seconds}
    question = str(__doc__).splitlines()[0]
    write_json(arguments.out, question, found, options, figures, [told])


if __name__ == "__main__":
    main()
