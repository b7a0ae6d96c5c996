"""The command `gcma check`: what is wrong with an arena, in words. Reads only; see gcma_shm/check.py."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict

from gcma_shm._check_view import Finding
from gcma_shm.check import Report, check
from gcma_shm.endpoint import arena_name, default_endpoint
from gcma_shm.errors import ArenaError, in_words
from gcma_shm.sizes import counted, format_size

LINES_MAX = 10  # of one kind
SOUND, DAMAGED, UNCHECKED = 0, 1, 2


def add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser of `gcma`."""
    parser = commands.add_parser(
        "check",
        help="look at every invariant of an arena, served or left behind; writes nothing",
        description="Exit status: 0 sound, 1 damaged, 2 it cannot be checked.",
    )
    parser.set_defaults(run=_check)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--endpoint", default=default_endpoint(), help="whose arena (default %(default)s)")
    which.add_argument("--arena", metavar="NAME", help="of the object in /dev/shm, in place of an endpoint")
    parser.add_argument(
        "--pages", action="store_true", help="every clean value as well, in memory and in the spill files"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def _check(_parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    name = "/" + parsed.arena.removeprefix("/") if parsed.arena else arena_name(parsed.endpoint)
    begun = time.monotonic()
    try:
        report = check(name, values=parsed.pages)
    except ArenaError as error:
        print(f"gcma check: {in_words(error)}", file=sys.stderr)
        return UNCHECKED
    seconds = time.monotonic() - begun
    if parsed.json:
        print(json.dumps({"arena": name, "sound": not report.damaged, "seconds": seconds} | asdict(report)))
    else:
        print("\n".join(_lines(name, report, seconds)))
    return DAMAGED if report.damaged else SOUND


def _lines(name: str, report: Report, seconds: float) -> list[str]:
    broker = "served by a broker" if report.served else "its broker is stopped" if report.stopped else "no broker runs"
    lines = [f"arena {name}, {broker}"]
    lines += _told("damaged", report.damaged)
    lines += _told(f"to be put right by the {'' if report.served or report.stopped else 'next '}broker", report.pending)
    lines += [f"it moves too much to tell: {what}" for what in report.unsettled[:LINES_MAX]]
    figures = report.figures
    if figures:
        lines.append("looked at: " + ", ".join(_figures(figures)))
    looks = f", {report.looks} looks" if report.looks > 1 else ""
    lines.append(f"{'DAMAGED' if report.damaged else 'sound'}; {seconds * 1000:.0f} ms{looks}")
    return lines


def _told(title: str, findings: list[Finding]) -> list[str]:
    told: Counter[str] = Counter()
    left: Counter[str] = Counter()
    lines = []
    for finding in findings:
        told[finding.kind] += 1
        left[finding.kind] += finding.more
        if told[finding.kind] <= LINES_MAX:
            lines.append(f"{title}: {finding.kind}: {finding.text}")
        else:
            left[finding.kind] += 1
    return lines + [f"{title}: {kind}: {count} more" for kind, count in left.items() if count]


def _figures(figures: dict[str, int]) -> list[str]:
    held_in = ", ".join(
        f"{figures[f'slots_{state}']} {state}" for state in ("cached", "dirty", "spilled", "zero", "filled")
    )
    words = [counted(figures.get(f"{what}s", 0), what) for what in ("area", "type", "client", "buffer", "reservation")]
    words.append(counted(figures["slots"], "slot") + f" ({held_in})")
    words.append(
        counted(figures["pages"], "page")
        + f" ({figures.get('pages_lent', 0)} lent, {figures.get('pages_held', 0)} held, {figures['nursery_published']} in the nursery)"
    )
    words.append(counted(figures.get("spill_files", 0), "spill file"))
    if "value_bytes" in figures:
        words.append(f"{format_size(figures['value_bytes'])} of values")
    return words
