"""Tie the steps of docs/data-plane.md to the lines that model them and the lines that take them.

A step carries one name in three places: docs/data-plane.md (`store.swing`), the models (/* @store.swing */) and the
code (# @store.swing). This writes the table of them into docs/model.md, between the markers.

    python3 tests/model/steps.py [--check]

With --check nothing is written: it fails when the table is out of date, when a step of a model is taken by no line of
the code, and when a mark, in a model or in the code, is not a step of docs/data-plane.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = ROOT / "docs" / "data-plane.md"
DOCUMENT = ROOT / "docs" / "model.md"
MODELS = ("tests/model/*.pml",)
CODE = ("gcma_shm/*.pxi", "gcma_shm/*.pyx", "broker/*.py")
BEGIN, END = "<!-- steps:begin -->", "<!-- steps:end -->"

NAME = r"[a-z]+\.[a-z_]+"
COMMENT = re.compile(r"(?:/\*|#)(.*)")
MARK = re.compile(rf"@({NAME})\b")

Marks = dict[str, list[str]]  # step -> "file:line"


def marks(patterns: tuple[str, ...]) -> Marks:
    found: Marks = {}
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        for number, text in enumerate(path.read_text().splitlines(), 1):
            comment = COMMENT.search(text)
            for step in MARK.findall(comment[1]) if comment else []:
                found.setdefault(step, []).append(f"{path.name}:{number}")
    return found


def protocol_steps() -> list[str]:
    """The backticked names of docs/data-plane.md, in its order; names of files among them do no harm."""
    return list(dict.fromkeys(re.findall(rf"`({NAME})`", PROTOCOL.read_text())))


def table(known: list[str], models: Marks, code: Marks) -> str:
    order = [step for step in known if step in models or step in code]
    order += sorted((models.keys() | code.keys()) - set(known))
    rows = [f"| `{step}` | {cell(models.get(step))} | {cell(code.get(step))} |" for step in order]
    return "\n".join(["| step | model | code |", "|---|---|---|", *rows])


def cell(places: list[str] | None) -> str:
    """`a:1`, `a:2`, `b:3` as "a:1, 2 · b:3"."""
    lines: dict[str, list[str]] = {}
    for place in places or []:
        file, line = place.split(":")
        lines.setdefault(file, []).append(line)
    return " · ".join(f"{file}:{', '.join(of_file)}" for file, of_file in lines.items()) or "–"


def with_table(document: str, new_table: str) -> str:
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{DOCUMENT}: the markers {BEGIN} and {END} are missing")
    return f"{before}{BEGIN}\n{new_table}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description="The table of steps in docs/model.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the three places disagree")
    options = parser.parse_args()
    known, models, code = protocol_steps(), marks(MODELS), marks(CODE)
    document = DOCUMENT.read_text()
    current = with_table(document, table(known, models, code))
    if not options.check:
        DOCUMENT.write_text(current)
        return 0
    complaints = [f"{step}: in a model, but no line of the code takes it" for step in models if step not in code]
    complaints += [f"{step}: not a step of {PROTOCOL.name}" for step in {**models, **code} if step not in known]
    if current != document:
        complaints.append(f"{DOCUMENT.name}: the table is out of date; run tests/model/steps.py")
    for complaint in complaints:
        print(complaint)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
