"""gcma-shm: contiguous shared memory for worker pools, guaranteed, and lent out as a page cache until it is needed.

>>> import gcma_shm
>>> with gcma_shm.embedded("64M") as client:
...     swap = client.swap(0, slots=1000)
...     swap.store(7, b"x" * client.page_size)
...     with client.alloc_contig(32 << 20) as frame:
...         frame.view[:5] = b"hello"
...     swap.load(7) == b"x" * client.page_size
True
"""

try:
    from gcma_shm import _core as _core
except ImportError as error:
    raise ImportError(
        f"gcma_shm's extension module cannot be loaded ({error}). In a checkout run `make`, which builds it in place; "
        "elsewhere `pip install gcma-shm`, with a C compiler and Python's headers where there is no wheel"
    ) from error

from gcma_shm.areas import AreaSpec
from gcma_shm.clients import forks as forks  # a client follows its process through os.fork
from gcma_shm.clients.buffer import Buffer
from gcma_shm.clients.client import Client, connect
from gcma_shm.clients.embedded import embedded
from gcma_shm.clients.handles import Handle
from gcma_shm.clients.info import AreaInfo, NameInfo, QuotaInfo
from gcma_shm.clients.reservation import Reservation
from gcma_shm.clients.swap import Swap
from gcma_shm.errors import (
    ArenaError,
    ArenaExhausted,
    BrokerUnavailable,
    BufferExists,
    Closed,
    Forbidden,
    GcmaError,
    NoSuchArea,
    NoSuchBuffer,
    NoSuchType,
    NurseryFull,
    ProtocolError,
    QuotaExceeded,
    SlotBusy,
    SpillCorrupt,
    SpillError,
    StaleHandle,
)


def __getattr__(name: str) -> object:
    """`gcma_shm.aio` is there without an import of its own, and asyncio only where it is used."""
    if name == "aio":
        import gcma_shm.aio

        return gcma_shm.aio
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"
__all__ = [
    "AreaInfo",
    "AreaSpec",
    "ArenaError",
    "ArenaExhausted",
    "BrokerUnavailable",
    "Buffer",
    "BufferExists",
    "Client",
    "Closed",
    "Forbidden",
    "GcmaError",
    "Handle",
    "NameInfo",
    "NoSuchArea",
    "NoSuchBuffer",
    "NoSuchType",
    "NurseryFull",
    "ProtocolError",
    "QuotaExceeded",
    "QuotaInfo",
    "Reservation",
    "SlotBusy",
    "SpillCorrupt",
    "SpillError",
    "StaleHandle",
    "Swap",
    "connect",
    "embedded",
]
