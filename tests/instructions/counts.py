"""How many instructions the extension takes for one operation, counted by callgrind; and what was recorded of it.

    python -m tests.instructions.counts            tells both
    python -m tests.instructions.counts --record   writes counts.json anew, for this compiler and this CPython

Counted is what lies inside the extension, Cython's part of a call included. Not counted is the interpreter (it changes with each release),
the C library, and what copies or sums the bytes of a page (UNCOUNTED): that follows the CPU, and a page's size, and its speed is
bench/pages.py's to tell. What is left is the same in every run, to the instruction, on every x86-64 machine.

Another compiler, or another minor version of CPython, makes other code of the same sources; each pair has its own record. One that has none
is held against the nearest record, within MARGIN_UNKNOWN, so that nothing is ever left unchecked.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from gcma_shm import _core
from tests.instructions.driver import OPERATIONS, TIMES

RECORD = Path(__file__).with_name("counts.json")
ROOT = Path(__file__).resolve().parents[2]
MARK = "__pyx_pw_*wake_count"  # the extension's function behind the driver's mark
UNCOUNTED = ("copy_ahead", "copy_lines", "copy_stream", "crc32c_fast", "crc32c_soft")
# Of a count. One record holds for patch releases of a compiler and of Cython, which move a few instructions; two dozen more in any path of a hit,
# 250 to 360, fail.
MARGIN = 0.06
MARGIN_UNKNOWN = 0.3
RUN_S = 300.0

Counts = Mapping[str, float]  # by operation, instructions a page


def missing() -> str | None:
    """Why nothing can be counted here."""
    return None if shutil.which("valgrind") else "valgrind is not installed (Debian: apt-get install valgrind)"


def built_by(core: Path) -> str:
    """The compiler's name and major version, as it wrote them into the extension, and the interpreter's."""
    found = re.search(rb"(GCC|clang)[^\0]*?(\d+)\.\d+\.\d+", core.read_bytes())
    compiler = f"{found[1].decode().lower()}-{found[2].decode()}" if found else "unknown"
    return f"cpython-{sys.version_info.major}.{sys.version_info.minor} {compiler}"


def measure(core: Path, env: Mapping[str, str] | None = None) -> dict[str, float]:
    """Counts of the driver's operations in a process with that environment, which imports `core`."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "part"
        command = [
            "valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", f"--dump-before={MARK}", "--dump-line=no",
            "--compress-strings=no", "--compress-pos=no", sys.executable, "-m", "tests.instructions.driver",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=RUN_S, check=False)
        assert done.returncode == 0, done.stderr
        # Part 2n + 1 ends at the mark before operation n, and part 2n + 2 at the one behind it.
        return {operation: own_cost(Path(f"{out}.{2 * n + 2}"), core) / TIMES for n, operation in enumerate(OPERATIONS)}


def own_cost(part: Path, core: Path) -> int:
    """Instructions inside `core` itself, without what it calls elsewhere and without UNCOUNTED."""
    total, inside, function, called = 0, False, "", False
    for line in part.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and key == "ob":
            inside = value.endswith(core.name)
        elif equals and key == "fn":
            function = value.partition("'")[0]
        elif equals and key == "calls":
            called = True  # the next line tells what the call cost
        elif line[:1].isdigit() and not called:
            total += int(line.split()[1]) if inside and function not in UNCOUNTED else 0
        elif line[:1].isdigit():
            called = False
    return total


def recorded(record: Mapping[str, Counts], key: str) -> tuple[Counts, float]:
    """What to compare with, and the margin."""
    if key in record:
        return record[key], MARGIN
    interpreter = key.split(maxsplit=1)[0]
    nearest = next((known for known in record if known.startswith(interpreter)), next(iter(record)))
    return record[nearest], MARGIN_UNKNOWN


def beyond(found: Counts, expected: Counts, margin: float) -> list[str]:
    """What is out of the margin, up or down: what has become cheaper is to be recorded, or it could be lost again unseen."""
    return [
        f"{operation}: {found[operation]:.1f} instructions, {expected[operation]:.1f} recorded"
        for operation in OPERATIONS
        if abs(found[operation] / expected[operation] - 1) > margin
    ]


def main(argv: list[str] | None = None) -> int:
    """Tells the counts, or records them; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name} anew for this build")
    options = parser.parse_args(argv)
    if reason := missing():
        print(reason)
        return 1
    core = Path(_core.__file__)
    key, found = built_by(core), measure(core)
    record: dict[str, Counts] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    expected, margin = recorded(record, key) if record else (found, MARGIN)
    print(f"{key}, margin {margin:.0%}")
    for operation in OPERATIONS:
        print(f"{operation:20} {found[operation]:8.1f} {expected[operation]:8.1f}")
    if options.record:
        record[key] = {operation: round(count, 1) for operation, count in found.items()}
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        return 0
    return 1 if beyond(found, expected, margin) else 0


if __name__ == "__main__":
    sys.exit(main())
