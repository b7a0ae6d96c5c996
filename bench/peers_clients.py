"""Clients of the servers, as contenders of `peers.py`: redis-py with hiredis, pylibmc, pymemcache; each at its best settings, with what was stored acknowledged."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from peers_ways import NotHere, Place, Way, Ways, Which


def text(which: Which) -> list[str]:
    """Keys."""
    return [str(n) for n in which.tolist()]


def plain(which: Which) -> list[bytes]:
    """Keys that need no encoding."""
    return [b"%d" % n for n in which.tolist()]


class Redis:
    """One connection of its own instead of a pool's saves a fifth. Batches by one command of many keys, and by a pipeline of single ones."""

    GET, SET = "Redis GET", "Redis SET"

    def __init__(self, place: Place, stack: ExitStack) -> None:
        try:
            import hiredis  # noqa: F401 # redis-py parses with it when it is there
            import redis
        except ImportError:
            raise NotHere("PyPI: redis[hiredis]") from None
        self._redis = client = redis.Redis(unix_socket_path=place.sockets["redis"], single_connection_client=True)
        stack.callback(client.close)
        page = place.page

        def get_piped(keys: list[bytes]) -> Any:
            with client.pipeline(transaction=False) as pipe:
                for key in keys:
                    pipe.get(key)
                return pipe.execute()

        def set_piped(keys: list[bytes]) -> None:
            with client.pipeline(transaction=False) as pipe:
                for key in keys:
                    pipe.set(key, page)
                pipe.execute()

        add = Ways()
        add.load(self.GET, plain, client.get)
        add.store(self.SET, plain, lambda key: client.set(key, page))
        add.load_many("Redis MGET", plain, client.mget, client.mget)
        add.load_many("Redis pipeline of GET", plain, get_piped, get_piped)
        add.store_many("Redis MSET", lambda which: dict.fromkeys(plain(which), page), client.mset)
        add.store_many("Redis pipeline of SET", plain, set_piped)
        self.ways: dict[str, dict[str, Way]] = add.found

    def put(self, n: int, page: bytes) -> None:
        """See `Store.put`."""
        self._redis.set(b"%d" % n, page)

    def get(self, n: int) -> bytes | None:
        """See `Store.get`."""
        page: Any = self._redis.get(b"%d" % n)
        return page if page is None else bytes(page)


class Pylibmc:
    """By the text protocol, which is a little faster than the binary one."""

    GET, SET = "memcached get, pylibmc", "memcached set, pylibmc"

    def __init__(self, place: Place, stack: ExitStack) -> None:
        try:
            import pylibmc
        except ImportError:
            raise NotHere("PyPI: pylibmc, which beyond Python 3.11 needs Debian's libmemcached-dev") from None
        self._client = client = pylibmc.Client([place.sockets["memcached"]], behaviors={"tcp_nodelay": True})
        stack.callback(client.disconnect_all)
        page = place.page

        def seen(keys: list[str]) -> list[bytes]:
            found = client.get_multi(keys)
            return [found[key] for key in keys]

        add = Ways()
        add.load(self.GET, text, client.get)
        add.store(self.SET, text, lambda key: client.set(key, page))
        add.load_many("memcached get_multi, pylibmc", text, client.get_multi, seen)
        add.store_many("memcached set_multi, pylibmc", lambda which: dict.fromkeys(text(which), page), client.set_multi)
        self.ways: dict[str, dict[str, Way]] = add.found

    def put(self, n: int, page: bytes) -> None:
        """See `Store.put`."""
        if not self._client.set(str(n), page):
            raise OSError(f"memcached refused page {n}")

    def get(self, n: int) -> bytes | None:
        """See `Store.get`."""
        page: bytes | None = self._client.get(str(n))
        return page


class Pymemcache:
    """In Python; its batches of stores are the faster ones, for it sends them all before it reads the replies."""

    GET, SET = "memcached get, pymemcache", "memcached set, pymemcache"

    def __init__(self, place: Place, stack: ExitStack) -> None:
        try:
            from pymemcache.client.base import Client
        except ImportError:
            raise NotHere("PyPI: pymemcache") from None
        self._client = client = Client(place.sockets["memcached"], default_noreply=False)
        stack.callback(client.close)
        page = place.page

        def seen(keys: list[str]) -> list[bytes]:
            found = client.get_many(keys)
            return [found[key] for key in keys]

        add = Ways()
        add.load(self.GET, text, client.get)
        add.store(self.SET, text, lambda key: client.set(key, page))
        add.load_many("memcached get_many, pymemcache", text, client.get_many, seen)
        add.store_many(
            "memcached set_many, pymemcache", lambda which: dict.fromkeys(text(which), page), client.set_many
        )
        self.ways: dict[str, dict[str, Way]] = add.found

    def put(self, n: int, page: bytes) -> None:
        """See `Store.put`."""
        self._client.set(str(n), page)

    def get(self, n: int) -> bytes | None:
        """See `Store.get`."""
        page: bytes | None = self._client.get(str(n))
        return page
