"""Peers without a server, as contenders of `peers.py`: LMDB, diskcache, a file, a mapped file, iceoryx2's blackboard; each at its best settings.

"Best" was measured on the way each is used here: single pages of random numbers, one or two processes, everything in memory.
"""

from __future__ import annotations

import mmap
import os
import struct
from contextlib import ExitStack
from typing import Any

from peers_ways import NotHere, Place, Way, Ways, Which


def big_endian(which: Which) -> list[bytes]:
    """LMDB's keys: in order of their numbers, which its tree likes."""
    return [struct.pack(">Q", n) for n in which.tolist()]


class Lmdb:
    """Its own transaction for each page, as ours; a batch is one. Nothing is flushed (sync, metasync off), stores go into the map (writemap)."""

    GET, PUT = "LMDB get", "LMDB put"

    def __init__(self, place: Place, stack: ExitStack) -> None:
        import lmdb

        size = 4 * place.pages * place.page_size + (64 << 20)
        env = stack.enter_context(
            lmdb.open(str(place.directory / "lmdb"), map_size=size, sync=False, metasync=False, map_async=True, writemap=True, readahead=False)
        )  # fmt: skip
        self._env, page = env, place.page
        begin = env.begin
        out = memoryview(bytearray(place.page_size))

        def get(key: bytes) -> Any:
            return begin().get(key)  # without `with`, which costs a tenth

        def get_into(key: bytes) -> None:
            with begin(buffers=True) as txn:
                view: Any = txn.get(key)
                out[:] = view

        def put(key: bytes) -> None:
            txn = begin(write=True)
            txn.put(key, page)
            txn.commit()

        def get_many(keys: list[bytes]) -> list[Any]:
            get = begin().get
            return [get(key) for key in keys]  # getmulti of a cursor is a tenth slower

        def put_many(items: list[tuple[bytes, bytes]]) -> None:
            with begin(write=True) as txn:
                txn.cursor().putmulti(items)

        add = Ways()
        add.load(self.GET, big_endian, get)
        add.load_into("LMDB get, view copied into a buffer", big_endian, get_into, out)
        add.store(self.PUT, big_endian, put)
        add.load_many("LMDB get, one transaction", big_endian, get_many, get_many)
        add.store_many("LMDB putmulti", lambda which: [(key, page) for key in big_endian(which)], put_many)
        self.ways: dict[str, dict[str, Way]] = add.found

    def put(self, n: int, page: bytes) -> None:
        """See `Store.put`."""
        with self._env.begin(write=True) as txn:
            txn.put(struct.pack(">Q", n), page)

    def get(self, n: int) -> bytes | None:
        """See `Store.get`."""
        with self._env.begin() as txn:
            page: bytes | None = txn.get(struct.pack(">Q", n))
        return page


class DiskCache:
    """All in SQLite: its files of their own for large values cost ten times as much to store. Nothing is evicted, flushed or counted."""

    GET = "diskcache get"

    def __init__(self, place: Place, stack: ExitStack) -> None:
        try:
            import diskcache
        except ImportError:
            raise NotHere("PyPI: diskcache") from None
        self._cache = cache = diskcache.Cache(
            str(place.directory / "diskcache"), timeout=60, size_limit=1 << 40, eviction_policy="none", cull_limit=0, statistics=0,
            disk_min_file_size=1 << 30, sqlite_synchronous=0, sqlite_mmap_size=1 << 30, sqlite_cache_size=1 << 16,
        )  # fmt: skip
        stack.callback(cache.close)
        page = place.page

        def get_many(ns: list[int]) -> list[Any]:
            with cache.transact():
                return [cache.get(n) for n in ns]

        def put_many(ns: list[int]) -> None:
            with cache.transact():
                for n in ns:
                    cache.set(n, page)

        add = Ways()
        add.load(self.GET, numbers, cache.get)
        add.store("diskcache set", numbers, lambda n: cache.set(n, page))
        add.load_many("diskcache get, one transaction", numbers, get_many, get_many)
        add.store_many("diskcache set, one transaction", numbers, put_many)
        self.ways: dict[str, dict[str, Way]] = add.found

    def put(self, n: int, page: bytes) -> None:
        """See `Store.put`."""
        self._cache.set(n, page)

    def get(self, n: int) -> bytes | None:
        """See `Store.get`."""
        page: bytes | None = self._cache.get(n)
        return page


def numbers(which: Which) -> list[int]:
    """Plain ints."""
    found: list[int] = which.tolist()
    return found


class File:
    """A file in the page cache: no keys, no eviction, and a reader may see half of a write. No call of the system's takes several places."""

    def __init__(self, place: Place, stack: ExitStack) -> None:
        self._fd = fd = os.open(place.directory / "file", os.O_RDWR | os.O_CREAT, 0o600)
        stack.callback(os.close, fd)
        self._size = size = place.page_size
        page = place.page
        add = Ways()
        add.load("file, os.pread", self._starts, lambda at: os.pread(fd, size, at))
        add.store("file, os.pwrite", self._starts, lambda at: os.pwrite(fd, page, at))
        self.ways: dict[str, dict[str, Way]] = add.found

    def _starts(self, which: Which) -> list[int]:
        found: list[int] = (which * self._size).tolist()
        return found

    def put(self, n: int, page: bytes) -> None:
        """See `Store.put`."""
        os.pwrite(self._fd, page, n * self._size)

    def get(self, n: int) -> bytes | None:
        """See `Store.get`."""
        return os.pread(self._fd, self._size, n * self._size)


class MappedFile:
    """Slices of a mapped file: no keys, no eviction, no wholeness. What Python itself needs for the copy."""

    def __init__(self, place: Place, stack: ExitStack) -> None:
        self._size = size = place.page_size
        fd = os.open(place.directory / "mapped", os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(fd, 0, place.pages * size)
        self._memory = memory = mmap.mmap(fd, place.pages * size)
        os.close(fd)
        stack.callback(memory.close)
        for at in range(0, len(memory), mmap.PAGESIZE):
            memory[at] = memory[at]  # this process' page table
        page = place.page
        add = Ways()
        add.load("mmap slice", self._slices, lambda at: memory[at])

        def put(at: slice) -> None:
            memory[at] = page

        add.store("mmap slice, assigned", self._slices, put)
        self.ways: dict[str, dict[str, Way]] = add.found

    def _slices(self, which: Which) -> list[slice]:
        return [slice(n * self._size, (n + 1) * self._size) for n in which.tolist()]

    def put(self, n: int, page: bytes) -> None:
        """See `Store.put`."""
        self._memory[n * self._size : (n + 1) * self._size] = page

    def get(self, n: int) -> bytes | None:
        """See `Store.get`."""
        return self._memory[n * self._size : (n + 1) * self._size]
