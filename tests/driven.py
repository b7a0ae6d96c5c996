"""The asyncio client behind the face of the one that blocks, so that both pass the same tests: a loop in a thread, and each call awaited there."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self, cast

import gcma_shm.aio
from gcma_shm import Client
from tests.processes import WAIT_S

Loops = Callable[[], asyncio.AbstractEventLoop]


class Driver:
    """A loop in a thread; in a forked child one that runs when it is needed."""

    def __init__(self, new_loop: Loops) -> None:
        self._new_loop = new_loop
        self._pid = os.getpid()
        self.loop = new_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """What the coroutine returns."""
        if os.getpid() != self._pid:
            self._pid, self.loop = os.getpid(), self._new_loop()
            self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT_S)

    def end(self) -> None:
        """The loop is closed."""
        self.run(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()


class Driven:
    """An object whose coroutines are run by the driver; all else is its own."""

    def __init__(self, driver: Driver, driven: Any) -> None:
        self._driver = driver
        self._driven = driven

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._driven, name)
        if not inspect.iscoroutinefunction(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            return self._driver.run(value(*arguments, **options))

        return call

    def __repr__(self) -> str:
        return repr(self._driven)


class DrivenSwap(Driven):
    """A swap type. By messages, `count` and `contains` stand for what cannot be awaited."""

    def __len__(self) -> int:
        driven = self._driven
        return int(self._driver.run(driven.count())) if hasattr(driven, "count") else len(driven)

    def __bool__(self) -> bool:
        return bool(self._driven)

    def __contains__(self, offset: object) -> bool:
        driven = self._driven
        return bool(self._driver.run(driven.contains(offset))) if hasattr(driven, "contains") else offset in driven


class DrivenClient(Driven):
    """A client, connected, with its loop, which ends with it."""

    def __init__(self, new_loop: Loops, *arguments: Any, mapped: bool, **options: Any) -> None:
        driver = Driver(new_loop)

        async def connect() -> gcma_shm.aio.Client:
            return await gcma_shm.aio.connect(*arguments, mapped=mapped, **options)

        super().__init__(driver, driver.run(connect()))
        self._end = weakref.finalize(self, driver.end)  # for tests that close without leaving a block

    def swap(self, *arguments: Any, **options: Any) -> DrivenSwap:
        """Mapped or by messages, as the client is."""
        client = self._driven
        declare = client.swap if client.mapped or client.closed else client.swap_by_messages
        return DrivenSwap(self._driver, self._driver.run(declare(*arguments, **options)))

    def close(self) -> None:
        """The loop, too; a second time has no effect."""
        if not self._driver.loop.is_closed():
            self._driver.run(self._driven.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        self._end()


def driven(new_loop: Loops, *arguments: Any, mapped: bool, **options: Any) -> Client:
    """For tests that take a client that blocks."""
    return cast(Client, DrivenClient(new_loop, *arguments, mapped=mapped, **options))
