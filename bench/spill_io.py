"""What do the three ways of reading and writing spill files cost, and what do they leave in the page cache?

Each way has a broker of its own and the same pages, far more than its arena has room for; they take turns, a batch each, within rounds. Asked are
stores written through, stores written behind with the file counted (`sync` ends the clock), loads of what is in the file alone, at random and in
order, and loads from memory; and how much of the spill file the page cache holds afterwards. Then, in C, on bare files: writes and reads of
1 to 64 neighbours in one call, single writes of a file that was laid so, and scattered writes one by one or 32 at once through io_uring. In the
end, how many writes overwriting saves on a skewed workload.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from _common import OUT, Ratio, Section, Summary, Verdict, describe_machine, machine, scratch, tell, write_json
from report import cell
from spill_bare import Bare, measure_bare

import gcma_shm
from gcma_shm import layout
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.swap import Swap
from gcma_shm.sizes import format_size, parse_size

WAYS = layout.SPILL_IO
TIMES = 4  # as many pages as the arena has room for
JOBS = (
    "store through",
    "store behind, synced",
    "load, file, random",
    "load, file, in order",
    "load, memory",
    "load, file, in reverse",
)
# Those of a group take turns within a round. Stores bring pages into memory that loads are to find in the file, so they come before.
GROUPS = ((JOBS[0],), (JOBS[1],), (JOBS[2], JOBS[3], JOBS[5]), (JOBS[4],))
SPILLED = 2  # state of a slot word
IN_ORDER = 4  # as many loads in order as at random
WINS = 3.0  # what a hit in memory has to be ahead of a load from the file, where that is not in the page cache


class Way:
    """One way: a broker, a type written through and one written behind, and the pages of both."""

    def __init__(self, name: str, size: int, page_size: int, directory: Path, stack: ExitStack) -> None:
        self.name = name
        directory.mkdir()
        self.directory = directory
        slots = TIMES * size // page_size
        self.client: EmbeddedClient = stack.enter_context(
            gcma_shm.embedded(size, page_size=page_size, slots=2 * slots, clients=8, spill_dir=directory, spill_io=name)
        )
        self.slots = slots
        self.through: Swap = self.client.swap(0, slots)
        self.behind: Swap = self.client.swap(1, slots, "behind")
        self.page = bytearray(np.random.default_rng(1).bytes(page_size))
        for first in range(0, slots, 64):
            which = range(first, min(first + 64, slots))
            self.through.store_many(which, bytes(self.page) * len(which))
            self.behind.store_many(which, bytes(self.page) * len(which))
        self.behind.sync()
        self._random = np.random.default_rng(2)

    def file(self, type_: int) -> Path:
        """The spill file of a type."""
        (found,) = self.directory.glob(f"*/{type_:03}.*")
        return found

    def job(self, name: str, batch: int) -> Callable[[], None]:
        """A batch of one job. What is to be loaded from the file is in the file alone when the job is made."""
        if name == JOBS[0]:
            return lambda: self._store(self.through, self._anywhere(batch))
        if name == JOBS[1]:
            return lambda: self._store(self.behind, self._anywhere(batch), sync=True)
        if name == JOBS[2]:
            return self._loads(self._random.choice(self._spilled(), batch, replace=False).tolist())
        if name in (JOBS[3], JOBS[5]):
            stretch = self._stretch(IN_ORDER * batch)
            return self._loads(stretch if name == JOBS[3] else stretch[::-1])  # nothing is read ahead of a reverse one
        hot = self._anywhere(batch // 4)
        self._store(self.through, hot)
        return self._loads(hot * 4)

    def _anywhere(self, count: int) -> list[int]:
        found: list[int] = self._random.integers(0, self.slots, count).tolist()
        return found

    def _store(self, swap: Swap, which: list[int], sync: bool = False) -> None:
        for n in which:
            swap.store(n, self.page)
        if sync:
            swap.sync()

    def _loads(self, which: list[int]) -> Callable[[], None]:
        def load() -> None:
            for n in which:
                self.through.load_into(n, self.page)

        return load

    def _spilled(self) -> npt.NDArray[np.int64]:
        """The slots whose pages are in the file alone."""
        plane = self.client._plane
        assert plane is not None
        g = plane.geometry
        words = plane.read_many(
            g.slots_at + layout.SLOT_BYTES * plane.read(g.type_at(0) + layout.TYPE_BASE_AT),
            self.slots,
            layout.SLOT_BYTES,
        )
        found: npt.NDArray[np.int64] = np.flatnonzero(
            np.array(words, np.uint64) >> np.uint64(33) & np.uint64(7) == SPILLED
        )
        return found

    def _stretch(self, batch: int) -> list[int]:
        """Neighbours, each but a few in the file alone."""
        spilled = np.zeros(self.slots + 1, np.int64)
        spilled[self._spilled()] = 1
        counts = np.convolve(spilled[:-1], np.ones(batch, np.int64), "valid")
        start = int(self._random.choice(np.flatnonzero(counts >= min(0.9 * batch, counts.max()))))
        return list(range(start, start + batch))

    def hits(self) -> tuple[int, int]:
        """Loads served from the file, and pages that were read ahead."""
        counters = self.client.stats()["counters"]
        return counters["hits_spill"], counters["read_ahead"]


def timed(job: Callable[[], object], operations: int) -> float:
    """Nanoseconds an operation."""
    begun = time.perf_counter_ns()
    job()
    return (time.perf_counter_ns() - begun) / operations


def measure_ways(page_size: int, size: int, rounds: int, directory: Path, bare: Bare) -> tuple[dict[str, Any], Section]:
    """The three ways side by side."""
    batch = 64
    with ExitStack() as stack:
        ways = [Way(name, size, page_size, directory / name, stack) for name in WAYS]
        times: dict[str, dict[str, list[float]]] = {job: {name: [] for name in WAYS} for job in JOBS}
        from_file: dict[str, dict[str, int]] = {job: dict.fromkeys(WAYS, 0) for job in JOBS}
        for number, group in ((number, group) for group in GROUPS for number in range(rounds)):
            for way in ways[number % 3 :] + ways[: number % 3]:
                for job in group:
                    before = way.hits()
                    work = way.job(job, batch)
                    times[job][way.name].append(timed(work, IN_ORDER * batch if job in (JOBS[3], JOBS[5]) else batch))
                    from_file[job][way.name] += way.hits()[0] - before[0]
        ahead = {way.name: way.hits()[1] for way in ways}
        time.sleep(2.5)  # twice what the broker's dropping takes to come round
        cache = {way.name: sum(bare.cached_bytes(way.file(type_)) for type_ in (0, 1)) for way in ways}
        whole = sum(way.file(type_).stat().st_size for way in ways for type_ in (0, 1)) // len(ways)
    loads = {job: rounds * (IN_ORDER if job == JOBS[3] else 1) * batch for job in (JOBS[2], JOBS[3])}
    notes = [f"{name} {ahead[name]:,}" for name in WAYS]
    shares = {job: ", ".join(f"{name} {from_file[job][name] / of:.0%}" for name in WAYS) for job, of in loads.items()}
    note = (
        f"µs a page. Loads that the file served: {'; '.join(f'{job}: {words}' for job, words in shares.items())}. "
        f"Pages read ahead: {', '.join(notes)}."
    )
    told = ways_section(page_size, times, {name: cache[name] / whole for name in WAYS}, note)
    summaries = {
        job: {name: Summary.of(np.asarray(values)) for name, values in of.items()} for job, of in times.items()
    }
    found = {"times": summaries, "page_cache": cache, "files": whole, "from_file": from_file, "read_ahead": ahead}
    return found, told


def ways_section(
    page_size: int, times: dict[str, dict[str, list[float]]], cached: dict[str, float], note: str
) -> Section:
    """The three ways side by side; a hit in memory is to win clearly in those that leave nothing in the page cache."""
    rows: list[list[object]] = [
        [
            job,
            *(float(np.median(times[job][name])) / 1000 for name in WAYS),
            *(str(Ratio.of(times[job][name], times[job]["buffered"])) for name in WAYS[1:]),
        ]
        for job in JOBS
    ]
    for words, one, other in (
        ("a load in order / in reverse", JOBS[3], JOBS[5]),
        ("a random load from the file / from memory", JOBS[2], JOBS[4]),
    ):
        rows.append([words, *(str(Ratio.of(times[one][name], times[other][name])) for name in WAYS), "", ""])
    rows.append(["of the files in the page cache", *(f"{cached[name]:.0%}" for name in WAYS), "", ""])
    verdicts = []
    for name in WAYS[1:]:
        ratio = Ratio.of(times[JOBS[2]][name], times[JOBS[4]][name])
        words = f"load from the file / from memory, {name}, {format_size(page_size)}"
        verdicts.append(Verdict(words, WINS, ratio.median, True, f"{cell(ratio.low)} to {cell(ratio.high)}"))
    columns = ["", *WAYS, *(f"{name} / buffered" for name in WAYS[1:])]
    return Section(f"The ways side by side, {format_size(page_size)}", columns, rows, note, verdicts)


def measure_saved(page_size: int, size: int, stores: int, directory: Path) -> tuple[dict[str, Any], Section]:
    """Stores written behind to slots of Zipf's distribution: how many of them were never written, as a newer one came first."""
    rows: list[list[object]] = []
    results = {}
    slots = TIMES * size // page_size
    for exponent in (0.0, 0.8, 1.0, 1.2):
        weights = np.arange(1, slots + 1, dtype=float) ** -exponent
        dice = np.random.default_rng(7)
        which = dice.permutation(slots)[dice.choice(slots, stores, p=weights / weights.sum())].tolist()
        target = directory / f"zipf-{exponent}"
        target.mkdir()
        with gcma_shm.embedded(size, page_size=page_size, slots=slots, clients=8, spill_dir=target) as client:
            swap = client.swap(0, slots, "behind")
            page = bytearray(np.random.default_rng(8).bytes(page_size))
            begun = time.perf_counter()
            for n in which:
                swap.store(n, page)
            swap.sync()
            elapsed = time.perf_counter() - begun
            counters = client.stats()["counters"]
        saved, cleaned = counters["overwrites_saved"], counters["cleaned"]
        rows.append(
            [
                exponent,
                len(set(which)),
                stores,
                cleaned,
                saved,
                f"{saved / stores:.0%}",
                elapsed / stores * 1e6,
            ]
        )
        results[str(exponent)] = {
            "stores": stores,
            "slots": len(set(which)),
            "cleaned": cleaned,
            "saved": saved,
            "seconds": elapsed,
        }
    columns = [
        "Zipf's exponent",
        "slots stored to",
        "stores",
        "cleaned",
        "overwrites_saved",
        "of the stores",
        "µs a store",
    ]
    note = f"Stores written behind to {slots:,} slots, four times the arena; counted until all is in the file."
    return results, Section("Writes that overwriting saves", columns, rows, note)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-size", nargs="+", default=["4K", "64K"])
    parser.add_argument("--size", default="32M", help="of each arena; its files are four times as large, each")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--stores", type=int, default=200_000, help="of the skewed workload")
    parser.add_argument("--parts", nargs="+", choices=("ways", "bare", "saved"), default=["ways", "bare", "saved"])
    parser.add_argument("--out", type=Path, default=OUT / "spill_io.json")
    options = parser.parse_args()
    found, size = machine(), parse_size(options.size)
    print(describe_machine(found))
    results: dict[str, Any] = {}
    sections: list[Section] = []
    with scratch() as directory:
        bare = Bare(directory)
        for text in options.page_size:
            page_size, place = parse_size(text), directory / text
            place.mkdir()
            results[text] = {}
            if "ways" in options.parts:
                results[text]["ways"], told = measure_ways(page_size, size, options.rounds, place, bare)
                sections.append(told)
            if "bare" in options.parts:
                results[text]["bare"], both = measure_bare(page_size, max(options.rounds // 3, 3), place, bare)
                sections += both
        if "saved" in options.parts:
            page_size = parse_size(options.page_size[0])
            results["saved"], told = measure_saved(page_size, size, options.stores, directory)
            sections.append(told)
    for section in sections:
        tell(section)
    write_json(options.out, (__doc__ or "").splitlines()[0], found, vars(options), results, sections)


if __name__ == "__main__":
    main()
