"""`gcma stress`: does an arena keep its promises while everything goes wrong?

Rounds of stress, each over a fresh small arena with a broker of its own: worker processes store, load, invalidate and sync, a guest takes contiguous ranges and
reservations and proves their bytes, an operator drains an area and ends a type; meanwhile processes are killed, stopped and continued, the disk is full for
moments, and the broker is killed and started again. Every operation is recorded with its start and its end. After each round the history of every slot must be that of an atomic register, every acknowledged
store must be loaded back, and nothing of the dead may be left. Exit status 1 when anything was wrong. The seed, which is printed, chooses what happens in which order.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable

from gcma_shm.clients.chaos import KINDS
from gcma_shm.clients.stress_round import Rage, Result, Round, scratch
from gcma_shm.errors import GcmaError
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
    """Says every minute, and at the end, what it has come to. `as_json`: figures to standard output, one object a line; words to standard error."""

    def __init__(self, every_s: float, as_json: bool) -> None:
        self.total = Result()
        self._begun = time.monotonic()
        self._every_s = every_s
        self._next = self._begun + every_s
        self._as_json = as_json
        self._signals: list[int] = []

    def interrupt(self, number: int, _frame: object) -> None:
        """A signal's handler: the next wait ends the run. (It does not raise here: what is raised within a fork's hooks is ignored.)"""
        self._signals.append(number)

    def say(self, words: str) -> None:
        """Something for people."""
        print(words, file=sys.stderr if self._as_json else sys.stdout, flush=True)

    def meanwhile(self, running: Round) -> Callable[[], None]:
        """To be called while a round is under way."""

        def tell() -> None:
            if self._signals:
                raise SystemExit(128 + self._signals[0])
            if time.monotonic() >= self._next:
                self._next += self._every_s
                so_far = Result(running.operations, running.counts(), [], running.result.losses)
                so_far.merge(self.total)
                self.tell(so_far)

        return tell

    def tell(self, result: Result) -> None:
        """All figures."""
        seconds = time.monotonic() - self._begun
        figures = {"operations": result.operations} | {name: result.counts[name] for name in COUNTS}
        figures["losses"] = result.losses
        if self._as_json:
            print(json.dumps({"seconds": round(seconds, 1)} | figures), flush=True)
            return
        minutes, rest = divmod(int(seconds), 60)
        self.say(f"{minutes:4}:{rest:02}  {', '.join(f'{name} {value}' for name, value in figures.items())}")


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
            running.meanwhile = teller.meanwhile(running)
            running.rage(min(ROUND_S, left))
            result = running.judge()
            if result.losses:
                running.keep()
                teller.say(f"the logs of that round are in {directory}")
        for words in result.lost:
            teller.say(f"seed {rage.seed}, pages of {format_size(rage.page_size)}: {words}")
        teller.total.merge(result)


def parse_sizes(words: str) -> list[int]:
    """`"4K,64K"`."""
    return [parse_size(word) for word in words.split(",")]


def main(arguments: list[str] | None = None) -> int:
    """Runs the stress; returns the exit status."""
    options = _options(arguments)
    teller = Teller(options.tell_every, options.json)
    teller.say(
        f"seed {options.seed}; chaos: {', '.join(kind for kind in KINDS if kind in options.chaos) or 'none'}; "
        f"{options.workers} workers; pages of {', '.join(format_size(size) for size in options.page_size)}"
    )
    rages = (
        Rage(size, options.workers, options.chaos, options.seed + number)
        for number, size in enumerate(itertools.cycle(options.page_size))
    )
    before = {number: signal.signal(number, teller.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stress(rages, options.seconds, teller)
    except (GcmaError, OSError, ValueError) as error:
        print(f"gcma stress: {error}", file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        teller.tell(teller.total)
    return 1 if teller.total.losses else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gcma stress", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long (default %(default)s)")
    parser.add_argument("--workers", type=int, default=6, metavar="N", help="at once (default %(default)s)")
    parser.add_argument(
        "--page-size",
        type=parse_sizes,
        default="4K,64K",
        metavar="SIZE[,SIZE...]",
        help="in turn, round by round (default %(default)s)",
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
    parser.add_argument("--json", action="store_true", help="figures for programs, one object a line")
    options = parser.parse_args(arguments)
    if options.workers < 1 or options.seconds <= 0 or options.tell_every <= 0:
        parser.error("--workers must be at least 1, --seconds and --tell-every more than 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
