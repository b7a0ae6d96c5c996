"""A pytest plugin under which "loky", joblib's default backend, is ours: for joblib's and scikit-learn's own tests.

Some of joblib's ask for the very class by its name, so that name is put over ours as well, before their modules are imported. Of a test's
variants that reach a backend in the same way one is run, unless `$GCMA_OTHERS` is "all".
"""

from __future__ import annotations

import os

import joblib._parallel_backends
import joblib.parallel
import pytest

from gcma_shm.clients.joblib import ArenaBackend

ArenaBackend.__name__ = "LokyBackend"
for module in (joblib.parallel, joblib._parallel_backends):
    module.LokyBackend = ArenaBackend
joblib.parallel.BACKENDS["loky"] = ArenaBackend

# By a parameter's name: what comes to the same as another value of it, by the time that joblib asks the backend.
SAME = {
    "context": {joblib.parallel.parallel_backend: joblib.parallel.parallel_config},  # the older name
    "n_jobs": {-1: 2},  # a number of processes as well; how many that is, other tests ask
    "backend": {None: "loky"},  # the default
}


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
