"""Runs CPython's own tests of what multiprocessing pickles, with the reducer registered: nothing may change. A program, for test_cpython_pools.

Its argument is a start method: `python -m tests.cpython.queues fork`. Prints what unittest prints.
"""

from __future__ import annotations

import os
import sys
import unittest

import test

from gcma_shm.clients import reducer
from tests.cpython.again import passes
from tests.cpython.where import DEBIAN

# What goes through ForkingPickler: what is sent by queues, pipes, pools and managers, and the arguments of processes. The others are about
# locks, signals, logging, the heap, and shared memory, which pickle nothing of a user's.
CHOSEN = (
    "TestQueue", "TestPool", "TestPoolWorkerErrors", "TestConnection", "TestListenerClient", "TestPicklingConnections",
    "TestSharedCTypes", "TestContainers", "TestMyManager", "TestRemoteManager", "TestSubclassingProcess",
)  # fmt: skip
# For seconds, and send next to nothing: in `make others`.
SLEEPS = ("test_pool_worker_lifetime", "test_timeout", "test_qsize", "test_make_pool")
# What is put is to be there a tenth of a second later, an echo within a second, the end of a pool within two.
BY_THE_CLOCK = {"test_get", "test_put", "test_connection", "test_terminate"}
ALL = os.environ.get("GCMA_OTHERS") == "all"

test.__path__.append(str(DEBIAN))
reducer.register()  # in worker processes that import this program as well

from test import _test_multiprocessing as tests  # noqa: E402 - where there are Debian's only, they are found by now

METHOD = sys.argv[1] if len(sys.argv) > 1 else "spawn"
tests.install_tests_in_module_dict(globals(), METHOD)


def load() -> list[unittest.TestCase]:
    """The chosen tests, of real processes and managers."""
    found: list[unittest.TestCase] = []
    for name, kind in sorted(globals().items()):
        if name in {f"With{how}{chosen}" for how in ("Processes", "Manager") for chosen in CHOSEN}:
            loaded = unittest.defaultTestLoader.loadTestsFromTestCase(kind)
            found += [case for case in loaded if ALL or case._testMethodName not in SLEEPS]  # type: ignore[union-attr,misc]
    return found


if __name__ == "__main__":
    sys.exit(0 if passes(load(), BY_THE_CLOCK) else 1)
