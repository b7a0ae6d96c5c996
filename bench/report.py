"""What a run tells: sections of tables, verdicts and plots, printed and written to the run's record; docs/benchmarks.md is made of these.

A script builds a `Section` for each thing that it wants said, prints it with `tell`, and hands all of them to `write_json`. `publish.py` makes
Markdown of them and never needs the rest of the record. Nothing here measures.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from figures import Ratio, Summary

OUT = Path(__file__).parent / "out"


@dataclass(frozen=True)
class Verdict:
    """One expectation. `figure` is compared with `limit` as it stands: at most, or at least, that."""

    what: str
    limit: float
    figure: float | None  # None: not measured
    at_least: bool = False
    why: str = ""  # it was not measured; or a remark

    @property
    def word(self) -> str:
        """Met or missed."""
        if self.figure is None:
            return "not measured"
        return "met" if (self.figure >= self.limit if self.at_least else self.figure <= self.limit) else "missed"

    @property
    def bound(self) -> str:
        """The limit with its direction."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True)
class Bar:
    """One contender in a plot: its figure, and the least and the most of its rounds when they are to be seen."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    ours: bool = False


@dataclass(frozen=True)
class Plot:
    """An SVG beneath docs/. With `bars`, `publish.py` draws it from the record; without, the script has drawn it (`plots.py`)."""

    file: str
    caption: str
    unit: str = ""
    bars: Sequence[Bar] = ()


@dataclass(frozen=True)
class Section:
    """A table with what belongs to it: a note on how to read it, what was expected and came, plots."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""
    verdicts: Sequence[Verdict] = ()
    plots: Sequence[Plot] = field(default=())

    def plain(self) -> dict[str, Any]:
        """For JSON: cells as they are shown, verdicts with their word."""
        return {
            "title": self.title,
            "columns": list(self.columns),
            "rows": [[cell(value) for value in row] for row in self.rows],
            "note": self.note,
            "verdicts": [asdict(one) | {"bound": one.bound, "verdict": one.word} for one in self.verdicts],
            "plots": [asdict(one) for one in self.plots],
        }


def tell(section: Section) -> None:
    """Prints it."""
    print("\n" + (table(section.columns, section.rows, section.title) if section.rows else section.title))
    if section.note:
        print(section.note)
    if section.verdicts:
        rows = [[v.what, v.bound, "-" if v.figure is None else v.figure, v.word, v.why] for v in section.verdicts]
        print("\n" + table(["expected", "limit", "figure", "", ""], rows))
    sys.stdout.flush()


def table(head: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> str:
    """Aligned columns; the first to the left, the others to the right."""
    cells = [list(head), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*([title] if title else []), *(line.rstrip() for line in lines)])


def cell(value: object) -> str:
    """As it is shown: three digits that count, or all of a large one's before the point."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return str(value)


def command() -> str:
    """How this script was started, but for where its record goes."""
    arguments = sys.argv[1:]
    if "--out" in arguments:
        at = arguments.index("--out")
        del arguments[at : at + 2]
    return shlex.join([f"bench/{Path(sys.argv[0]).name}", *arguments])


def write_json(
    path: Path,
    question: str,
    found: Mapping[str, Any],
    options: Mapping[str, Any],
    results: object,
    sections: Sequence[Section] = (),
) -> None:
    """The run's record, written whole or not at all. `sections` is what of it is published."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "question": question,
        "machine": found,
        "command": command(),
        "options": options,
        "sections": [section.plain() for section in sections],
        "results": results,
    }
    draft = path.with_suffix(path.suffix + ".tmp")
    draft.write_text(json.dumps(record, indent=1, default=_plain) + "\n")
    draft.replace(path)
    print(f"\nwritten to {path}")


def _plain(value: object) -> object:
    if isinstance(value, (Summary, Ratio)):
        return asdict(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")
