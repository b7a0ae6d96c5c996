"""The core under AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer: threads over one arena, and the lives of objects.

The arena is allocated memory here, so what is written behind its last page, or before its first byte, is seen.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.disks import needs_direct
from tests.sanitize.runtime import FOUND, HERE, MEMORY, Sanitized, preloaded

SECONDS = float(os.environ.get("GCMA_SANITIZE_S", "0"))
SHORT_S = 2.0
PLANTED_S = 400.0  # a bound: the first report ends the run
SUITE = [
    f"tests/test_{name}.py"
    for name in (
        *("core", "core_checksums", "core_reservations", "core_slots", "buffer", "swap_contract"),
        *("reservation", "reservation_claims", "reservation_shared"),
    )
]
WHY_NOT = preloaded(MEMORY)
pytestmark = [
    pytest.mark.slow,  # with its build
    pytest.mark.timeout(900 + 3 * SECONDS),
    pytest.mark.skipif(isinstance(WHY_NOT, str), reason=str(WHY_NOT)),
]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Sanitized:
    return Sanitized(MEMORY, tmp_path_factory)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Sanitized:
    return Sanitized(MEMORY, tmp_path_factory, "-include", str(HERE / "planted.h"))


def test_threads(core: Sanitized, tmp_path: Path) -> None:
    needs_direct(tmp_path)
    done = core.run(
        "tests.sanitize.threads", tmp_path, "--seconds", SECONDS or SHORT_S, "--allocated", "--spill-io", "direct"
    )
    assert done.returncode == 0, done.stdout


def test_lives_of_objects(core: Sanitized, tmp_path: Path) -> None:
    done = core.run("tests.sanitize.lives", tmp_path)
    assert done.returncode == 0, done.stdout
    assert "all well" in done.stdout


@pytest.mark.skipif(not SECONDS, reason="with `make sanitize`: other tests of the core once more, under the sanitizers")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", SUITE)
def test_other_tests_of_the_core(file: str, core: Sanitized, tmp_path: Path) -> None:
    own = ["--basetemp", str(tmp_path / "own"), "-p", "no:cacheprovider"]
    done = core.run("pytest", "-q", "--timeout", "600", *own, file, options="detect_leaks=0")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("plant", "what", "report"),
    [
        ("long_copy", "lives", "AddressSanitizer: use-after-poison"),
        ("long_load", "threads", "AddressSanitizer: heap-buffer-overflow"),
        ("leak", "lives", "LeakSanitizer: detected memory leaks"),
        ("wide_shift", "lives", "runtime error: shift exponent"),
    ],
)
def test_a_planted_fault_is_reported(plant: str, what: str, report: str, planted: Sanitized, tmp_path: Path) -> None:
    options: list[str | float] = ["--seconds", PLANTED_S, "--allocated"] if what == "threads" else []
    done = planted.run(f"tests.sanitize.{what}", tmp_path, *options, plant=plant)
    assert done.returncode == FOUND, done.stdout
    assert report in done.stdout
