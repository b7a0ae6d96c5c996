"""joblib's own tests of Parallel, on our backend in the place of loky. `make others` runs all variants of each, and those that take long."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BOUND_S = 900.0  # a loaded machine takes ten times as long as an idle one

# What else is there concerns the other backends, and would only take time.
OURS = "loky or None or nested or generator or error or timeout or batch or dispatch or cpu_count or interactive or initializer or threadpool"

LEFT_OUT = {
    "test_auto_memmap_on_arrays_from_generator": "wants numpy.memmap",
    "test_memmapping_leaks": "wants numpy.memmap, and files during the call",
}
LONG = {
    "test_dispatch_race_condition": "two hundred calls of up to 12 workers, to find a race in joblib's own dispatch: half a minute",
}
ALL = os.environ.get("GCMA_OTHERS") == "all"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("joblib.test") is None, reason="this joblib was installed without its tests"
)
@pytest.mark.timeout(BOUND_S + 60)
def test_joblibs_tests_of_parallel(tmp_path: Path) -> None:
    left_out = " and ".join(f"not {name}" for name in (LEFT_OUT if ALL else LEFT_OUT | LONG))
    command = [
        sys.executable, "-m", "pytest", "-p", "tests.joblib_as_loky", "-p", "no:cacheprovider", "-q", "--pyargs", "joblib.test.test_parallel",
        "-k", f"({OURS}) and not (multiprocessing or threading or sequential) and {left_out}", f"--basetemp={tmp_path / 'theirs'}",
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        command,
        cwd=tmp_path,  # theirs is no test of this tree, under its configuration
        env=os.environ
        | {"PYTHONPATH": path, "GCMA_SIZE": "256M", "JOBLIB_TEMP_FOLDER": str(tmp_path / "folders")}
        | {"PYTEST_ADDOPTS": ""},  # what this run was given is not for theirs
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert done.returncode == 0, f"status {done.returncode}: {done.stdout[-5000:]}{done.stderr[-2000:]}"
    words = done.stdout.strip().splitlines()[-1].split()
    assert int(words[words.index("passed") - 1] if "passed" in words else words[words.index("passed,") - 1]) > 120
    assert not (tmp_path / "folders").exists() or not list((tmp_path / "folders").iterdir())
