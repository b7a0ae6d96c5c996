"""LMDB as a contender of `pages.py`: sync off, a writable map, which is the fastest that it has."""

from __future__ import annotations

import lmdb
from pages_job import Contender, Plain, Setup, as_keys


def open_lmdb(setup: Setup) -> lmdb.Environment:
    """The database of that page size."""
    return lmdb.open(
        str(setup.directory / "lmdb"),
        map_size=4 * setup.pages * setup.page_size + (64 << 20),
        sync=False,
        writemap=True,
        max_dbs=0,
    )


def lmdbs(env: lmdb.Environment, page: bytes) -> dict[str, Contender]:
    """A transaction for each page, one for a batch, and a reader that is kept."""
    reading: list[lmdb.Transaction] = []

    def get(keys: list[bytes]) -> None:
        for key in keys:
            with env.begin() as txn:
                txn.get(key)

    def get_reused(keys: list[bytes]) -> None:
        get = reading[0].get
        for key in keys:
            get(key)

    def get_batch(keys: list[bytes]) -> None:
        with env.begin() as txn:
            for key in keys:
                txn.get(key)

    def put(keys: list[bytes]) -> None:
        for key in keys:
            with env.begin(write=True) as txn:
                txn.put(key, page)

    def put_batch(keys: list[bytes]) -> None:
        with env.begin(write=True) as txn:
            for key in keys:
                txn.put(key, page)

    def begin(pages: int) -> None:
        end(pages)
        reading.append(env.begin())

    def end(_pages: int) -> None:  # an old snapshot would keep LMDB from using its freed pages again
        while reading:
            reading.pop().abort()

    return {
        "LMDB get": Plain(as_keys, get, renew=end),
        "LMDB get, reused transaction": Plain(as_keys, get_reused, renew=begin),
        "LMDB get, batch": Plain(as_keys, get_batch, single=False),
        "LMDB put": Plain(as_keys, put, renew=end),
        "LMDB put, batch": Plain(as_keys, put_batch, single=False, renew=end),
    }
