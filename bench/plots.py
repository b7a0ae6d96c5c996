"""Plots of what the benchmarks here measured, from their JSON alone: `plots.py alloc`, `plots.py fragmentation`, `plots.py lent`,
`plots.py policy`; `bars` for `publish.py`.

Readable on a light and on a dark page: a panel of their own behind them. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from _common import OUT, Bar
from alloc_job import POINTS
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

DOCS = Path(__file__).parent.parent / "docs"
MIB = 1 << 20
LONG_DECIMALS = re.compile(r"(?<![\w#.])-?\d+\.\d{3,}(?![\w.])")
PAPER, INK, GRID = "#fbfbf8", "#30343b", "#dcdcd4"
STYLE: Any = {
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "legend.frameon": False, "legend.fontsize": 8,
    "lines.linewidth": 1.6, "svg.hashsalt": "gcma-bench", "svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Arial"],
}  # fmt: skip
# Ours in blues and greens, the others in warm colours; each job keeps its colour everywhere.
COLOURS = {
    "alloc_contig": "#1261a8", "claim": "#1a9e77", "idle": "#7fb3dd", "SharedMemory": "#d1495b", "posix-ipc": "#e39aa4",
    "plasma": "#7a4fa3", "O_DIRECT": "#c06a00", "buffered": "#e0b050",
}  # fmt: skip
OURS, THEIRS = "#1261a8", "#d9a441"
# What stays in memory: ours, and libcachesim's figures.
HITS = {"s3fifo": "#1261a8", "sieve": "#1a9e77", "clock": "#7fb3dd"}
HITS_KNOWN = {"LRU": "#d1495b", "SIEVE": "#e0b050", "S3-FIFO": "#c06a00", "Belady": "#888888"}
POLICIES = {"ours": "#1261a8", "best fit": "#2a9d8f", "first fit": "#c06a00", "buddy": "#7a4fa3"}
RATIO = "lent/idle, undelayed"  # wall time is at the mercy of whatever else the machine does
PERIOD_COLOURS = ("#1261a8", "#1a9e77", "#7a4fa3", "#c06a00")


@contextmanager
def figure(
    path: Path, rows: int, columns: int, size: tuple[float, float], share_y: bool = False
) -> Iterator[list[Axes]]:
    """Its axes, row by row; written in the end, with nothing in it that changes from run to run but the data."""
    with mpl.rc_context(STYLE):
        drawn, axes = plt.subplots(
            rows, columns, figsize=size, sharey="row" if share_y else False, squeeze=False, layout="constrained"
        )
        flat = [ax for row in axes for ax in row]
        yield flat
        if named := {label: line for ax in flat for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}:
            drawn.legend(list(named.values()), list(named), loc="outside lower center", ncols=min(len(named), 4))
        drawn.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(drawn)
    # A tenth of a point is finer than anyone sees, and half of the file.
    path.write_text(LONG_DECIMALS.sub(lambda found: f"{float(found[0]):.1f}", path.read_text()))
    print(f"written to {path} ({path.stat().st_size >> 10} KiB)")


def colour(job: str) -> str:
    """Of a job, by its name or what it ends with; another's is grey."""
    return COLOURS.get(job) or next((value for name, value in COLOURS.items() if job.endswith(name)), "#888888")


def microseconds(value: float, _position: object) -> str:
    """A tick's label."""
    for unit, below in (("µs", 1e6), ("ms", 1e9)):
        if value < below:
            return f"{value / (below / 1e3):g} {unit}"
    return f"{value / 1e9:g} s"


def shown(jobs: dict[str, Any]) -> list[str]:
    """The jobs that a plot has room for: not those with an empty page table, and not the echo."""
    return [name for name in jobs if ", no prefault" not in name and ", warm" not in name and name != "echo"]


def alloc(source: Path, directory: Path) -> None:
    """The two of `alloc.py`."""
    settings = json.loads(source.read_text())["results"]["settings"]
    parts = (("hand_over", "hand-over"), ("usable", "usable"))
    at_64 = [(one, size["jobs"]) for one in settings for size in one["sizes"].values() if size["nbytes"] == 64 * MIB]
    if at_64:
        with figure(directory / "alloc-cdf.svg", len(at_64), 2, (9.5, 3.1 * len(at_64))) as axes:
            for n, (one, jobs) in enumerate(at_64):
                for ax, (part, words) in zip(axes[2 * n : 2 * n + 2], parts, strict=True):
                    _curves(ax, jobs, part)
                    ax.set_title(f"64 MiB, {words}, {one['setting']}", fontsize=9)
    if max(len(one["sizes"]) for one in settings) == 1:
        return  # a run of one size, for its distribution
    with figure(directory / "alloc-size.svg", len(settings), 2, (9.5, 3.3 * len(settings))) as axes:
        for n, one in enumerate(settings):
            for ax, (part, words) in zip(axes[2 * n : 2 * n + 2], parts, strict=True):
                _by_size(ax, list(one["sizes"].values()), part)
                ax.set_title(f"{words}: median, and p99 dotted; {one['setting']}", fontsize=9)


def _curves(ax: Axes, jobs: dict[str, Any], part: str) -> None:
    for name in shown(jobs):
        if values := jobs[name][f"{part}_curve_ns"]:
            ax.plot(values, POINTS / 100, color=colour(name), label=name)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(microseconds))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("share of samples")
    ax.set_ylim(0, 1.01)


def _by_size(ax: Axes, sizes: list[dict[str, Any]], part: str) -> None:
    names = {name: None for size in sizes for name in shown(size["jobs"])}
    for name in names:
        found = [(size["nbytes"], size["jobs"][name][f"{part}_ns"]) for size in sizes if name in size["jobs"]]
        found = [(nbytes, figures) for nbytes, figures in found if figures]
        for quantile, line in (("median", "-"), ("p99", ":")):
            ax.plot(
                [nbytes / MIB for nbytes, _ in found],
                [figures[quantile] for _, figures in found],
                line,
                color=colour(name),
                linewidth=1.6 if line == "-" else 1.0,
                marker="." if line == "-" else "",
                markersize=4,
                label=name if line == "-" else None,
            )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda mib, _: f"{mib:g} MiB" if mib >= 1 else f"{mib * 1024:g} KiB"))
    ax.yaxis.set_major_formatter(FuncFormatter(microseconds))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_locator(NullLocator())
    ax.tick_params(axis="x", labelsize=7)


def fragmentation(source: Path, directory: Path) -> None:
    """The one of `fragmentation.py`: avoidable failures against load, and the largest free range over time at the highest."""
    mixes = json.loads(source.read_text())["results"]
    with figure(directory / "fragmentation.svg", 2, len(mixes), (2.9 * len(mixes), 5.4), share_y=True) as axes:
        for n, (mix, loads) in enumerate(mixes.items()):
            above, below = axes[n], axes[len(mixes) + n]
            shares = [float(load) for load in loads]
            for policy, shade in POLICIES.items():
                rates = [100 * loads[load][policy]["avoidable_share"] for load in loads]
                above.plot(shares, rates, color=shade, marker=".", label=policy)
                history = loads[list(loads)[-1]][policy]["largest_free_over_free"]
                below.plot([100 * k / len(history) for k in range(len(history))], history, color=shade, linewidth=0.9)
            above.set_yscale("symlog", linthresh=0.01)
            above.set_ylim(0, 100)
            above.yaxis.set_major_formatter(FuncFormatter(lambda percent, _: f"{percent:g}"))
            above.yaxis.set_minor_locator(NullLocator())
            above.set_title(mix, fontsize=9)
            above.set_xlabel("held, share of the area")
            below.set_ylim(0, 1)
            below.set_xlabel(f"% of the run, at {float(list(loads)[-1]):.0%}")
        axes[0].set_ylabel("avoidable failures, % of requests")
        axes[len(mixes)].set_ylabel("largest free range / all that is free")


def bars(path: Path, title: str, unit: str, found: Sequence[Bar]) -> None:
    """A bar a contender, the least on top, on a log scale; ours are blue and bold, and a thin line is the spread over the rounds."""
    ordered = sorted(found, key=lambda bar: bar.value)
    height = 0.9 + 0.27 * len(ordered)
    with figure(path, 1, 1, (7.6, height)) as (ax,):
        for at, bar in enumerate(ordered):
            ax.barh(at, bar.value, color=OURS if bar.ours else THEIRS, height=0.68)
            if bar.low is not None and bar.high is not None:
                ax.plot([bar.low, bar.high], [at, at], color=INK, linewidth=0.9)
            words = f"{bar.value:.2f}" if bar.value < 10 else f"{bar.value:.3g}"
            end = max(bar.value, bar.high or 0)
            ax.annotate(words, (end, at), (4, 0), textcoords="offset points", va="center", fontsize=8)
        ax.set_xscale("log")
        low, high = ordered[0].value, max(bar.high or bar.value for bar in ordered)
        ax.set_xlim(low / 2, high * 2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_yticks(range(len(ordered)), [bar.label for bar in ordered], fontsize=8)
        for label, bar in zip(ax.get_yticklabels(), ordered, strict=True):
            label.set_fontweight("bold" if bar.ours else "normal")
        ax.invert_yaxis()
        ax.set_axisbelow(True)
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(unit)
        ax.set_title(title, fontsize=9, loc="left")


def lent(source: Path, directory: Path) -> None:
    """The one of `lent.py`: for each kind of work, the speed-up of a lent reserve over an idle one by how long guests hold it."""
    works = json.loads(source.read_text())["results"]
    with figure(directory / "lent.svg", len(works), 2, (9.5, 3.1 * len(works)), share_y=True) as axes:
        for n, (work, found) in enumerate(works.items()):
            shares = sorted({one["share"] for one in found["cells"] if one["share"]})
            for ax, share in zip(axes[2 * n : 2 * n + 2], shares, strict=True):
                _speed_ups(ax, found["cells"], share)
                ax.set_title(f"{work}: guests take {share:.0%} of the reserve", fontsize=9)
            axes[2 * n].set_ylabel("work a second, lent / idle, undelayed")
        for ax in axes[-2:]:
            ax.set_xlabel("% of the time that guests hold it")


def _speed_ups(ax: Axes, cells: list[dict[str, Any]], share: float) -> None:
    never = next(one for one in cells if not one["share"])
    mine = [one for one in cells if one["share"] == share]
    if bound := never.get("no reserve/idle, undelayed"):
        ax.axhline(bound["median"], color="#888888", linestyle="--", linewidth=1.0, label="no reserve, no guests")
    ax.axhline(1.0, color=COLOURS["idle"], linewidth=1.0, label="idle reserve")
    for shade, period in zip(PERIOD_COLOURS, sorted({one["period_s"] for one in mine}), strict=False):
        line = [(one["duty"], one[RATIO]) for one in mine if one["period_s"] == period]  # in order, as they were told
        points = [(0.0, never[RATIO]), *line]
        at = [100 * duty for duty, _ in points]
        ax.plot(
            at, [of["median"] for _, of in points], color=shade, marker=".", label=f"lent, a guest every {period:g} s"
        )
        ax.fill_between(at, [of["low"] for _, of in points], [of["high"] for _, of in points], color=shade, alpha=0.12)
    ax.set_xlim(0, 100)
    ax.set_ylim(bottom=0)


def hits(source: Path, directory: Path) -> None:
    """The one of `policy.py`: loads served from memory against the cache's size, ours in lines, the reference figures dashed."""
    traces = json.loads(source.read_text())["results"]
    with figure(directory / "policy.svg", 1, len(traces), (4.2 * len(traces), 3.6)) as axes:
        for ax, (trace, found) in zip(axes, traces.items(), strict=True):
            shares = list(found["s3fifo"])
            for policy, shade in HITS.items():
                ax.plot(
                    shares, [found[policy][share]["hits"] for share in shares], color=shade, marker=".", label=policy
                )
            for name, figures in found["reference"].items():
                ax.plot(
                    shares, figures, color=HITS_KNOWN[name], linestyle="--", linewidth=1, label=f"libcachesim {name}"
                )
            ax.set_title(f"{trace} trace", fontsize=9)
            ax.set_xlabel("cache, % of the pages that are asked for")
        axes[0].set_ylabel("loads served from memory, %")


def main() -> int:
    """Draws what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("alloc", "fragmentation", "lent", "policy"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/out/WHAT.json")
    parser.add_argument("--to", type=Path, default=DOCS, metavar="DIRECTORY")
    options = parser.parse_args()
    draw = {"alloc": alloc, "fragmentation": fragmentation, "lent": lent, "policy": hits}[options.what]
    draw(options.json or OUT / f"{options.what}.json", options.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
