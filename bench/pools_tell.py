"""What `pools.py` found, as sections: what was expected, a table for each job, memory, plots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pools_memory as memory
import pools_ours as ours
import pools_peers as peers
from _common import Bar, Plot, Ratio, Section, Verdict
from pools_job import CHUNK, CHUNKS, EXCHANGE, FAN_OUT, SMALL, WHOLE, Contender, Given
from pools_memory import Grown
from pools_ray import RAY
from report import cell

from gcma_shm.sizes import format_size

MIB = 1 << 20
TIMES_PICKLE, OF_KEPT, OF_SMALL, FURTHER_WORKER = 10, 1.1, 1.05, 0.05
AGAINST = {EXCHANGE: peers.KEPT, FAN_OUT: peers.KEPT, WHOLE: peers.KEPT, SMALL: peers.PICKLE, CHUNKS: peers.PICKLE}
# (job, the one above, the one below, limit, at least). The figure is the first one's time over the second one's.
EXPECTED: tuple[tuple[str, str, str, float, bool], ...] = (
    *(
        row
        for job in (EXCHANGE, FAN_OUT)
        for row in (
            (job, peers.PICKLE, ours.OURS, TIMES_PICKLE, True),
            (job, peers.LOKY, ours.OURS, TIMES_PICKLE, True),
            (job, RAY, ours.OURS, 1, True),
            (job, peers.JOBLIB, ours.OURS, 1, True),
        )
    ),
    (EXCHANGE, peers.JOBLIB_KEPT, ours.KEPT, 1, True),
    (EXCHANGE, ours.KEPT, peers.KEPT, OF_KEPT, False),
    (EXCHANGE, ours.LATE, peers.KEPT, OF_KEPT, False),
    (EXCHANGE, ours.BUILT, peers.KEPT, OF_KEPT, False),
    (FAN_OUT, ours.IN_ARENA, peers.KEPT, OF_KEPT, False),
    (WHOLE, RAY, ours.OURS, 1, True),
    (WHOLE, peers.JOBLIB, ours.OURS, 1, True),
    (WHOLE, ours.IN_ARENA, peers.KEPT, OF_KEPT, False),
    (SMALL, ours.OURS, peers.PICKLE, OF_SMALL, False),
    (CHUNKS, ours.OURS, peers.PICKLE, OF_SMALL, False),
)
Found = Mapping[str, Sequence[Contender]]  # by job
Memory = Mapping[str, Mapping[int, Grown]]


def sections(found: Found, grown: Memory, missing: Mapping[str, str], given: Given) -> list[Section]:
    """All of them; what was expected comes first."""
    verdicts = [*_verdicts(found, missing), *_memory_verdicts(grown, given)]
    note = f"Of the medians of the rounds' ratios. Not here: {'; '.join(missing.values()) or 'nothing'}."
    tables = [_table(job, contenders, given) for job, contenders in found.items()]
    return [Section("Expectations", [], [], note, verdicts), *tables, *([_memory(grown, given)] if grown else [])]


def title(job: str, given: Given) -> str:
    """What is done."""
    size = format_size(given.array.nbytes)
    return {
        EXCHANGE: f"{size} to a worker, and an equally large result back",
        FAN_OUT: f"The same {size} to {given.tasks} tasks that sum a part of it each, {given.workers} workers",
        WHOLE: f"The same {size} to {given.tasks} tasks that sum all of it, {given.workers} workers",
        SMALL: f"{given.small:,} small tasks, one submit each, {given.workers} workers",
        CHUNKS: f"{given.small:,} small tasks, map in chunks of {CHUNK} (joblib: as it chooses), {given.workers} workers",
    }[job]


def _verdicts(found: Found, missing: Mapping[str, str]) -> Iterator[Verdict]:
    for job, above, below, limit, at_least in EXPECTED:
        by_name = {contender.name: contender for contender in found.get(job, ())}
        words = f"{job}: {above} / {below}"
        if above in by_name and below in by_name:
            ratio = by_name[above].over(by_name[below])
            yield Verdict(words, limit, ratio.median, at_least, f"{cell(ratio.low)} to {cell(ratio.high)}")
        elif job in found:
            yield Verdict(words, limit, None, at_least, missing.get(above, "not asked for"))


def _memory_verdicts(grown: Memory, given: Given) -> Iterator[Verdict]:
    for name, by_number in grown.items():
        least, most = min(by_number), max(by_number)
        if name != memory.PICKLE and most > least:
            further = [
                (by_number[most].private - by_number[least].private),
                (by_number[most].all - by_number[least].all),
            ]
            share = max(further) / (most - least) / given.array.nbytes
            words = f"memory: what each worker after the first adds, of the array: {name}"
            yield Verdict(words, FURTHER_WORKER, share, why=f"{least} to {most} workers, private or in proportion")


def _table(job: str, contenders: Sequence[Contender], given: Given) -> Section:
    unit, factor = ("ms", 1e3) if job in (EXCHANGE, FAN_OUT, WHOLE) else ("µs a task", 1e6 / given.small)
    by_name = {contender.name: contender for contender in contenders}
    columns = ["", unit, f"× “{ours.OURS}”", *([f"× {AGAINST[job]}"] if AGAINST[job] in by_name else []), "rounds"]
    rows = []
    for contender in sorted(contenders, key=lambda one: one.median_s):
        bases = [by_name[name] for name in (ours.OURS, AGAINST[job]) if name in by_name]
        rounds = int(np.count_nonzero(~np.isnan(contender.rounds_s)))
        rows.append(
            [contender.name, contender.median_s * factor, *(_ratio(contender.over(base)) for base in bases), rounds]
        )
    note = (
        f"Medians of the rounds, in brackets the middle 80 % of their ratios. What slow contenders do in a few rounds only is compared with those rounds. "
        f"{NOTES[job]}"
    )
    slug = job.replace(",", "").replace(" ", "-")
    bars = [_bar(contender, factor) for contender in contenders]
    plot = Plot(
        f"benchmarks/pools-{slug}.svg",
        title(job, given),
        f"{unit}, log scale; the line: middle 80 % of the rounds",
        bars,
    )
    return Section(title(job, given), columns, rows, note, plots=[plot])


NOTES = {
    EXCHANGE: "The task is `array * 2.0`; to have the result in hand and to give it back is in the time, to look whether it is right is not. In place: "
    "`numpy.multiply(array, 2.0, out=out)` in memory that was there before.",
    FAN_OUT: "Each task reads its own part only, so little is computed: what the hand-over itself takes.",
    WHOLE: "Whoever pickles would take what it takes above, and the sums.",
    SMALL: "Each task squares a number.",
    CHUNKS: "Each task squares a number.",
}  # fmt: skip


def _ratio(ratio: Ratio) -> str:
    return f"{cell(ratio.median)} ({cell(ratio.low)}-{cell(ratio.high)})"


def _bar(contender: Contender, factor: float) -> Bar:
    low, median, high = (float(value) * factor for value in np.nanpercentile(contender.rounds_s, [10, 50, 90]))
    return Bar(contender.name, median, low, high, contender.name.startswith("ours"))


def _memory(grown: Memory, given: Given) -> Section:
    numbers = sorted(next(iter(grown.values())))
    columns = ["", *(f"{number} worker{'s' * (number > 1)}" for number in numbers)]
    rows = [
        [f"{name}: {words}", *(f"{getattr(by_number[number], part) / MIB:.1f}" for number in numbers)]
        for part, words in (("private", "private to the workers"), ("all", "in proportion, all processes"))
        for name, by_number in grown.items()
    ]
    note = (
        "MiB that came with the array, all workers together, when each has read all of it and holds it (`smaps_rollup`). In proportion: a page that k processes "
        "have mapped counts as 1/k for each, summed over the workers, their parent and the broker."
    )
    return Section(f"Memory of N workers over one array of {format_size(given.array.nbytes)}", columns, rows, note)


def plain(found: Found, grown: Memory) -> dict[str, Any]:
    """For JSON: every round."""
    return {
        "seconds": {job: {one.name: [None if math.isnan(value) else value for value in one.rounds_s] for one in contenders} for job, contenders in found.items()},
        "memory_bytes": {name: {number: vars(one) for number, one in by_number.items()} for name, by_number in grown.items()},
    }  # fmt: skip
