"""Plasma, the object store of Apache Arrow and once of Ray, for `alloc.py`: an object created in a store that is full of 4 KiB objects.

pyarrow 11 was the last release to have it; it lives in a virtual environment of its own, made on demand, with `plasma_server.py` in it.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from _common import STOP_S
from alloc_job import Job, Sample

REQUIREMENTS = ("pyarrow==11.0.0", "numpy<2")
SERVER = Path(__file__).parent / "plasma_server.py"
ANSWER_S = 300.0
INSTALL_S = 600.0


class NoPlasma(Exception):
    """It cannot be run here; says why."""


def environment() -> Path:
    """The Python that has plasma; makes its environment when there is none."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gcma-bench" / "plasma-venv"
    python = cache / "bin" / "python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", cache], check=True, timeout=INSTALL_S, capture_output=True)
        probe: list[str | Path] = [python, "-W", "ignore", "-c", "import pyarrow.plasma"]
        if subprocess.run(probe, check=False, capture_output=True).returncode:
            print(f"installing {' '.join(REQUIREMENTS)} in {cache} ...", flush=True)
            command: list[str | Path] = [python, "-m", "pip", "install", "--quiet", *REQUIREMENTS]
            subprocess.run(command, check=True, timeout=INSTALL_S, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        words = str(error.stderr or error).strip().splitlines()
        raise NoPlasma(f"{' '.join(REQUIREMENTS)} cannot be installed: {words[-1] if words else error}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoPlasma(str(error)) from None
    return python


class Plasma(Job):
    """Asks the server, which times itself."""

    def __init__(self, sizes: list[int], every: int, floor_library: Path, stack: ExitStack) -> None:
        self.name = "plasma"
        self._sizes = sizes
        self._every = every
        # Twice the largest: an eviction is a fifth of the store at least.
        command: list[str | Path] = [
            environment(),
            "-W",
            "ignore",
            SERVER,
            "--memory",
            str(2 * max(sizes)),
            "--floor",
            floor_library,
        ]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(self._stop)
        print("filling plasma's store ...", flush=True)
        if self._answer() != "ready\n":
            raise NoPlasma("its server did not start; its words are above")

    def takes(self, nbytes: int, turn: int) -> bool:
        """Filling the store again takes seconds: a few sizes, and not in every round."""
        return nbytes in self._sizes and turn % self._every == 0

    @contextmanager
    def ready(self, nbytes: int) -> Iterator[Callable[[], Sample]]:
        """One object, in a store that has just been filled."""
        self._ask("fill")
        yield lambda: Sample(**self._ask(str(nbytes)))

    def _ask(self, command: str) -> dict[str, float]:
        assert self._server.stdin is not None
        try:
            self._server.stdin.write(f"{command}\n")
            self._server.stdin.flush()
            answer: dict[str, float] = json.loads(self._answer())
        except (BrokenPipeError, ValueError):
            raise OSError("plasma's server gave no answer") from None
        return answer

    def _answer(self) -> str:
        assert self._server.stdout is not None
        ready, _, _ = select.select([self._server.stdout], [], [], ANSWER_S)
        return self._server.stdout.readline() if ready else ""

    def _stop(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        try:
            self._server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._server.stdout.close()
