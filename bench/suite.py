"""Runs the set of benchmarks, one after another, each at a setting that ends in minutes; then publishes what they found (`make bench`).

One that fails is told and left out; what was published of it before stays.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import publish
from _common import OUT

HERE = Path(__file__).parent
# Script and its arguments. A longer run of one of them is published by hand: `publish.py --take NAME`.
SET: dict[str, list[str]] = {
    "pages": ["--rounds", "25"],
    "peers": ["--rounds", "7", "--block-s", "0.05"],
    "requests": [],
    "scaling": ["--rounds", "7"],
    "policy": ["--live", "--plots"],
    "lent": ["--spill-io", "direct", "--rounds", "1", "--period", "1", "--duty", "0.1", "0.5", "0.9", "--plots"],
    "spill_io": [],
    "same_filled": ["--rounds", "10"],
    "alloc": ["--size", "64M", "--rounds", "40", "--plots"],
    "fragmentation": ["--operations", "100000", "--plots"],
    "checksum": [],
    "takeover": ["--rounds", "5"],
    "adversity": [],
    "pools": [],
    "main_job": ["--out", str(OUT / "main_job.json")],
    "stress": [],
}


def run(names: list[str], arguments: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """One after another; the names of those that ended well, and of those that did not."""
    good: list[str] = []
    bad: list[str] = []
    for name in names:
        command = [sys.executable, str(HERE / f"{name}.py"), *arguments.get(name, [])]
        print(f"\n=== {name}", flush=True)
        begun = time.monotonic()
        status = subprocess.run(command, check=False).returncode
        print(f"=== {name}: exit status {status}, {time.monotonic() - begun:.0f} s", flush=True)
        (bad if status else good).append(name)
    return good, bad


def tells_sections(name: str) -> bool:
    """Whether there is something to publish in its record."""
    path = OUT / f"{name}.json"
    return path.exists() and bool(json.loads(path.read_text()).get("sections"))


def main(argv: list[str] | None = None) -> int:
    """Runs and publishes; the exit status is 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(SET)}")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - set(SET):
        parser.error(f"not in the set: {', '.join(sorted(unknown))}")
    good, bad = run(options.names or list(SET), SET)
    told = [name for name in good if tells_sections(name)]
    publish.main(["--take", *told] if told else [])
    if bad:
        print(f"failed: {', '.join(bad)}; what was published of them before stays")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
