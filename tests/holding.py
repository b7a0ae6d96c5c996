"""What buffers clients hold, asked of their broker: for tests."""

from __future__ import annotations

from gcma_shm import Client
from tests.processes import eventually

PAGE = 4096


def held(client: Client) -> int:
    return sum(area.held for area in client.areas())


def clients(client: Client) -> int:
    return int(client.stats()["broker"]["clients"])


def fill_until_lent(client: Client) -> None:
    swap = client.swap(0, 2000, "behind")

    def is_lent() -> bool:
        for n in range(2000):
            swap.store(n, (n + 1).to_bytes(8, "little") * (PAGE // 8))
        return sum(area.lent for area in client.areas()) > 0

    assert eventually(is_lent)
