"""CPython's tests of shared memory, of the Python that runs this, with the import changed: `python -m tests.cpython.shared_memory [fork|spawn|forkserver …]`.

The text of `test/_test_multiprocessing.py` is taken as it is, but for the names of the modules, also in the programs that it starts, and for
what follows.

- The segment of a process that was killed is gone, as that test wants (test_shared_memory_cleaned_after_process_termination). It goes on to
  want the resource tracker's warning of it on standard error; here there is no tracker, and standard error must be empty.
- A program that attaches with `track=True` (3.13, test_shared_memory_tracking) is to be warned by its resource tracker, which takes the
  segment away from its maker when the program ends (gh-82300). Here it must say nothing, and the segment must be there still.

Not of this class, and left out: tests of the resource tracker itself (TestResourceTracker), which register names with it by hand.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tests.cpython.where import DEBIAN, HOW, has

THEIRS = "_test_multiprocessing"
OURS = "gcma_shm.clients.shared_memory"
MODULE = "arena_test_multiprocessing"
CLASS = "WithProcessesTestSharedMemory"
METHODS = ("fork", "spawn", "forkserver")
RUN_S = 600.0
HAS_TRACK = sys.version_info >= (3, 13)


def _warned(prefix: str) -> str:
    """The pattern of an assertion that the tracker warned; `prefix`: of its literals."""
    words = (
        "resource_tracker: There appear to be 1 leaked ",
        "shared_memory objects to clean up at shutdown",
    )
    return r"self\.assertIn\(" + "".join(rf'\s*{prefix}"{line}"' for line in words) + r", err\)"


# What is replaced, by what; each is found at least once, or the run fails.
REPLACEMENTS = (
    (r"from multiprocessing import shared_memory\b", "from gcma_shm.clients import shared_memory"),
    (r"from multiprocessing\.shared_memory import", f"from {OURS} import"),
    (r"'multiprocessing\.shared_memory\._make_filename'", f"'{OURS}._make_filename'"),
    (r"multiprocessing\.managers\.SharedMemoryManager", "shared_memory.SharedMemoryManager"),
    (r"from multiprocessing\.managers import SharedMemoryManager", f"from {OURS} import SharedMemoryManager"),
    (r'resource_tracker\.unregister\(f"/\{name\}", "shared_memory"\)', "pass"),
    (_warned(""), 'self.assertEqual("", err)'),
)
REPLACEMENTS_OF_TRACK = (
    (
        _warned("b"),
        'self.assertEqual(b"", err)\n            shared_memory.SharedMemory(mem.name).close()',
    ),
    (r'resource_tracker\.unregister\(mem\._name, "shared_memory"\)', "pass"),
)


def source() -> Path:
    """CPython's file. There is one, or the tests are skipped."""
    found = find_spec(f"test.{THEIRS}")
    return DEBIAN / f"{THEIRS}.py" if found is None or found.origin is None else Path(found.origin)


def write(directory: Path) -> None:
    """The tests, and a main module for each start method."""
    text = source().read_text()
    for pattern, by in REPLACEMENTS + (REPLACEMENTS_OF_TRACK if HAS_TRACK else ()):
        text, times = re.subn(pattern, by, text)
        assert times, f"{pattern} was not found"
    (directory / f"{MODULE}.py").write_text(text)
    for method in METHODS:
        main = f"import {MODULE}\n\n{MODULE}.install_tests_in_module_dict(globals(), {method!r})\n"
        (directory / f"{MODULE}_{method}.py").write_text(main)


def run(method: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """The tests in a process of their own; on standard error what unittest says."""
    return subprocess.run(
        [sys.executable, "-m", "unittest", "-v", f"{MODULE}_{method}.{CLASS}"],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )


def main() -> int:
    if not has(THEIRS):
        print(HOW)
        return 1
    status = 0
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch))
        for method in sys.argv[1:] or METHODS:
            done = run(method, Path(scratch))
            print(f"--- {method}, Python {sys.version.split()[0]}\n{done.stdout}{done.stderr}", flush=True)
            status |= done.returncode
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
