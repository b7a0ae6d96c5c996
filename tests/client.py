"""What the tests of clients share: pages, and what a client sees of the others."""

from __future__ import annotations

from gcma_shm import Client

PAGE = 4096


def page_of(value: int) -> bytes:
    """Of 0 and more: none is of zeroes, which would take no memory."""
    return filled_with(value + 1)


def filled_with(word: int) -> bytes:
    """A page of that word over and over; of 0, the page of zeroes."""
    return word.to_bytes(8, "little") * (PAGE // 8)


def held(client: Client) -> int:
    return sum(area.held for area in client.areas())


def reserved(client: Client) -> int:
    return sum(area.reserved for area in client.areas())


def clients(client: Client) -> int:
    return int(client.stats()["broker"]["clients"])
