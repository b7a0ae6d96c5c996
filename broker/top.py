"""The command `gcma top`: what an arena's clients do, a second, from the counters in the arena itself.

No request is sent. Each look opens the arena anew, so a broker's restart is no matter; another arena begins a new count.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gcma_shm import layout
from gcma_shm._core import COUNTERS
from gcma_shm.areas import Area
from gcma_shm.broker.showing import Figures, add_command, looked_at, print_table
from gcma_shm.check import Inspected
from gcma_shm.entries import read_clients, word
from gcma_shm.layout import Geometry
from gcma_shm.records import GENERATION_SHIFT
from gcma_shm.standing import Standing

INTERVAL_S = 1.0
CLEAR = "\x1b[H\x1b[J"  # of a terminal: to the corner, and nothing below
PLACES = tuple(name for name in COUNTERS if name.startswith("hits_"))
TOLD = (*PLACES, "misses", "stores", "promotions", "evictions", "discards", "refaults", "cleaned")
COLUMNS = ("loads", *PLACES, "misses", "stores", "promotions", "evictions", "claims", "allocations")
HEADS = {name: name.removeprefix("hits_") for name in COLUMNS}
LINES_A_HEAD = 20  # where lines are appended


@dataclass(frozen=True)
class Sample:
    """Of one moment: counters by client (with the record's generation, which tells a new client), and of the arena."""

    at: float
    arena_id: bytes  # a broker that was stopped and started again begins another arena, of the same epoch
    epoch: int
    counters: Mapping[tuple[int, int], Mapping[str, int]]
    pids: Mapping[int, int]
    allocations: int


def add_top(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser of `gcma`."""
    parser = add_command(commands, "top", "what clients do, a second", _top)
    parser.add_argument("--interval", type=float, default=INTERVAL_S, metavar="S", help="seconds (default %(default)s)")
    parser.add_argument("--count", type=int, metavar="N", help="end after so many (default: Ctrl-C ends it)")


def _top(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    if not parsed.interval > 0 or (parsed.count is not None and parsed.count < 1):
        parser.error("--interval must be more than 0, --count at least 1")
    redraws = sys.stdout.isatty()
    try:
        for number, rates in enumerate(_watched(parsed.endpoint, parsed.interval, parsed.count)):
            if parsed.json:
                print(json.dumps(rates), flush=True)
            else:
                _tell(rates, redraws, number % LINES_A_HEAD == 0)
    except KeyboardInterrupt:
        return 0
    return 0


def _watched(endpoint: str, interval_s: float, count: int | None) -> Iterator[Figures]:
    """Rates between one look and the next. Raises ArenaError when there is no arena (any more)."""
    before = _look(endpoint)
    told = 0
    while count is None or told < count:
        time.sleep(interval_s)
        now = _look(endpoint)
        if (rates := rates_between(before, now)) is not None:
            yield rates
            told += 1
        before = now


def _look(endpoint: str) -> Sample:
    sample: Sample = looked_at(endpoint, _sampled)["sample"]
    return sample


def _sampled(inspected: Inspected, geometry: Geometry, _areas: list[Area], _standing: Standing) -> Figures:
    memory = inspected.memory
    clients = read_clients(memory, geometry)
    counters = {}
    for number in (layout.NOBODY, layout.BROKER, *clients):
        at = geometry.client_at(number)
        generation = word(memory, at + layout.CLIENT_STATE_AT) >> GENERATION_SHIFT if number > layout.BROKER else 0
        counted = {
            name: word(memory, at + layout.CLIENT_COUNTERS_AT + 8 * index) for index, name in enumerate(COUNTERS)
        }
        counters[number, generation] = counted | {"claims": word(memory, at + layout.CLIENT_CLAIMS_AT)}
    begin, end = geometry.allocations_at, geometry.allocation_at(geometry.allocations_max)
    with memory[begin:end].cast(
        "Q"
    ) as words:  # each entry's generation counts the buffers and reservations that it was
        allocations = sum(state >> layout.KIND_BITS for state in words[:: layout.ALLOCATION_BYTES // 8].tolist())
    pids = {number: client.pid for number, client in clients.items()}
    pids[layout.BROKER] = word(memory, layout.BROKER_PID_AT)
    _, _, arena_id = layout.read_header(memory, len(memory))
    return {"sample": Sample(time.monotonic(), arena_id, word(memory, layout.EPOCH_AT), counters, pids, allocations)}


def rates_between(before: Sample, after: Sample) -> Figures | None:
    """A second, of the arena and of each client; None: they are not of one arena."""
    seconds = after.at - before.at
    whole = {name: _total(after, name) - _total(before, name) for name in TOLD}
    if after.arena_id != before.arena_id:
        return None
    if seconds <= 0 or after.epoch < before.epoch or after.allocations < before.allocations:
        return None
    clients = []
    for (number, generation), counted in sorted(after.counters.items()):
        if number == layout.NOBODY:
            continue
        earlier = before.counters.get((number, generation), {})
        done = {name: max(counted[name] - earlier.get(name, 0), 0) for name in (*TOLD, "claims")}
        clients.append({"client": number, "pid": after.pids.get(number, 0)} | _a_second(done, seconds))
    # A client that leaves gives its counts to nobody's record, in several steps: a look in between would see them less.
    done = {name: max(count, 0) for name, count in whole.items()}
    arena = _a_second(done | {"allocations": after.allocations - before.allocations}, seconds)
    return {
        "seconds": round(seconds, 6),
        "arena": arena | {"claims": sum(one["claims"] for one in clients)},
        "clients": clients,
    }


def _total(sample: Sample, name: str) -> int:
    return sum(counted[name] for counted in sample.counters.values())


def _a_second(done: Mapping[str, int], seconds: float) -> Figures:
    loads = sum(done[name] for name in (*PLACES, "misses"))
    return {name: round(count / seconds, 1) for name, count in {"loads": loads, **done}.items()}


def _tell(rates: Figures, redraws: bool, with_head: bool) -> None:
    """The arena, and whoever did something; all clients where the screen is drawn anew."""
    rows = [("all", "", *(f"{rates['arena'][name]:.0f}" for name in COLUMNS))]
    for one in rates["clients"]:
        if redraws or any(one[name] for name in (*TOLD, "loads", "claims")):
            who = "broker" if one["client"] == layout.BROKER else one["client"]
            rows.append((who, one["pid"] or "", *(f"{one[name]:.0f}" if name in one else "" for name in COLUMNS)))
    head = ("client", "process", *HEADS.values())
    if redraws:
        sys.stdout.write(CLEAR)
    stamp = time.strftime("%H:%M:%S")
    if redraws:
        print(
            f"{stamp}, a second, over {rates['seconds']:.1f} s; client 1, the broker: also for those that send messages\n"
        )
        print_table(head, rows)
    else:
        for n, row in enumerate(([head] if with_head else []) + rows):
            first = "time" if with_head and n == 0 else stamp
            print(
                f"{first:<8}  "
                + "  ".join(f"{cell!s:>{max(len(name), 7)}}" for cell, name in zip(row, head, strict=True))
            )
    sys.stdout.flush()
