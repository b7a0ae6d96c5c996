"""Areas in use, and the command that tells and changes them: for tests."""

from __future__ import annotations

import subprocess
import sys

from gcma_shm import AreaInfo, Client
from gcma_shm.clients.swap import Swap
from tests.client import page_of
from tests.processes import WAIT_S, eventually

PAGE = 4096
K, M = 1 << 10, 1 << 20
SLOTS = 2000  # twice what the arena of these tests has room for


def area(client: Client, name: str) -> AreaInfo:
    return next(area for area in client.areas() if area.name == name)


def fill(client: Client) -> Swap:
    swap = client.swap(0, SLOTS, "behind")
    for n in range(SLOTS):
        swap.store(n, page_of(n))
    return swap


def fill_until_lent(client: Client, name: str) -> Swap:
    def is_lent() -> bool:
        fill(client)
        return area(client, name).lent > 0

    assert eventually(is_lent)
    return client.swap(0, SLOTS, "behind")


def all_there(swap: Swap) -> bool:
    return all(swap.load(n) == page_of(n) for n in range(SLOTS))


def gcma(*words: str, status: int = 0) -> str:
    """What a `gcma` command says: on standard output, or, when it fails, on the other."""
    done = subprocess.run(
        [sys.executable, "-m", "gcma_shm.broker.cli", *words],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout if status == 0 else done.stderr
