"""What the tests of takeovers share: a broker that is killed and started again on its endpoint, and what is left of it in the end."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

import gcma_shm
from tests.processes import Broker, broker

PAGE = 4096
MIB = 1 << 20
AREAS = ("--area", "a=4M", "--area", "b=2M")


@contextlib.contextmanager
def killed_and_restarted(first: Broker, *options: str) -> Iterator[Broker]:
    first.stop(signal.SIGKILL)
    with broker(first.endpoint, *(options or AREAS)) as second:
        yield second


class Late:
    """The clock, which may be put forward."""

    late_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.late_s


def held_by_area(client: gcma_shm.Client) -> dict[str, int]:
    return {area.name: area.held for area in client.areas()}
