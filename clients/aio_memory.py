"""Buffers and reservations of a client that awaits: views, arrays, `claim` and what it lends are as ever; what asks the broker is awaited."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from gcma_shm._core import Span
from gcma_shm.clients.buffer import Held, yielding_to
from gcma_shm.clients.handles import Handle
from gcma_shm.clients.reservation import Promised, nap_through
from gcma_shm.errors import StaleHandle
from gcma_shm.sizes import check_seconds

if TYPE_CHECKING:
    from gcma_shm.clients.aio_client import Client


class Buffer(Held):
    """A contiguous range of an arena, this client's until `free`. As `gcma_shm.Buffer`, but that `free` and `hand_over` are awaited, and
    `async with` frees.

    Its views and arrays may be used in any thread. One that nothing refers to any more is given back without an await. Pickled
    and loaded in another process of the arena it is a `gcma_shm.Buffer` there, of that process's client.
    """

    _client: Client

    async def free(self) -> None:
        """Gives the memory back; a second time has no effect. It is given back also when this is cancelled. Raises BufferError while a view or
        array of it is alive.
        """
        if self._end():
            await self._free()

    async def keep(self, name: str, process: int | None = None) -> None:
        """See `gcma_shm.Buffer.keep`."""
        await self._client._run(self._client._keeping(self._number, name, self._keeper(process)))
        self.name = name

    async def hand_over(self, timeout: float = 60, after_end: float | None = None) -> Handle:
        """See `gcma_shm.Buffer.hand_over`."""
        self._living()
        return await self._client._run(
            self._client._handing_over(self._number, self._claim, timeout, after_end, reservation=False)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with yielding_to(error):
            await self.free()


class Reservation(Promised):
    """A buffer promised in advance. As `gcma_shm.Reservation`, but that `release` and `hand_over` are awaited, and `claim_in_turn`
    is what waits for another holder.
    """

    _client: Client

    def claim(self) -> Buffer:
        """The buffer: in microseconds, without a message, whatever the cache, the clients and the broker do. A plain call.

        It cannot fail for who holds the reservation alone. Raises ArenaExhausted while another holder has it claimed (`claim_in_turn`
        waits for that), StaleHandle after `release`; BrokerUnavailable, after the client's timeout, when the broker is stopped in the middle
        of its copy of one page.
        """
        got = self._claims.claim(self)
        return self._claimed(*nap_through(self._in_turn(got, 0)) if isinstance(got, int) else got)

    async def claim_in_turn(self, timeout: float | None = None) -> Buffer:
        """As `claim`, but waits up to `timeout` seconds (None: for ever; in no order among those that wait) while another holder has it
        claimed.
        """
        got = self._claims.claim(self)
        if isinstance(got, int):
            turns = self._in_turn(got, None if timeout is None else check_seconds("timeout", timeout))
            try:
                while True:
                    await asyncio.sleep(next(turns))
            except StopIteration as done:
                got = cast(tuple[Span, int], done.value)
        return self._claimed(*got)

    def _claimed(self, span: Span, generation: int) -> Buffer:
        claims, channel, number = self._claims, self._client._channel, self.number

        async def free() -> None:
            claims.end(number, generation)  # at once; and should it be shared, the broker is told
            if channel.holds:
                await channel.settled()

        return Buffer(span, self._place, self._client, number, free, generation)

    async def release(self) -> None:
        """Gives the promise back; a second time has no effect. It is given back also when this is cancelled. The memory is free when its
        last holder has released it.

        Raises BufferError while a view or array of a buffer claimed from it is alive; a claimed buffer without is freed.
        """
        if self.released:
            return
        self._retire()
        await self._client._channel.free(self.number, 0, self._hold)

    async def hand_over(self, timeout: float = 60) -> Handle:
        """See `gcma_shm.Reservation.hand_over`."""
        if self.released:
            raise StaleHandle("this reservation was released")
        return await self._client._run(self._client._handing_over(self.number, 0, timeout, None, reservation=True))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with yielding_to(error):
            await self.release()
