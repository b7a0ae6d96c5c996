"""`gcma stress`: does an arena keep its promises while everything goes wrong?

Rounds of stress, each over a fresh small arena with a broker of its own: worker processes store, load, invalidate and sync, a guest takes contiguous ranges and
reservations and proves their bytes, an operator drains an area and ends a type; meanwhile processes are killed, stopped and continued, and the disk is full for
moments. Every operation is recorded with its start and its end. After each round the history of every slot must be that of an atomic register, every acknowledged
store must be loaded back, and nothing of the dead may be left. Exit status 1 when anything was wrong. The seed, which is printed, chooses what happens in which order.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterable

from gcma_shm.clients.chaos import KINDS
from gcma_shm.clients.stress_round import Rage, Result, Round, scratch
from gcma_shm.sizes import format_size, parse_size

ROUND_S = 10.0
TOLD_EVERY_S = 60.0
COUNTS = (
    "kills",
    "stops",
    "restarts",
    "allocations",
    "claims",
    "drains",
    "ends",
    "full",
    "spill_failures",
)  # in this order


class Teller:
    """Says every minute, and at the end, what it has come to."""

    def __init__(self, every_s: float) -> None:
        self.total = Result()
        self._begun = time.monotonic()
        self._every_s = every_s
        self._next = self._begun + every_s

    def meanwhile(self, running: Round) -> Callable[[], None]:
        """To be called while a round is under way."""

        def tell() -> None:
            if time.monotonic() >= self._next:
                self._next += self._every_s
                so_far = Result(running.operations, running.counts(), [], running.result.losses)
                so_far.merge(self.total)
                print(self.line(so_far), flush=True)

        return tell

    def line(self, result: Result) -> str:
        """All figures."""
        minutes, seconds = divmod(int(time.monotonic() - self._begun), 60)
        counts = ", ".join(f"{name} {result.counts[name]}" for name in COUNTS)
        return f"{minutes:4}:{seconds:02}  operations {result.operations}, {counts}, losses {result.losses}"


def parse_chaos(words: str) -> frozenset[str]:
    """`"kill,stop"`: kinds of chaos; `none`, `all`."""
    if words in ("none", "all"):
        return frozenset(KINDS if words == "all" else ())
    kinds = frozenset(words.split(","))
    if not kinds <= frozenset(KINDS):
        raise ValueError(words)
    return kinds


def stress(rages: Iterable[Rage], seconds: float, teller: Teller) -> None:
    """Round after round until the time is over, or something was wrong."""
    deadline = time.monotonic() + seconds
    for rage in rages:
        left = deadline - time.monotonic()
        if left <= 0 or teller.total.losses:
            return
        with scratch() as directory, Round(rage, directory) as running:
            tell = teller.meanwhile(running)
            running.rage(min(ROUND_S, left), tell)
            result = running.judge(meanwhile=tell)
            if result.losses:
                running.keep()
                print(f"the logs of that round are in {directory}", flush=True)
        for words in result.lost:
            print(f"seed {rage.seed}, pages of {format_size(rage.page_size)}: {words}", flush=True)
        teller.total.merge(result)


def main(arguments: list[str] | None = None) -> int:
    """Runs the stress; returns the exit status."""
    parser = argparse.ArgumentParser(prog="gcma stress", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long (default %(default)s)")
    parser.add_argument("--workers", type=int, default=6, metavar="N", help="at once (default %(default)s)")
    parser.add_argument(
        "--page-size", default="4K,64K", metavar="SIZE[,SIZE...]", help="in turn, round by round (default %(default)s)"
    )
    parser.add_argument(
        "--chaos",
        type=parse_chaos,
        default=frozenset(KINDS),
        metavar="KIND[,KIND...]",
        help=f"of {', '.join(KINDS)}; all; none (default: all)",
    )
    parser.add_argument(
        "--seed", type=int, default=time.time_ns() & 0xFFFFFFFF, metavar="N", help="(default: the time)"
    )
    parser.add_argument(
        "--tell-every", type=float, default=TOLD_EVERY_S, metavar="SECONDS", help="(default %(default)s)"
    )
    options = parser.parse_args(arguments)
    sizes = [parse_size(size) for size in options.page_size.split(",")]
    if options.workers < 1 or options.seconds <= 0 or options.tell_every <= 0:
        parser.error("--workers must be at least 1, --seconds and --tell-every more than 0")
    print(
        f"seed {options.seed}; chaos: {', '.join(kind for kind in KINDS if kind in options.chaos) or 'none'}; "
        f"{options.workers} workers; pages of {', '.join(format_size(size) for size in sizes)}",
        flush=True,
    )
    teller = Teller(options.tell_every)
    rages = (
        Rage(size, options.workers, options.chaos, options.seed + number)
        for number, size in enumerate(itertools.cycle(sizes))
    )
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing is left then, either
    try:
        stress(rages, options.seconds, teller)
    finally:
        signal.signal(signal.SIGTERM, before)
        print(teller.line(teller.total), flush=True)
    return 1 if teller.total.losses else 0


if __name__ == "__main__":
    sys.exit(main())
