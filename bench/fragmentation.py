"""Does our placement of buffers fragment an area? A million allocations and frees against plain best fit, first fit and a binary buddy.

The broker's own code for free ranges, without a broker, in an area of 1 GiB that is held to 50 to 95 % by buffers of realistic sizes and lifetimes
(bench/mixes.py). Before each request, buffers end in order of their lifetimes until the request keeps within the load; so each request is at most
what is free, and a packer that may move what is held could grant it: every refusal is one that a perfect packer would have avoided. (After a
refusal the next buffer ends, as time goes on.) A buddy loses what rounding up takes, too: that counts as free.

All ways replay the same requests, and take turns within one run. Told: refusals, the largest free range, time an operation.
"""

from __future__ import annotations

import argparse
import sys
import time
from array import array
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np
from _common import OUT, Plot, Section, clock_cost_ns, describe_machine, machine, table, write_json
from mixes import DRAINED, MIXES, Requests
from placement import POLICIES, Policy

AREA_PAGES = 1 << 18  # 1 GiB
LOADS = [0.5, 0.7, 0.8, 0.9, 0.95]
OPERATIONS = 1_000_000
TURN = 5000  # requests, before another policy has its turn
LOOKS = 80  # at the largest free range, in a run
DOCS = Path(__file__).parent.parent / "docs"


@dataclass
class Replay:
    """One policy under one mix and load."""

    policy: Policy
    requests: Requests
    limit: int  # pages that may be held
    operations: int  # to do
    done: int = 0
    next: int = 0  # request
    held: int = 0
    now: float = 0.0
    refused: int = 0
    refused_pages: int = 0
    take_ns: array[int] = field(default_factory=lambda: array("Q"))
    give_ns: array[int] = field(default_factory=lambda: array("Q"))
    looks: list[tuple[int, int, int]] = field(default_factory=list)  # operations, largest, held
    _deaths: list[tuple[float, int, int]] = field(default_factory=list)

    def turn(self) -> bool:
        """Some of the requests; False: that was all."""
        take, clock, took = self.policy.take, time.perf_counter_ns, self.take_ns
        last = min(self.next + TURN, self.requests.sizes.size)
        sizes = self.requests.sizes[self.next : last].tolist()
        lives = self.requests.lives[self.next : last].tolist()
        for at, (size, life) in enumerate(zip(sizes, lives, strict=True), self.next):
            if at in self.requests.drains:
                self._free_until(int(self.held * DRAINED))
            self._free_until(self.limit - size)
            start = clock()
            place = take(size)
            took.append(clock() - start)
            self.done += 1
            if place is None:
                self.refused += 1
                self.refused_pages += size
                self._free_until(self.held - 1)
            else:
                heappush(self._deaths, (self.now + life, place, size))
                self.held += size
            if self.done * LOOKS >= len(self.looks) * self.operations:
                self.looks.append((self.done, self.policy.largest, self.held))
            if self.done >= self.operations:
                return False
        self.next = last
        return last < self.requests.sizes.size

    def _free_until(self, held_max: int) -> None:
        clock = time.perf_counter_ns
        while self.held > held_max:
            self.now, place, size = heappop(self._deaths)
            start = clock()
            self.policy.give(place, size)
            self.give_ns.append(clock() - start)
            self.held -= size
            self.done += 1

    def results(self, clock_ns: float) -> dict[str, Any]:
        """For JSON. The first tenth, while the area fills, is left out of the looks' mean."""
        requests = len(self.take_ns)
        ratios = [largest / (AREA_PAGES - held) for _, largest, held in self.looks]
        settled = self.looks[len(self.looks) // 10 :]
        return {
            "operations": self.done,
            "requests": requests,
            "avoidable": self.refused,
            "avoidable_share": self.refused / requests,
            "avoidable_pages_share": self.refused_pages / int(self.requests.sizes[:requests].sum()),
            "held_share_mean": float(np.mean([held for _, _, held in settled])) / AREA_PAGES,
            "largest_free_mean_pages": float(np.mean([largest for _, largest, _ in settled])),
            "largest_free_over_free_mean": float(np.mean(ratios[len(ratios) // 10 :])),
            "largest_free_over_free": [round(ratio, 3) for ratio in ratios],
            "take_ns": _times(self.take_ns, clock_ns),
            "give_ns": _times(self.give_ns, clock_ns),
        }


def _times(taken: array[int], clock_ns: float) -> dict[str, float]:
    times = np.maximum(np.asarray(taken, np.float64) - clock_ns, 0)
    if not times.size:
        return {"median": 0.0, "p99": 0.0, "worst": 0.0}
    return {"median": float(np.median(times)), "p99": float(np.percentile(times, 99)), "worst": float(times.max())}


def compare(mix: str, load: float, options: argparse.Namespace, clock_ns: float) -> dict[str, Any]:
    """All policies on the same requests, in turns."""
    requests = MIXES[mix](np.random.default_rng(options.seed), options.operations)
    limit = int(load * AREA_PAGES)
    replays = {
        name: Replay(policy(AREA_PAGES), requests, limit, options.operations) for name, policy in POLICIES.items()
    }
    going = dict(replays)
    while going:
        going = {name: replay for name, replay in going.items() if replay.turn()}
    return {name: replay.results(clock_ns) for name, replay in replays.items()}


def rows(load: float, found: dict[str, Any]) -> list[list[object]]:
    """A line for each policy."""
    return [
        [
            f"{load:.0%} {name}",
            one["requests"],
            one["avoidable"],
            f"{one['avoidable_share']:.3%}",
            f"{one['avoidable_pages_share']:.2%}",
            f"{one['held_share_mean']:.1%}",
            f"{one['largest_free_mean_pages'] / 256:.1f}",
            f"{one['largest_free_over_free_mean']:.0%}",
            *(f"{one[part][name] / 1e3:.2f}" for part in ("take_ns", "give_ns") for name in ("median", "p99")),
        ]
        for name, one in found.items()
    ]


def sections(results: dict[str, Any]) -> list[Section]:
    """What is published: refusals of each policy, and what choosing a place takes."""
    head = ["mix", "held", *POLICIES]
    by_load = [(mix, load, found) for mix, loads in results.items() for load, found in loads.items()]
    refused = [
        [mix, f"{float(load):.0%}", *(f"{100 * found[name]['avoidable_share']:.2g}" for name in POLICIES)]
        for mix, load, found in by_load
    ]
    times = [
        [mix, f"{float(load):.0%}", *(f"{found[name]['take_ns']['median'] / 1e3:.3g}" for name in POLICIES)]
        for mix, load, found in by_load
    ]
    note = "% of the requests that a packer which may move what is held would have granted."
    plot = Plot("fragmentation.svg", "Refusals and the largest free range over time")
    return [
        Section("Refused without need", head, refused, note, plots=[plot]),
        Section("To choose a place and take it", head, times, "µs, medians."),
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=OPERATIONS, metavar="N", help="allocations and frees of each policy, mix and load")  # fmt: skip
    parser.add_argument("--mix", nargs="+", choices=list(MIXES), default=list(MIXES), metavar="MIX")
    parser.add_argument("--load", type=float, nargs="+", default=LOADS, metavar="SHARE", help="held; default: 0.5 to 0.95")  # fmt: skip
    parser.add_argument("--plots", action="store_true", help="write docs/fragmentation.svg; needs matplotlib")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--out", type=Path, default=OUT / "fragmentation.json", metavar="FILE")
    options = parser.parse_args(argv)
    if options.operations < 1 or not all(0.1 <= load <= 1 for load in options.load):
        parser.error("operations must be at least 1, loads from 0.1 to 1")
    found, clock_ns = machine(), clock_cost_ns()
    print(describe_machine(found))
    head = ["held", "requests", "refused", "share", "of pages", "held", "largest MiB", "of free", "take us", "p99", "give us", "p99"]  # fmt: skip
    results: dict[str, Any] = {}
    for mix in options.mix:
        results[mix] = {f"{load:g}": compare(mix, load, options, clock_ns) for load in sorted(options.load)}
        lines = [row for load, by_policy in results[mix].items() for row in rows(float(load), by_policy)]
        print("\n" + table(head, lines, " ".join(f"{mix}: {MIXES[mix].__doc__}".split())), flush=True)
    question = "Does our placement of buffers fragment an area?"
    write_json(options.out, question, found, vars(options), results, sections(results))
    if options.plots:
        import plots

        plots.fragmentation(options.out, DOCS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
