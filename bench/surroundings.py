"""Where a run takes place: what machine it is, and a directory of its own on the disk."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory_kb = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": memory_kb >> 10,
        "kernel": platform.release(),
        "shmem_huge_pages": "".join(_lines("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("gcma-shm", "numpy", "lmdb", "pyzmq", "msgpack")},
        "load_average_before": os.getloadavg(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def describe_machine(found: Mapping[str, Any]) -> str:
    """One line about it."""
    load = ", ".join(f"{value:.1f}" for value in found["load_average_before"])
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['memory_mib']} MiB, Linux {found['kernel']}, Python {found['python']}; "
        f"load before the run {load}"
    )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory on a disk, where spill files lie by default too; removed in the end, also on SIGTERM."""
    parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="gcma-bench-", dir=parent))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield path
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(path, ignore_errors=True)
