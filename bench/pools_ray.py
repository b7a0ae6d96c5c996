"""Ray in `pools.py`: on this host alone, without its dashboard, in a directory of its own; all that it started is gone in the end."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pools_work as work
from pools_job import EXCHANGE, SMALL, Array, Contender, Given, NotHere

RAY = "Ray"
END_S = 30.0  # what it started may take so long to end
STORE_ARRAYS = 8  # that its store has room for


def contenders(given: Given, stack: ExitStack) -> dict[str, list[Contender]]:
    """By job. Raises NotHere."""
    ray = stack.enter_context(_running(given))
    double, part_of, small = (ray.remote(task) for task in (work.double, work.part_of, work.small))
    ray.get([small.remote(number) for number in range(given.workers)])

    def exchange() -> Array:
        found: Array = ray.get(double.remote(ray.put(given.array)))
        return found

    def fan(parts: list[tuple[int, int]]) -> list[float]:
        there = ray.put(given.array)
        found: list[float] = ray.get([part_of.remote(there, *part) for part in parts])
        return found

    def all_small() -> list[int]:
        found: list[int] = ray.get([small.remote(number) for number in range(given.small)])
        return found

    return {
        EXCHANGE: [Contender(RAY, exchange)],
        **{job: [Contender(RAY, lambda parts=parts: fan(parts))] for job, parts in given.fans().items()},  # type: ignore[misc]
        SMALL: [Contender(RAY, all_small)],
    }


@contextmanager
def _running(given: Given) -> Iterator[Any]:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    try:
        import ray
    except ImportError:
        raise NotHere("no Ray: pip install 'gcma-shm[pools]'") from None
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:  # short: for its sockets
        before = _children()
        try:
            ray.init(
                num_cpus=given.workers,
                object_store_memory=STORE_ARRAYS * given.array.nbytes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
                _temp_dir=directory,
            )
            yield ray
        finally:
            ray.shutdown()
            _wait_for_the_end(before)


def _children() -> set[int]:
    """Of this process, and theirs."""
    found: set[int] = set()
    fresh = {os.getpid()}
    while fresh:
        fresh = {
            int(child)
            for pid in fresh
            for path in Path(f"/proc/{pid}/task").glob("*/children")
            for child in path.read_text().split()
        } - found
        found |= fresh
    return found


def _wait_for_the_end(before: set[int]) -> None:
    """Raises RuntimeError when something that was started since is still there."""
    deadline = time.monotonic() + END_S
    while left := {pid for pid in _children() - before if _is_ray(pid)}:
        if time.monotonic() > deadline:
            raise RuntimeError(f"Ray has left processes: {sorted(left)}")
        time.sleep(0.1)


def _is_ray(pid: int) -> bool:
    """A process that runs, of Ray."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return status != "Z" and b"ray" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
