"""The programs in examples/, run as users run them: they end well, say what they found, and leave nothing behind."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from .processes import eventually

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
WAIT_S = 280.0  # a bound on what must come: each takes a few seconds on an idle machine

# The libraries that each is about, without which it is skipped, and what it prints, in this order. All but torch, which is large, are in the
# extra `test`.
RUNS = {
    # (Lent is what the broker has had the time to fill, and that may take until the next batch.)
    "image_batches": (["numpy"], [r"claimed in \d+ µs while [1-9]\d+ KiB were lent", r"batch 5: .*\n48 previews .* none is lost"]),
    "pandas_groupby": (["pandas"], [r"sum of price by shop: 50 groups", r"copied into shared memory: 15 MiB; .* 91 MiB"]),
    "grid_search": (["sklearn"], [r"6 settings, 3 folds each", r"best: .* the same as in one process"]),
    "web_service": (["aiohttp"], [r"serving http://127", *[r"3145728 pixels: .* as computed here"] * 12]),
    "feature_cache": (["gunicorn"], [r"sweep 1, .*: 24 of 24", r"sweep 2, .*: 24 of 24"]),
    "dataloader": (["torch"], [r"fork, epoch 2: 200 pictures", r"spawn, epoch 2: 200", r"held at the end: 0 bytes"]),
}  # fmt: skip
DISTRIBUTIONS = {"sklearn": "scikit-learn"}


class Place:
    """Where a program runs: a home, a temporary and a working directory of its own, and a session, by which its processes are known."""

    def __init__(self, tmp_path: Path) -> None:
        self.temporary = Path(tempfile.gettempdir()) / "t"  # short: sockets are made there
        self.directories = [self.temporary, tmp_path / "home", tmp_path / "work"]
        for directory in self.directories:
            directory.mkdir()
        self.started: list[subprocess.Popen[str]] = []

    def start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        temporary, home, work = map(str, self.directories)
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
            env=os.environ | {"TMPDIR": temporary, "HOME": home, "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=work,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def processes(self) -> list[str]:
        """What runs in the sessions of what was started."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
                if state != "Z" and int(session) in [process.pid for process in self.started]:
                    found.append((path / "cmdline").read_text().replace("\0", " "))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    def files(self) -> list[Path]:
        """What is left in its directories, and in /dev/shm with its number in the name."""
        numbers = {str(process.pid) for process in self.started}
        shared = [path for path in Path("/dev/shm").iterdir() if numbers & set(re.split("[-_.]", path.name))]
        return [path for directory in self.directories for path in directory.rglob("*")] + shared

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    try:
        yield place
        assert eventually(lambda: not place.processes()), f"processes left: {place.processes()}"
        assert eventually(lambda: not place.files()), f"files left: {place.files()}"
    finally:
        place.end()


def skip_without(modules: list[str]) -> None:
    for module in modules:
        pytest.importorskip(
            module, reason=f"{module} is not installed: pip install {DISTRIBUTIONS.get(module, module)}"
        )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", RUNS)
def test_it_runs(name: str, place: Place) -> None:
    needs, says = RUNS[name]
    skip_without(needs)
    process = place.start(name)
    said, complained = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, f"{said}\n{complained}"
    assert complained == ""
    assert re.search(".*\n.*".join(says), said, re.DOTALL), said


@pytest.mark.timeout(300)
def test_the_web_service_serves_others(place: Place) -> None:
    skip_without(RUNS["web_service"][0])
    process = place.start("web_service", "0")
    assert process.stdout is not None
    url = process.stdout.readline().removeprefix("serving ").strip()
    for length in (1, 300_000):
        with urllib.request.urlopen(url, bytes(length), timeout=WAIT_S) as answer:
            assert json.load(answer) == {"pixels": length, "histogram": [length] + [0] * 15}
    with pytest.raises(urllib.error.HTTPError, match="413") as refused:
        urllib.request.urlopen(url, bytes(5 << 20), timeout=WAIT_S)
    refused.value.close()  # or aiohttp waits for ten seconds for the rest of that body
    process.send_signal(signal.SIGINT)
    _, complained = process.communicate(timeout=WAIT_S)
    assert (process.returncode, complained) == (0, "")


def test_each_tells_how_it_is_run() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(RUNS)
    for name in RUNS:
        text = (EXAMPLES / f"{name}.py").read_text()
        assert f"python examples/{name}.py" in (ast.get_docstring(ast.parse(text)) or "")
        assert f"({name}.py)" in readme
        assert len(text.splitlines()) <= 110
