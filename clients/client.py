"""A client: one process's session with a broker, its swap types and buffers."""

from __future__ import annotations

import contextlib
import os
import weakref
from types import TracebackType
from typing import Any, Literal, Self, cast

from gcma_shm import layout
from gcma_shm.clients.allocator import Allocator
from gcma_shm.clients.buffer import yielding_to
from gcma_shm.clients.channel import Channel
from gcma_shm.clients.handles import clients
from gcma_shm.clients.swap import MappedSwap, MessageSwap, Swap
from gcma_shm.curve import Credentials, credentials_of
from gcma_shm.endpoint import default_endpoint


class Client(Allocator):
    """Made by `connect` or `embedded`. Safe across threads; a forked child is a client of its own and holds what its
    parent held.

    As a context manager it is closed at the end of the block; where an error ends that while a view or array is alive, when it is collected.
    """

    def __init__(
        self,
        endpoint: str,
        mapped: bool | None,
        prefault: bool,
        timeout: float,
        wait_for_broker: float,
        credentials: Credentials | None = None,
    ) -> None:
        super().__init__(endpoint, mapped, timeout, wait_for_broker)
        self._swaps: weakref.WeakSet[MappedSwap | MessageSwap] = weakref.WeakSet()
        owner = weakref.ref(self)
        self._channel = Channel(
            endpoint, timeout, wait_for_broker, lambda: cast(Client, owner())._introduce(), credentials
        )
        try:
            arena = self._run(self._connecting(required=mapped is True))
            if arena is not None and prefault:
                self._prefault(arena)
        except BaseException:
            if self._channel.greeting:
                self._channel.close()
            else:
                self._channel.drop()
            raise
        clients.add(self)

    def stats(self) -> dict[str, Any]:
        """Counters and gauges of the arena, its clients and its broker; docs/protocol.md lists the keys."""
        return self._run(self._statistics())

    def swap(
        self, type: int, slots: int, write: Literal["through", "behind"] = "through", share: int = layout.SHARE_WHOLE
    ) -> Swap:
        """Declares swap type `type` (0 to 255) with `slots` slots, or opens it as it was declared. `share`: how many percent of the
        cache its pages may have at once.

        Raises ValueError when it is declared otherwise or the arena has too few slots left, TypeError, Closed,
        BrokerUnavailable.
        """
        type_, slots, life = self._run(self._declaring(type, slots, write, share))
        swap: MappedSwap | MessageSwap
        if self._plane is not None:
            swap = MappedSwap(self._plane, type_, life, self._channel.timeout, self)
        else:
            swap = MessageSwap(self, type_, life, slots, write == "through")
        self._swaps.add(swap)
        return cast(Swap, swap)

    def close(self) -> None:
        """Gives back every buffer and says goodbye; a second time has no effect.

        Raises BufferError while a view of a buffer is alive, TimeoutError when another thread's store or load does not
        end in time; then the client stays open, but for that nothing new begins after a TimeoutError.
        """
        if self._channel.closed:
            return
        sealed = self._seal()
        # No claim is under way, nor the sweep that ends one, when the plane closes: after `bye` the broker takes all of it back.
        with self._claims.lock if self._claims is not None else contextlib.nullcontext():
            done = self._plane is None or self._plane.close(self._channel.timeout)
        if not done:
            for span in sealed:
                span.unseal()
            raise TimeoutError("a store or load in another thread has not ended; call close() again")
        for swap in list(self._swaps):
            swap.close()
        self._channel.part()
        self._leave_arena()
        self._channel.close()
        clients.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with yielding_to(error):
            self.close()


def connect(
    endpoint: str | None = None,
    *,
    mapped: bool | None = None,
    prefault: bool = False,
    timeout: float = 5.0,
    wait_for_broker: float = 0.0,
    curve_key: str | os.PathLike[str] | None = None,
    server_key: str | os.PathLike[str] | None = None,
) -> Client:
    """Connects to the broker on `endpoint`, by default `$GCMA_ENDPOINT` or this user's default one.

    `mapped`: None maps the arena when it may, else sends pages in messages; True insists; False sends messages.
    `prefault`: fills this process's page table for the whole arena now, so that no buffer costs a fault later.
    `timeout`: seconds that one request, or one store, may wait. `wait_for_broker`: seconds to wait for a broker that
    is not there yet.

    Over `tcp://`: `curve_key` is the file with this client's secret key, by default `$GCMA_CURVE_KEY`; `server_key` the broker's
    public key, 40 characters or a file, by default `$GCMA_SERVER_KEY` (both made by `gcma keygen`). Such a client sends its pages
    in messages, encrypted, and may do what the broker's file of authorized keys says: anything else raises Forbidden.

    Raises BrokerUnavailable (also when the keys do not fit), ArenaError (also for a key file that others may read),
    QuotaExceeded (too many clients), ValueError for a malformed endpoint or key, FileNotFoundError.
    """
    where = endpoint or default_endpoint()
    credentials = credentials_of(where, curve_key, server_key)
    return Client(where, mapped, prefault, timeout, wait_for_broker, credentials)
