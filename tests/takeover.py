"""What the tests of takeovers share: a broker that is killed and started again on its endpoint, and what is left of it in the end."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import time
from collections.abc import Iterator

import gcma_shm
from tests.processes import Broker, broker, eventually, stands_still

PAGE = 4096
MIB = 1 << 20
AREAS = ("--area", "a=4M", "--area", "b=2M")


def page_of(n: int) -> bytes:
    return struct.pack("<Q", n) * (PAGE // 8)


@contextlib.contextmanager
def killed_and_restarted(first: Broker, *options: str) -> Iterator[Broker]:
    first.stop(signal.SIGKILL)
    with broker(first.endpoint, *(options or AREAS)) as second:
        yield second


def stop_for_good(first: Broker) -> None:
    """It reads nothing any more; to be killed."""
    os.kill(first.pid, signal.SIGSTOP)
    assert eventually(lambda: stands_still(first.pid))


class Late:
    """The clock, which may be put forward."""

    late_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.late_s


def held(client: gcma_shm.Client) -> dict[str, int]:
    return {area.name: area.held for area in client.areas()}
