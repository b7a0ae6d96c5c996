"""The sanitizers: builds of the extension under them, and Python processes that run such a build.

Python itself is not instrumented, so the sanitizer's runtime is preloaded, and Python takes its memory from malloc, where the runtime sees it.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.builds import ROOT, build, environment

if TYPE_CHECKING:
    import pytest

HERE = Path(__file__).resolve().parent
FOUND = 66  # the exit status of a process in which a sanitizer found something
PLANT_ENVIRONMENT = "GCMA_TEST_PLANT"


@dataclass(frozen=True)
class Sanitizer:
    """How one is built in, preloaded and told what it is to do."""

    name: str
    flags: tuple[str, ...]
    library: str
    variable: str
    options: str


# No suppression but for `ORDERS_NOTHING`: what is a race by design is told where it stands, in _races.h. What a thread wrote to a file
# orders nothing (io_sync=0), or the spill files would hide races. gcc warns of fences, which ThreadSanitizer does not know: docs/data-plane.md.
THREADS = Sanitizer(
    "ThreadSanitizer",
    ("-fsanitize=thread", "-g1", "-include", str(HERE / "gil.h")),
    "libtsan.so",
    "TSAN_OPTIONS",
    f"exitcode={FOUND}:io_sync=0:history_size=7",
)
MEMORY = Sanitizer(
    "AddressSanitizer",
    ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1"),
    "libasan.so",
    "ASAN_OPTIONS",
    f"exitcode={FOUND}:detect_leaks=1",
)


def blind_options(directory: Path) -> str:
    """For runs in which the interpreter's lock orders nothing: what Python does with its locks, wherever it lies, goes unseen."""
    shared = sysconfig.get_config_var("Py_ENABLE_SHARED")
    name = sysconfig.get_config_var("INSTSONAME") if shared else Path(sys.executable).resolve().name
    suppressions = directory / "suppressions"
    suppressions.write_text(f"called_from_lib:{name}\n")
    return f"suppressions={suppressions}"


@functools.cache
def preloaded(sanitizer: Sanitizer) -> tuple[str, tuple[str, ...]] | str:
    """The runtime, and what a command begins with so that Python starts under it; or why there is none."""
    compiler = shlex.split(sysconfig.get_config_var("CC"))[0]
    if shutil.which(compiler) is None:
        return f"no {compiler}"
    asked = subprocess.run(
        [compiler, f"-print-file-name={sanitizer.library}"], capture_output=True, text=True, check=True
    )
    library = asked.stdout.strip()
    if not Path(library).is_absolute():
        return f"{compiler} has no {sanitizer.library}"
    said = ""
    for prefix in ((), ("setarch", "--addr-no-randomize")):  # its map of memory may not fit what a kernel randomizes
        if prefix and shutil.which(prefix[0]) is None:
            continue
        done = subprocess.run(
            [*prefix, sys.executable, "-c", ""],
            env=os.environ | {"LD_PRELOAD": library, sanitizer.variable: "detect_leaks=0"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return library, prefix
        said = done.stderr
    return f"Python does not start under {library}: {said[:200]}"


class Sanitized:
    """One build of the extension under a sanitizer."""

    def __init__(self, sanitizer: Sanitizer, factory: pytest.TempPathFactory, *flags: str) -> None:
        self._sanitizer = sanitizer
        found = preloaded(sanitizer)
        assert not isinstance(found, str), found
        self._library, self._prefix = found
        self.core = build(factory, *sanitizer.flags, *flags)

    def run(
        self, *arguments: str | float | Path, options: str = "", plant: str = "none"
    ) -> subprocess.CompletedProcess[str]:
        """`python -m` with these arguments; stdout has all that it and the sanitizer said."""
        env = environment(self.core) | {
            "LD_PRELOAD": self._library,
            "PYTHONMALLOC": "malloc",
            self._sanitizer.variable: f"{self._sanitizer.options}:{options}",
            "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={FOUND}",
            PLANT_ENVIRONMENT: plant,
        }
        command = [*self._prefix, sys.executable, "-m", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        print(done.stdout)
        return done
