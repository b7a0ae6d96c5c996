"""What the tests of clients share: pages, and what a client sees of the others."""

from __future__ import annotations

from gcma_shm import Client

PAGE = 4096


def page_of(value: int) -> bytes:
    return (value + 1).to_bytes(8, "little") * (PAGE // 8)


def held(client: Client) -> int:
    return sum(area.held for area in client.areas())


def reserved(client: Client) -> int:
    return sum(area.reserved for area in client.areas())


def clients(client: Client) -> int:
    return int(client.stats()["broker"]["clients"])
