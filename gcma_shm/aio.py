"""The same client for asyncio, over pyzmq's own asyncio sockets: what asks the broker is awaited, store and load are plain calls.

    async with gcma_shm.aio.connect() as client:
        swap = await client.swap(0, slots=1000)
        swap.store(7, page)
        async with await client.alloc_contig(32 << 20, timeout=None) as frame:
            frame.view[:5] = b"hello"

A door like the package's `__init__`, and like it the only thing here that knows the clients' folder.
"""

from gcma_shm.clients.aio_client import Client, Connecting, connect
from gcma_shm.clients.aio_memory import Buffer, Reservation
from gcma_shm.clients.aio_swap import MessageSwap, Swap

__all__ = ["Buffer", "Client", "Connecting", "MessageSwap", "Reservation", "Swap", "connect"]
