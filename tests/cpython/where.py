"""Where CPython's own tests are: with the running Python, or in Debian's package for Python of that version.

As a program: says how to get them, and exits with 1, when some of those that we run are in neither place (`.ci/run` asks).
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
DEBIAN = Path(f"/usr/lib/python{VERSION}/test")
HOW = (
    f"this Python came without its own tests: on Debian `apt-get install libpython{VERSION}-testsuite` (of some versions only); "
    "a Python that is built from source has them"
)
MODULES = ("_test_multiprocessing", "test_concurrent_futures")


def has(module: str) -> bool:
    """Whether that module, or package, of CPython's package `test` is in one of the two places."""
    try:
        found = find_spec(f"test.{module}")
    except ModuleNotFoundError:  # without `test` itself, Debian's would be without its support
        return False
    return found is not None or any(DEBIAN.glob(f"{module}*"))


if __name__ == "__main__":
    if not all(map(has, MODULES)):
        sys.exit(HOW)
