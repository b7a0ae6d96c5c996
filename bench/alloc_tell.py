"""Tables of `alloc.py`, and its results for JSON; and what was expected beforehand, met or missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from _common import Plot, Section, Verdict, table
from alloc_job import Samples, Taken, curve, figures, finite, times_slower

from gcma_shm.sizes import format_size

MIB = 1 << 20
OURS = "alloc_contig"
QUANTILES = ("median", "p99", "p99.9", "worst")
PAPER_FROM = 512 * 4096  # bytes: smaller ones are not in the paper's claim
PAPER_LOW, PAPER_HIGH = 15, 130


def tell(setting: str, taken: Taken) -> dict[str, Any]:
    """Prints a table for each size; returns the results for JSON."""
    results: dict[str, Any] = {}
    for nbytes, by_job in taken.items():
        ours = by_job.get(OURS, Samples())
        rows, size_results = [], {}
        for name, samples in by_job.items():
            found = {part: figures(getattr(samples, part)) for part in ("hand_over", "usable")}
            ratios = {part: times_slower(getattr(samples, part), getattr(ours, part)) for part in found}
            lent = finite(samples.lent)
            rows.append(
                [
                    name,
                    *(value for part in found for value in _microseconds(found[part])),
                    *(_ratio(ratios[part]) for part in ratios),
                    samples.failures,
                    f"{lent.min():.0%}" if lent.size else "-",
                    (found["hand_over"] or {}).get("samples", 0),
                ]
            )
            size_results[name] = {
                **{f"{part}_ns": found[part] for part in found},
                **{f"{part}_over_{OURS}": ratios[part] for part in ratios},
                **{f"{part}_curve_ns": curve(getattr(samples, part)) for part in found},
                "failures": samples.failures,
                "lent_before_mean": float(lent.mean()) if lent.size else None,
                "lent_before_least": float(lent.min()) if lent.size else None,
            }
        head = [
            "",
            "hand-over",
            *QUANTILES[1:],
            "usable",
            *QUANTILES[1:],
            "hand-over ×",
            "usable ×",
            "fail",
            "lent",
            "n",
        ]
        title = (
            f"\n{setting}: {format_size(nbytes)}, {-(-nbytes // 4096)} pages; us, hand-over and usable: medians; lent: least before; "
            f"×: over {OURS}'s, median of the rounds and middle 80 %"
        )
        print(table(head, rows, title), flush=True)
        results[format_size(nbytes)] = {"nbytes": nbytes, "jobs": size_results}
    return results


def _microseconds(found: Mapping[str, float] | None) -> list[str]:
    return [f"{found[name] / 1e3:.0f}" if found else "-" for name in QUANTILES]


def _ratio(ratio: tuple[float, float, float] | None) -> str:
    return f"{ratio[0]:.3g} ({ratio[1]:.3g}-{ratio[2]:.3g})" if ratio else "-"


class Expectations:
    """What was expected of a buffer of 64 MiB, and of the paper's ratio, checked against one setting's samples."""

    def __init__(self, setting: str, taken: Taken) -> None:
        self._setting = setting
        self._taken = taken
        self._at_64 = taken.get(64 * MIB, {})

    def verdicts(self) -> list[Verdict]:
        """All of them. The 99th percentile of ours is held against theirs, and against their median, which is harder."""
        found = []
        cma = [name for name in self._at_64 if name.startswith("CMA")]
        for theirs, part, share in (
            ("SharedMemory", "usable", 100),
            ("plasma", "hand_over", 50),
            *((name, "hand_over", 20) for name in cma),
        ):
            for quantile in ("p99", "median"):
                figure = self._times(theirs, part, quantile)
                words = f"{theirs} {part.replace('_', '-')} {quantile} / hand-over p99, 64 MiB"
                found.append(Verdict(words, share, figure, at_least=True))
        for job, times in ((OURS, 20), (f"{OURS}, no prefault", 2)):
            ratio = times_slower(self._samples("SharedMemory").usable, self._samples(job).usable)
            found.append(
                Verdict(
                    f"SharedMemory usable / {job} usable, 64 MiB", times, ratio[0] if ratio else None, at_least=True
                )
            )
        for job in ("claim", "claim, warm"):
            claim = figures(self._samples(job).hand_over)
            found.append(Verdict(f"{job} of 64 MiB, median us", 40, claim["median"] / 1e3 if claim else None))
        for name in (name for name in cma if "O_DIRECT" in name):
            found += [self._paper(name, ours) for ours in (OURS, "claim")]
        return found

    def _samples(self, job: str) -> Samples:
        return self._at_64.get(job, Samples())

    def _times(self, theirs: str, part: str, quantile: str) -> float | None:
        their, our = figures(getattr(self._samples(theirs), part)), figures(self._samples(OURS).hand_over)
        return their[quantile] / our["p99"] if their and our else None

    def _paper(self, cma: str, ours: str) -> Verdict:
        """The least of the sizes must reach the paper's lower end."""
        ratios = []
        for nbytes, by_job in self._taken.items():
            if nbytes >= PAPER_FROM and cma in by_job and ours in by_job:
                ratio = times_slower(by_job[cma].hand_over, by_job[ours].hand_over)
                ratios += [ratio[0]] if ratio else []
        up_to = f"; largest {max(ratios):.3g}" if ratios else ""
        words = f"paper ({PAPER_LOW} to {PAPER_HIGH} ×): {cma} / {ours}, from 512 pages up, least of the sizes{up_to}"
        return Verdict(words, PAPER_LOW, min(ratios) if ratios else None, at_least=True)


def judge(setting: str, taken: Taken, swept: Mapping[str, Any] | None) -> list[Verdict]:
    """Prints what was expected and what came. Nothing fails by it."""
    verdicts = Expectations(setting, taken).verdicts()
    if swept:
        worst = max(float(np.float64(swept[pages]["ns_per_page"]["take PUBLISHED"].median)) for pages in swept if int(pages) >= 4096)  # fmt: skip
        verdicts.append(Verdict("sweep, ns a page, from 4096 pages up", 2.0, worst))
    rows = [[v.what, v.bound, "-" if v.figure is None else f"{v.figure:.3g}", v.word] for v in verdicts]
    print("\n" + table([f"expected; {setting}", "limit", "figure", ""], rows), flush=True)
    return verdicts


def section(setting: str, sizes: Mapping[str, Any], verdicts: Sequence[Verdict], plots: Sequence[Plot]) -> Section:
    """What is published of a setting: 64 MiB, or the largest size there is."""
    size = max(sizes.values(), key=lambda one: (one["nbytes"] == 64 * MIB, one["nbytes"]))
    rows = []
    for name, job in size["jobs"].items():
        hand_over, usable = job["hand_over_ns"], job["usable_ns"]
        cells = [
            f"{found[quantile] / 1e3:,.3g}" if found[quantile] < 1e6 else f"{found[quantile] / 1e3:,.0f}"
            for found in (hand_over, usable)
            if found
            for quantile in ("median", "p99")
        ]
        cells += ["-"] * (4 - len(cells))
        rows.append([name, *cells, (hand_over or {}).get("samples", 0), job["failures"]])
    columns = ["", "hand-over, µs", "p99", "usable, µs", "p99", "samples", "failures"]
    note = (
        "Medians. Hand-over: from the request to the address; usable: until the first byte of every 4 KiB is written."
    )
    return Section(f"{format_size(size['nbytes'])}, {setting}", columns, rows, note, verdicts, plots)
