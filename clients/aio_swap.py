"""Swap types of a client that awaits: in shared memory, where only what asks the broker or waits for a file is awaited; and by messages, where everything is."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex, cast

from gcma_shm import messages
from gcma_shm._core import Plane, Slots
from gcma_shm.clients.correspondence import Wanted
from gcma_shm.clients.swap import AsyncOwner, MessagePages, Page, counting
from gcma_shm.errors import Closed, GcmaError
from gcma_shm.messages import Frame, Reply


class Swap(Slots):
    """A swap type of a client that maps the arena. `store`, `load`, `load_into`, `store_many`, `load_many`, `invalidate_page`, `in` and `len` are plain
    calls, as in `gcma_shm.Swap`: they ask nobody. A store that is written through, and a load of a page that is in the spill file
    alone, take as long as the file does; `asyncio.to_thread` brings them out of the loop.
    """

    def __init__(self, _plane: Plane, _type: int, _life: int, _timeout: float, owner: AsyncOwner) -> None:
        self._owner = owner  # the handle itself is made in `__new__`

    async def sync(self, timeout: float | None = None) -> None:  # type: ignore[override] # it may take long, so this one is awaited
        """Returns when all that was stored before is in the spill file; it waits in a thread, which goes on should this be cancelled. Raises
        SlotBusy, SpillError.
        """
        await asyncio.to_thread(super().sync, timeout)

    async def invalidate_area(self) -> None:
        """Ends the type's life with all of its pages; this handle is closed. Raises Closed, BrokerUnavailable."""
        len(self)  # raises Closed for a handle that has ended, without a message
        await self._owner._channel.request("invalidate_area", {"type": self.type, "life": self.life})
        self.close()

    def __repr__(self) -> str:
        return f"<swap type {self.type}: {self.slots} slots of {self.page_size} bytes, mapped>"


class MessageSwap(MessagePages):
    """A swap type whose pages travel in messages. The same operations as `gcma_shm.Swap`, awaited: the broker reads and writes the files. `contains` and
    `count` stand for `in` and `len`.
    """

    _owner: AsyncOwner

    async def store(self, offset: SupportsIndex, page: Page) -> None:
        """See `gcma_shm.Swap.store`. Cancelled, it may be done, or not."""
        slot = self._slot(offset)
        whole = page if type(page) is bytes and len(page) == self.page_size else self._pages(page, 1)
        await self._request("store", slot, (whole,))

    async def load(self, offset: SupportsIndex) -> bytes | None:
        """See `gcma_shm.Swap.load`."""
        reply = await self._request("load", self._slot(offset))
        return bytes(reply.pages[0]) if reply.results["hit"] else None

    async def load_into(self, offset: SupportsIndex, buffer: Any) -> bool:
        """See `gcma_shm.Swap.load_into`."""
        slot = self._slot(offset)
        out = self._pages(buffer, 1, writable=True)
        reply = await self._request("load", slot)
        if reply.results["hit"]:
            out[:] = reply.pages[0]
        return bool(reply.results["hit"])

    async def invalidate_page(self, offset: SupportsIndex) -> None:
        """See `gcma_shm.Swap.invalidate_page`."""
        await self._request("invalidate_page", self._slot(offset))

    async def invalidate_area(self) -> None:
        """See `gcma_shm.Swap.invalidate_area`."""
        await self._request("invalidate_area", self._life())
        self.close()

    async def sync(self, timeout: float | None = None) -> None:
        """See `gcma_shm.Swap.sync`. The broker waits for other processes' writes for a minute at the most."""
        parameters, patience = self._sync_parameters(timeout)
        await self._owner._channel.request("sync", parameters, patience=patience)

    async def count(self) -> int:
        """How many slots hold a page."""
        return int((await self._request("count", self._life())).results["count"])

    async def contains(self, offset: SupportsIndex) -> bool:
        """Whether a page is stored there."""
        try:
            slot = self._slot(offset)
        except IndexError:
            return False
        return bool((await self._request("contains", slot)).results["contains"])

    async def store_many(self, offsets: Iterable[SupportsIndex], pages: Page) -> None:
        """See `gcma_shm.Swap.store_many`. Several batches are under way at once; the broker serves them in order."""
        wanted = self._offsets(offsets)
        source = self._pages(pages, len(wanted))
        size, life = self.page_size, self._life()
        if self.batch == 1:
            with counting() as done:
                for i, offset in enumerate(wanted):
                    await self.store(offset, source[i * size : (i + 1) * size])
                    done.append(1)
            return
        batches: Iterator[Wanted] = (
            ("store_many", life | {"offsets": packed}, (source[first * size : (first + count) * size],))
            for first, count, packed in self._split(wanted)
        )
        await self._exchange(batches, len(wanted), lambda _: None)

    async def load_many(self, offsets: Iterable[SupportsIndex], out: Any) -> list[bool]:
        """See `gcma_shm.Swap.load_many`."""
        wanted = self._offsets(offsets)
        target = self._pages(out, len(wanted), writable=True)
        size, life = self.page_size, self._life()
        hits: list[bool] = []
        if self.batch == 1:
            with counting() as served:
                for i, offset in enumerate(wanted):
                    hit = await self.load_into(offset, target[i * size : (i + 1) * size])
                    served.append(hit)
            return served

        def lay_out(reply: Reply) -> None:
            first = len(hits)
            hits.extend(map(bool, reply.results["hits"]))
            if reply.pages:
                self._lay_out(reply.pages[0], hits[first:], target[first * size : len(hits) * size])

        batches: Iterator[Wanted] = (
            ("load_many", life | {"offsets": packed}, ()) for _, _, packed in self._split(wanted)
        )
        await self._exchange(batches, len(wanted), lay_out)
        return hits

    async def _exchange(self, batches: Iterator[Wanted], pages: int, accept: Any) -> None:
        """Sends batches, messages.BATCHES of them ahead of their replies, which `accept` gets in order. After the first error no more is sent; it is
        raised when all replies are in, and tells how many pages were served before.
        """
        sent: deque[asyncio.Task[Reply]] = deque()
        done = 0
        first: Exception | None = None
        try:
            while True:
                while first is None and len(sent) < messages.BATCHES and (wanted := next(batches, None)) is not None:
                    sent.append(asyncio.ensure_future(self._request(*wanted)))
                if not sent:
                    break
                try:
                    reply = await sent[0]
                except (GcmaError, ValueError, IndexError) as error:
                    if first is None:
                        first = error
                        done += getattr(error, "done", 0)
                else:
                    if first is None:
                        done = min(done + self.batch, pages)
                        accept(reply)
                sent.popleft()
        finally:
            for request in sent:
                request.cancel()
                request.add_done_callback(_forget)
        if first is not None:
            first.done = done  # type: ignore[attr-defined] # plain errors take the attribute as well
            raise first

    async def _request(self, operation: str, parameters: dict[str, Any], pages: Sequence[Frame] = ()) -> Reply:
        if self._closed:
            raise Closed(f"this handle on type {self.type} is closed")
        return cast(Reply, await self._owner._channel.request(operation, parameters, pages))


def _forget(request: asyncio.Task[Reply]) -> None:
    """Nobody wants to know how it ended."""
    if not request.cancelled():
        request.exception()
