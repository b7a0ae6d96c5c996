"""Workers end with the process that they work for, now or later."""

from __future__ import annotations

import signal

import pytest

from gcma_shm.clients.parents import Who, end_with, who_we_are
from tests.processes import Said, forked, in_fork

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def wait_for_the_end(said: Said, parent: Who) -> None:
    end_with(parent)
    said.say("watches")
    said.hear()


def tell_and_wait(said: Said) -> None:
    said.say(who_we_are())
    said.hear()


def test_with_one_that_is_killed_later() -> None:
    with forked(tell_and_wait) as parent:
        who = parent.receive()
        with forked(lambda said: wait_for_the_end(said, who)) as worker:
            assert worker.receive() == "watches"
            parent.kill()
            assert worker.wait() == -signal.SIGTERM


def test_with_one_that_has_gone_before() -> None:
    gone = in_fork(lambda _: who_we_are())
    with forked(lambda said: wait_for_the_end(said, gone)) as worker:
        assert worker.wait() == -signal.SIGTERM


def test_with_one_whose_number_is_anothers_by_now() -> None:
    pid, start = who_we_are()
    with forked(lambda said: wait_for_the_end(said, (pid, start - 1))) as worker:
        assert worker.wait() == -signal.SIGTERM
