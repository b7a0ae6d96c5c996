"""Handles: buffers and reservations on their way to another process of the arena.

What is pickled says which arena, which allocation in which generation, and how to get there; loading it attaches. The process that
loads uses its client of that arena, or connects.
"""

from __future__ import annotations

import atexit
import threading
from typing import TYPE_CHECKING, NamedTuple

from gcma_shm.clients.living import Living
from gcma_shm.errors import StaleHandle

if TYPE_CHECKING:
    from gcma_shm.clients.aio_client import Client as AsyncClient
    from gcma_shm.clients.allocator import Allocator
    from gcma_shm.clients.buffer import Buffer
    from gcma_shm.clients.client import Client
    from gcma_shm.clients.correspondence import Patience
    from gcma_shm.clients.reservation import Reservation

clients: Living[Client] = Living()  # of this process
async_clients: Living[AsyncClient] = Living()  # by which no handle is loaded or made here: that would need an await
connecting = threading.Lock()
patience: Patience = {}  # of the clients that `client_of` connects; in a pool's worker that of the pool's client
_connected: Client | None = None  # by `client_of`, last


def _rest() -> None:
    """At the interpreter's exit: a socket that is open when it is collected would be warned of. Whoever comes later opens it again. A
    daemon thread that is in the middle of a request goes on, and keeps nobody from leaving.
    """
    for client in clients:
        client._channel.rest()
    for other in async_clients:
        other._channel.rest()


atexit.register(_rest)


class Reference(NamedTuple):
    """What a handle says. `claim`: a generation of a reservation's claim; 0: the allocation itself. `token`: of a hand-over."""

    endpoint: str
    arena_id: bytes
    number: int
    claim: int = 0
    token: int = 0


class Handle:
    """Made by `hand_over` of a Buffer or Reservation: holds it until somebody has attached with it, or its time is over.

    Pickle it and load it in another process of the arena: that is a Buffer, or a Reservation, again. A buffer's can also be
    attached to in the same process.
    """

    def __init__(self, reference: Reference, reservation: bool = False) -> None:
        self.reference = reference
        self._reservation = reservation

    def attach(self, client: Allocator | None = None) -> Buffer:
        """A Buffer over the same memory, for `client`, by default this process's client of the arena.

        Raises StaleHandle when it comes too late, TypeError for a reservation's, QuotaExceeded, BrokerUnavailable.
        """
        return load_buffer(self.refers_to_buffer(), client)

    def refers_to_buffer(self) -> Reference:
        """The reference. Raises TypeError for a reservation's."""
        if self._reservation:
            raise TypeError("this is the handle of a reservation: pickle it, and load it in another process")
        return self.reference

    def __reduce__(self) -> tuple[object, ...]:
        return load_reservation if self._reservation else load_buffer, (self.reference,)

    def __repr__(self) -> str:
        what = "reservation" if self._reservation else "buffer"
        return f"<handle of {what} {self.reference.number} on {self.reference.endpoint}>"


def load_buffer(reference: Reference, client: Allocator | None = None) -> Buffer:
    """Attaches to what a pickled buffer, or a handle, stands for. Raises StaleHandle, QuotaExceeded, BrokerUnavailable."""
    return (client or client_of(reference.endpoint, reference.arena_id)).attach_handle(reference)


def load_reservation(reference: Reference) -> Reservation:
    """The same for a pickled reservation."""
    return client_of(reference.endpoint, reference.arena_id).attach_reservation_handle(reference)


def client_of(endpoint: str, arena_id: bytes) -> Client:
    """This process's client of that arena, connected to `endpoint` if there is none; that one stays, for the next handle, until the process
    ends or needs one of another arena. Raises StaleHandle, BrokerUnavailable.
    """
    global _connected  # noqa: PLW0603 - one a process
    known = _known(arena_id)
    if known is not None:
        return known
    from gcma_shm.clients.client import connect

    with connecting:  # two threads that load handles share one client
        known = _known(arena_id)
        if known is not None:
            return known
        client = connect(endpoint, mapped=True, **patience)
        if client.arena_id != arena_id:
            client.close()
            raise StaleHandle(f"the arena of this handle has ended; the broker on {endpoint} serves another one since")
        _connected = client  # to connect takes longer than most of what a worker of a pool is given
        return client


def _known(arena_id: bytes) -> Client | None:
    for client in clients:
        if client.mapped and not client.closed and client.arena_id == arena_id:
            return client
    return None
