"""Makes docs/benchmarks.md of the published records, and publishes new ones: `publish.py`, `publish.py --take peers checksum`, `--take all`.

A published record, docs/benchmarks/NAME.json, is the part of a run's record (bench/out/NAME.json) that is shown: its sections, the machine and the
command. A text of a person's, docs/benchmarks/NAME.md, may stand beside it: its first line is the heading, a line `Run: TIME` says which run it
was written about, and the rest comes below the tables, marked as written about an older run when there is a newer one. Nothing here measures, and
what has no new record keeps the one that it has.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import OUT, Bar

DOCS = Path(__file__).parent.parent / "docs"
RECORDS = "benchmarks"  # beneath docs/
ORDER = (
    "pages", "peers", "requests", "scaling", "policy", "lent", "spill_io", "same_filled", "alloc", "fragmentation", "checksum",
    "takeover", "adversity", "pools", "main_job", "stress",
)  # fmt: skip
ALL = "all"
PUBLISHED = ("question", "machine", "command", "sections")
HEADING = "# Figures"
FIGURE = re.compile(r"[≤≥]? ?-?[\d.,]+(e[+-]?\d+)?( ?[×%])?( \([-\d.,e+]+\))?|[-–]?")


@dataclass(frozen=True)
class Reading:
    """What a person wrote about a run."""

    heading: str
    run: str  # the time of the run, "" when it is about none
    text: str

    @classmethod
    def of(cls, path: Path) -> Reading | None:
        """Of NAME.md; None when there is none."""
        if not path.exists():
            return None
        lines = path.read_text().strip().splitlines()
        heading = lines.pop(0).removeprefix("# ").strip()
        text = "\n".join(lines).strip()
        run = ""
        if text.startswith("Run: "):
            first, _, text = text.partition("\n")
            run = first.removeprefix("Run: ").strip()
        return cls(heading, run, text.strip())


# --- Markdown of a record


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns of figures to the right, the first and those of words to the left."""
    body = [[_cell(value) for value in row] for row in rows]
    figures = [all(FIGURE.fullmatch(row[n]) for row in body) for n in range(len(columns))]
    head = "| " + " | ".join(map(_cell, columns)) + " |"
    rule = "|" + "".join("---:|" if n and figures[n] else "---|" for n in range(len(columns)))
    return "\n".join([head, rule, *("| " + " | ".join(row) + " |" for row in body)])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def section(record: Mapping[str, Any]) -> str:
    """One section of a record."""
    parts = [f"### {record['title']}"]
    if record["rows"]:
        parts.append(markdown_table(record["columns"], record["rows"]))
    if record["note"]:
        parts.append(record["note"])
    if record["verdicts"]:
        parts.append(markdown_table(["expected", "limit", "found", ""], map(_verdict, record["verdicts"])))
    parts += [f"![{plot['caption']}]({plot['file']})" for plot in record["plots"]]
    return "\n\n".join(parts)


def _verdict(one: Mapping[str, Any]) -> list[str]:
    found = "–" if one["figure"] is None else f"{one['figure']:.3g}"
    word = {"missed": "**missed**"}.get(one["verdict"], one["verdict"])
    return [one["what"], one["bound"], found, f"{word}: {one['why']}" if one["why"] else word]


def benchmark(name: str, record: Mapping[str, Any], reading: Reading | None, machine: str) -> str:
    """All of one script: what it asks, on what machine it ran, its sections, and what a person wrote about it."""
    heading = reading.heading if reading else name
    found = record["machine"]
    load = ", ".join(f"{value:.1f}" for value in found["load_average_before"]) or "not noted"
    parts = [
        f"## {heading} (`bench/{name}.py`)",
        f"{record['question']}",
        f"Measured {found['time']} on machine {machine}, load before the run {load}: `{record['command']}`.",
        *map(section, record["sections"]),
    ]
    if reading and reading.text:
        parts += [_about(reading, found["time"]), reading.text]
    return "\n\n".join(parts)


def _about(reading: Reading, time: str) -> str:
    if not reading.run:
        return "### Reading"
    if reading.run == time:
        return "### Reading, of this run"
    return f"### Reading, of the run of {reading.run}\n\n*That is another run than the one above; where the two differ, the tables are right.*"


def machine_of(found: Mapping[str, Any]) -> str:
    """What stays the same from run to run."""
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items() if version != "-")
    huge = found.get("shmem_huge_pages", "")
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['memory_mib']} MiB, Linux {found['kernel'].partition('-')[0]}, Python {found['python']}"
        + (f"; huge pages of shared memory: {huge}" if huge else "")
        + (f"; {versions}" if versions else "")
    )


def document(directory: Path) -> str:
    """docs/benchmarks.md, of the records and readings there."""
    records = {path.stem: json.loads(path.read_text()) for path in directory.glob("*.json")}
    names = [name for name in ORDER if name in records] + sorted(set(records) - set(ORDER))
    machines: dict[str, str] = {}
    for name in names:
        machines.setdefault(machine_of(records[name]["machine"]), chr(ord("A") + len(machines)))
    intro = Reading.of(directory / "README.md")
    parts = [HEADING, "<!-- Made by bench/publish.py of docs/benchmarks/: do not edit here. -->"]
    if intro:
        parts.append(intro.text)
    parts += ["## Machines", markdown_table(["", "machine"], [[letter, words] for words, letter in machines.items()])]
    verdicts = [
        [heading_of(directory, name), *_counts(records[name])]
        for name in names
        if any(one["verdicts"] for one in records[name]["sections"])
    ]
    if verdicts:
        parts += ["## Expectations", markdown_table(["", "met", "missed", "not measured"], verdicts)]
    parts += [
        benchmark(name, records[name], Reading.of(directory / f"{name}.md"), machines[machine_of(records[name]["machine"])])
        for name in names
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def heading_of(directory: Path, name: str) -> str:
    """Of a benchmark's part."""
    reading = Reading.of(directory / f"{name}.md")
    return reading.heading if reading else name


def _counts(record: Mapping[str, Any]) -> list[int]:
    words = [one["verdict"] for part in record["sections"] for one in part["verdicts"]]
    return [words.count(word) for word in ("met", "missed", "not measured")]


# --- publishing


def take(name: str, source: Path, docs: Path) -> None:
    """Publishes a run's record, and draws those of its plots that are drawn from it. Raises ValueError when it has no sections."""
    record = json.loads(source.read_text())
    if not record.get("sections"):
        raise ValueError(f"{source} has no sections: it is of a script that does not tell any, or of an older one")
    published = {key: record[key] for key in PUBLISHED}
    (docs / RECORDS).mkdir(parents=True, exist_ok=True)
    (docs / RECORDS / f"{name}.json").write_text(json.dumps(published, indent=1, ensure_ascii=False) + "\n")
    draw(published, docs)


def draw(record: Mapping[str, Any], docs: Path) -> None:
    """The plots that its sections describe bar by bar."""
    for plot in (plot for part in record["sections"] for plot in part["plots"]):
        if plot["bars"]:
            import plots

            (docs / plot["file"]).parent.mkdir(parents=True, exist_ok=True)
            plots.bars(docs / plot["file"], plot["caption"], plot["unit"], [Bar(**bar) for bar in plot["bars"]])


def main(argv: list[str] | None = None) -> int:
    """Publishes what was asked for, then writes docs/benchmarks.md; with --check says only whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", nargs="+", default=[], metavar="NAME", help="publish bench/out/NAME.json first; all: whatever is there and tells sections")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 when docs/benchmarks.md is not what the records give")  # fmt: skip
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIRECTORY", help="where the runs' records are")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIRECTORY")
    options = parser.parse_args(argv)
    names = options.take
    if names == [ALL]:
        names = [
            path.stem for path in sorted(options.out.glob("*.json")) if json.loads(path.read_text()).get("sections")
        ]
    for name in names:
        take(name, options.out / f"{name}.json", options.docs)
    target = options.docs / "benchmarks.md"
    text = document(options.docs / RECORDS)
    if options.check:
        fresh = target.exists() and target.read_text() == text
        print(f"{target} is {'up to date' if fresh else 'not what its records give: run bench/publish.py'}")
        return 0 if fresh else 1
    target.write_text(text)
    print(f"written to {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
