"""Runs tests of CPython's. Those of them that go by the clock are run once more, alone, when they have failed, as CPython's own runner does with all
(`regrtest --rerun`): they take it for granted that some second and a half is enough for whatever others are to do meanwhile, and are not ours to repair.
"""

from __future__ import annotations

import unittest
from collections.abc import Iterable


def passes(cases: Iterable[unittest.TestCase], by_the_clock: Iterable[str]) -> bool:
    """Whether there are any, and all of them pass. Prints what unittest prints. `by_the_clock`: names of methods."""
    suite = unittest.TestSuite(cases)
    if not suite.countTestCases():
        return False
    done = unittest.TextTestRunner(verbosity=2).run(suite)
    failed = {case for case, _ in (*done.failures, *done.errors)}
    if not all(isinstance(case, unittest.TestCase) and _name(case) in by_the_clock for case in failed):
        return False
    again = unittest.TestSuite(type(case)(_name(case)) for case in failed)
    return not failed or unittest.TextTestRunner(verbosity=2).run(again).wasSuccessful()


def _name(case: unittest.TestCase) -> str:
    return str(getattr(case, "_testMethodName", ""))
