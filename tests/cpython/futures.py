"""Runs CPython's own tests of concurrent.futures with ArenaExecutor in the place of ProcessPoolExecutor. A program, for test_cpython_pools.

Its argument is a start method of multiprocessing: `python -m tests.cpython.futures spawn`. Prints what unittest prints.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import os
import sys
import unittest
from collections.abc import Iterator
from typing import Any

import test
from test.support import script_helper

from gcma_shm.clients.executor import ArenaExecutor
from tests.cpython.again import passes
from tests.cpython.where import DEBIAN

PARTS = ("process_pool", "shutdown", "wait", "as_completed", "init", "deadlock")

# What fails while it is unpickled breaks the standard library's pool, whose queues cannot tell what failed. Here it is the task's
# exception, and the pool goes on; tests/test_executor.py has that.
TASKS_FAIL_ALONE = {
    "test_error_at_task_unpickle",
    "test_exit_at_task_unpickle",
    "test_error_during_result_unpickle_in_result_handler",
    "test_exit_during_result_unpickle_in_result_handler",
}
# Half of the time, in which they sleep; how workers start makes no difference to them. `make others` runs them each way.
ONCE = ("WaitTest", "AsCompletedTest", "test_map_timeout")
# One task is to sleep for longer than the others take, and those who wait for them; an idle worker is to be told of before the next task comes.
BY_THE_CLOCK = {
    "test_first_completed",
    "test_first_completed_some_already_completed",
    "test_first_exception",
    "test_first_exception_some_already_complete",
    "test_timeout",
    "test_zero_timeout",
    "test_map_timeout",
    "test_idle_process_reuse_one",
}
ALL = os.environ.get("GCMA_OTHERS") == "all"

# Before the tests name it; in their worker processes too, which import this program.
concurrent.futures.ProcessPoolExecutor = ArenaExecutor  # type: ignore[misc]
test.__path__.append(str(DEBIAN))


def _assert_python_ok(*arguments: str, **environment: str) -> Any:
    """Some tests run a program that imports the executor by its name, and something of theirs."""
    theirs, ours = "from concurrent.futures import Arena", "from gcma_shm.clients.executor import Arena"
    found = f"import test; test.__path__.append({str(DEBIAN)!r}); {ours}"
    return _run(*(argument.replace(theirs, found) for argument in arguments), **environment)


_run, script_helper.assert_python_ok = script_helper.assert_python_ok, _assert_python_ok


def cases(suite: unittest.TestSuite, method: str) -> Iterator[unittest.TestCase]:
    """Those with a process pool of this kind that are about nothing that is different here."""
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from cases(item, method)
            continue
        name = item._testMethodName
        is_debians = str(sys.modules[type(item).__module__].__file__).startswith(str(DEBIAN))
        wanted = getattr(item, "ctx", None) == method and name not in TASKS_FAIL_ALONE
        once = ALL or method == "fork" or not any(part in item.id() for part in ONCE)
        # The program that this one runs has worker processes that import the tests, and would not find Debian's.
        found = method == "fork" or name != "test_interpreter_shutdown" or not is_debians
        if wanted and once and found:
            yield item


def load(method: str) -> Iterator[unittest.TestCase]:
    """The modules, of a package since 3.12."""
    package = importlib.import_module("test.test_concurrent_futures")
    if hasattr(package, "__path__"):
        modules = [importlib.import_module(f"{package.__name__}.test_{part}") for part in PARTS]
    else:
        modules = [package]
    for module in modules:
        yield from cases(unittest.defaultTestLoader.loadTestsFromModule(module), method)


if __name__ == "__main__":
    sys.exit(0 if passes(load(sys.argv[1]), BY_THE_CLOCK) else 1)
