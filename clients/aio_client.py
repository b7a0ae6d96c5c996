"""The asyncio client: the session, types and buffers of `gcma_shm.Client`, for the tasks of one event loop. The public door is `gcma_shm.aio`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections.abc import Generator
from types import TracebackType
from typing import Any, Literal, Self, cast

from gcma_shm import layout
from gcma_shm._core import Plane, Span
from gcma_shm.clients.aio_channel import AsyncChannel
from gcma_shm.clients.aio_memory import Buffer, Reservation
from gcma_shm.clients.aio_swap import MessageSwap, Swap
from gcma_shm.clients.aio_watch import Watch
from gcma_shm.clients.buffer import yielding_to
from gcma_shm.clients.handles import Handle, async_clients
from gcma_shm.clients.info import AreaInfo, NameInfo, QuotaInfo
from gcma_shm.clients.steps import Ask, Free, Granted, Sleep, Step, Stepping, Steps, T
from gcma_shm.curve import Credentials, credentials_of
from gcma_shm.endpoint import default_endpoint
from gcma_shm.errors import ArenaError
from gcma_shm.presence import Presence
from gcma_shm.sizes import parse_size

CLEARED_AT_ONCE_MAX = 1 << 20  # bytes: what a thread would be woken for takes longer


class Client(Stepping[Buffer, Reservation]):
    """Made by `connect`. For all tasks of the event loop that it was connected in, at once; used in another loop or thread it raises
    RuntimeError. (Its swap types, and views and arrays of its buffers, may be used in any thread.)

    A cancelled call gives back what was granted for it meanwhile, and disturbs nobody else's. A forked child is a client of its own, holds what its parent held,
    and belongs to the first event loop that uses it there.
    """

    _channel: AsyncChannel

    def __init__(
        self,
        endpoint: str,
        mapped: bool | None,
        timeout: float,
        wait_for_broker: float,
        credentials: Credentials | None = None,
    ) -> None:
        super().__init__(endpoint, mapped, timeout, wait_for_broker)
        self._swaps: weakref.WeakSet[Swap | MessageSwap] = weakref.WeakSet()
        self._watch: Watch | None = None
        self._clearing: set[asyncio.Future[None]] = set()  # memory that threads are clearing
        self._closing = asyncio.Lock()
        owner = weakref.ref(self)
        self._channel = AsyncChannel(
            endpoint, timeout, wait_for_broker, lambda: cast(Client, owner())._introduce(), credentials
        )

    async def _connect(self, required: bool, prefault: bool) -> None:
        try:
            arena = await self._run(self._connecting(required))
            async_clients.add(
                self
            )  # before anything else may fork: from now on there is a lock that a child must not keep
            if arena is not None and prefault:
                await asyncio.to_thread(self._prefault, arena)
        except BaseException:
            # The session, if there is one, is ended by its arena's lock and socket; and nothing is awaited after a cancellation.
            async_clients.discard(self)
            self._leave_arena()
            self._channel.part()
            raise

    # --- swap types

    async def swap(
        self, type: int, slots: int, write: Literal["through", "behind"] = "through", share: int = layout.SHARE_WHOLE
    ) -> Swap:
        """Declares swap type `type`, or opens it as it was declared: see `gcma_shm.Client.swap`. Its pages go through shared memory, by plain
        calls.

        Raises ArenaError for a client that does not map the arena: `swap_by_messages` is for those.
        """
        if self._plane is None and not self.closed:
            raise ArenaError(
                "load and store would block the event loop in a client that does not map the arena: use swap_by_messages(), whose "
                "operations are awaited, or connect with mapped=True on the broker's host"
            )
        type_, _, life = await self._run(self._declaring(type, slots, write, share))
        swap = Swap(cast(Plane, self._plane), type_, life, self._channel.timeout, self)
        self._swaps.add(swap)
        return swap

    async def swap_by_messages(
        self, type: int, slots: int, write: Literal["through", "behind"] = "through", share: int = layout.SHARE_WHOLE
    ) -> MessageSwap:
        """As `swap`, but that every page travels in a message, and every operation is awaited; also for a client that maps the arena."""
        type_, slots, life = await self._run(self._declaring(type, slots, write, share))
        swap = MessageSwap(self, type_, life, slots, write == "through")
        self._swaps.add(swap)
        return swap

    # --- buffers and reservations

    async def alloc_contig(
        self,
        nbytes: int,
        area: str | None = None,
        offset: int | None = None,
        align: int | None = None,
        zero: bool = False,
        timeout: float | None = 0,
        name: str | None = None,
    ) -> Buffer:
        """See `gcma_shm.Client.alloc_contig`. Who is cancelled while it waits leaves the line."""
        place, span = await self._run(self._placing("alloc_contig", nbytes, area, offset, align, timeout, name))
        buffer = self._buffer(place, span)
        if zero:
            await self._clear(buffer, span)
        return buffer

    async def _clear(self, buffer: Buffer, span: Span) -> None:
        """In a thread, unless it is a matter of microseconds. A thread cannot be cancelled: what nobody wants any more is given back
        when it is through, and `close` waits for it.
        """
        if span.nbytes <= CLEARED_AT_ONCE_MAX:
            span.zero()
            return
        clearing = asyncio.get_running_loop().run_in_executor(None, span.zero)
        self._clearing.add(clearing)
        clearing.add_done_callback(self._clearing.discard)
        try:
            await asyncio.shield(clearing)
        except BaseException:
            # Sealed then: or a `close` that comes before the thread has dropped the memory would take that for an array on it.
            clearing.add_done_callback(lambda _: buffer._end())
            raise

    async def reserve(
        self,
        nbytes: int,
        area: str | None = None,
        align: int | None = None,
        name: str | None = None,
        *,
        offset: int | None = None,
        timeout: float | None = 0,
    ) -> Reservation:
        """See `gcma_shm.Client.reserve`; `claim` on it is a plain call."""
        place, _ = await self._run(self._placing("reserve", nbytes, area, offset, align, timeout, name))
        return self._reservation(place)

    async def attach(self, name: str | Handle) -> Buffer:
        """See `gcma_shm.Client.attach`."""
        return await self._run(self._attaching(name))

    async def attach_reservation(self, name: str) -> Reservation:
        """See `gcma_shm.Client.attach_reservation`."""
        return await self._run(self._attaching_reservation(name))

    # --- what is told

    async def stats(self) -> dict[str, Any]:
        """See `gcma_shm.Client.stats`."""
        return await self._run(self._statistics())

    async def areas(self) -> list[AreaInfo]:
        """The arena's areas as they are now."""
        return await self._run(self._areas())

    async def unlink(self, name: str) -> None:
        """See `gcma_shm.Client.unlink`."""
        await self._run(self._unlinking(name))

    async def names(self) -> list[NameInfo]:
        """The named buffers and reservations of the arena, in the order of their names."""
        return await self._run(self._names())

    async def quota(self, nbytes: int | str | None = None, client: int | None = None) -> QuotaInfo:
        """See `gcma_shm.Client.quota`."""
        return await self._run(self._quota(nbytes, client))

    async def drain_area(self, name: str) -> AreaInfo:
        """See `gcma_shm.Client.drain_area`."""
        return await self._run(self._changing_area("area_drain", {"area": name}))

    async def resume_area(self, name: str) -> AreaInfo:
        """See `gcma_shm.Client.resume_area`."""
        return await self._run(self._changing_area("area_resume", {"area": name}))

    async def resize_area(self, name: str, size: int | str) -> AreaInfo:
        """See `gcma_shm.Client.resize_area`."""
        return await self._run(self._changing_area("area_resize", {"area": name, "nbytes": parse_size(size)}))

    # --- the end

    async def close(self) -> None:
        """Gives back every buffer and says goodbye; a second time has no effect. What other tasks wait for ends with Closed.

        Raises BufferError while a view of a buffer is alive, TimeoutError when a store or load in another thread does not end in time; then
        the client stays open, but for that nothing new begins after a TimeoutError.
        """
        async with self._closing:
            if not self._channel.closed:
                await self._close()

    async def _close(self) -> None:
        self._channel.enter()  # not in another loop than its own
        while self._clearing:  # others begin meanwhile
            await asyncio.wait(self._clearing)
        sealed = self._seal()
        if self._watch is not None:
            self._watch.end()
        try:
            if not await self._close_plane():
                raise TimeoutError("a store or load in another thread has not ended; call close() again")
        except BaseException:  # or cancelled
            for span in sealed:
                span.unseal()
            raise
        for swap in list(self._swaps):
            swap.close()
        self._leave_arena()
        async_clients.discard(self)
        await self._channel.close()

    async def _close_plane(self) -> bool:
        """Whether nothing is under way there. Waits, in a thread, only for what other threads do."""
        plane = self._plane
        if plane is None:
            return True
        # No claim is under way, nor the sweep that ends one: after `bye` the broker takes all of it back.
        with self._claims.lock if self._claims is not None else contextlib.nullcontext():
            if plane.close(0):
                return True
        return await asyncio.to_thread(plane.close, self._channel.timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with yielding_to(error):
            await self.close()

    # --- steps

    async def _run(self, steps: Steps[T]) -> T:
        """As `drive`, awaiting. What ends the coroutine from outside, a cancellation or the loop's end, is thrown in as well."""
        try:
            step = next(steps)
            while True:
                try:
                    answer = await self._do(step)
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as done:
            return cast(T, done.value)

    async def _do(self, step: Step) -> Any:
        channel = self._channel
        if isinstance(step, Ask):
            undo = None if step.then is None else self._undo
            return await channel.request(step.operation, step.parameters, then=step.then, undo=undo)
        if isinstance(step, Sleep):
            if self._watch is None:
                self._watch = Watch(cast(Plane, self._plane))
            return await self._watch.wait(step.seen, step.seconds)
        if isinstance(step, Free):
            return await channel.free(step.number, 0, step.hold)
        return channel.leave(step.ticket)  # waits for nothing: who is cancelled does not want to

    def _undo(self, taken: Granted | int) -> None:
        """Gives back what was granted to somebody who does not want it any more."""
        if isinstance(taken, int):
            self._channel.leave(taken)
            return
        place, _ = taken
        self._channel.give_up(place["buffer"], place.get("claim", 0), place["hold"])  # a claim's attach tells which

    def _buffer(self, place: dict[str, Any], span: Span, claim: int = 0) -> Buffer:
        number, channel, hold = place["buffer"], self._channel, place["hold"]
        buffer = Buffer(span, place, self, number, lambda: channel.free(number, claim, hold), claim)
        self._note(buffer, span)
        return buffer

    def _reservation(self, place: dict[str, Any]) -> Reservation:
        return Reservation(self, place)

    def _reset(self, presence: Presence | None) -> None:
        super()._reset(presence)
        self._watch = None
        self._clearing = set()
        self._closing = asyncio.Lock()


class Connecting:
    """What `connect` returns: to be awaited, or entered by `async with`, once; a second time raises RuntimeError."""

    def __init__(self, client: Client, required: bool, prefault: bool) -> None:
        self._client = client
        self._required = required
        self._prefault = prefault
        self._begun = False

    def __await__(self) -> Generator[Any, None, Client]:
        return self._connected().__await__()

    async def _connected(self) -> Client:
        if self._begun:  # another hello and another number, and whoever has the client from before would lose its own
            raise RuntimeError("this connect() was awaited before: call connect() again for another client")
        self._begun = True
        await self._client._connect(self._required, self._prefault)
        return self._client

    async def __aenter__(self) -> Client:
        return await self._connected()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with yielding_to(error):
            await self._client.close()


def connect(
    endpoint: str | None = None,
    *,
    mapped: bool | None = None,
    prefault: bool = False,
    timeout: float = 5.0,
    wait_for_broker: float = 0.0,
    curve_key: str | os.PathLike[str] | None = None,
    server_key: str | os.PathLike[str] | None = None,
) -> Connecting:
    """Connects to a broker: `async with connect() as client`, or `client = await connect()` and `await client.close()` in the end. Parameters and
    errors as for `gcma_shm.connect`.
    """
    where = endpoint or default_endpoint()
    credentials = credentials_of(where, curve_key, server_key)
    return Connecting(Client(where, mapped, timeout, wait_for_broker, credentials), mapped is True, prefault)
