"""Workers end with the process that they work for, now or later."""

from __future__ import annotations

import os
import signal

import pytest

from gcma_shm.clients.parents import end_with
from tests.processes import Said, forked, in_fork

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def wait_for_the_end(said: Said, parent: int) -> None:
    end_with(parent)
    said.say("watches")
    said.hear()


def test_with_one_that_is_killed_later() -> None:
    with (
        forked(lambda said: said.hear()) as parent,
        forked(lambda said: wait_for_the_end(said, parent.pid)) as worker,
    ):
        assert worker.receive() == "watches"
        parent.kill()
        assert worker.wait() == -signal.SIGTERM


def test_with_one_that_has_gone_before() -> None:
    gone = in_fork(lambda _: os.getpid())
    with forked(lambda said: wait_for_the_end(said, gone)) as worker:
        assert worker.wait() == -signal.SIGTERM
