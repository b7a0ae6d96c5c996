"""Buffers as other libraries see their memory: the buffer protocol, NumPy, DLPack, PyArrow, PyTorch."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gcma_shm
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.errors import StaleHandle
from tests.client import held

PAGE = 4096


Way = Callable[[Any, gcma_shm.Buffer], Any]  # of a module and a buffer

WAYS: dict[str, dict[str, Way]] = {
    "builtins": {
        "memoryview": lambda _, buffer: memoryview(buffer),
        "view": lambda _, buffer: buffer.view,
        "part of a memoryview": lambda _, buffer: memoryview(buffer)[8:16].cast("I"),
    },
    "numpy": {
        "numpy()": lambda _, buffer: buffer.numpy((2, PAGE // 8), "float64"),
        "asarray": lambda np, buffer: np.asarray(buffer),
        "array, not copied": lambda np, buffer: np.array(buffer, copy=False),
        "frombuffer": lambda np, buffer: np.frombuffer(buffer, "int32"),
        "part of frombuffer": lambda np, buffer: np.frombuffer(buffer, "uint8")[8:12],
        "ndarray on the view": lambda np, buffer: np.ndarray((4, 4), "uint8", buffer=buffer.view),
        "__array__": lambda _, buffer: buffer.__array__(),
        "from_dlpack": lambda np, buffer: np.from_dlpack(buffer),
    },
    "pyarrow": {"py_buffer": lambda pyarrow, buffer: pyarrow.py_buffer(buffer)},
    "torch": {
        "from_numpy": lambda torch, buffer: torch.from_numpy(buffer.numpy((4, 8), "float32")),
        "frombuffer": lambda torch, buffer: torch.frombuffer(buffer, dtype=torch.int16),
        "part of frombuffer": lambda torch, buffer: torch.frombuffer(buffer, dtype=torch.int16)[3:5],
        "from_dlpack": lambda torch, buffer: torch.from_dlpack(buffer),
        "asarray": lambda torch, buffer: torch.asarray(buffer, dtype=torch.uint8),
    },
}


def installed(module: str) -> Any:
    return pytest.importorskip(module, reason=f"{module} is not installed: pip install {module}")


@pytest.mark.parametrize("module", WAYS)
def test_whatever_lies_on_a_buffer_shares_its_memory_and_keeps_it(client: EmbeddedClient, module: str) -> None:
    library = installed(module)
    for name, way in WAYS[module].items():
        buffer = client.alloc_contig(2 * PAGE, zero=True)
        lies_on_it = way(library, buffer)
        buffer.view[:] = b"\x01" * buffer.nbytes
        assert _bytes(lies_on_it) == b"\x01" * len(_bytes(lies_on_it)), f"{name}: a copy"
        with pytest.raises(BufferError, match="1 views"):
            buffer.free()
        del buffer
        gc.collect()
        assert held(client) == 2 * PAGE, name
        assert _bytes(lies_on_it)[0] == 1
        del lies_on_it
        gc.collect()
        assert held(client) == 0, name


def _bytes(lies_on_it: Any) -> bytes:
    if hasattr(lies_on_it, "to_pybytes"):
        return bytes(lies_on_it.to_pybytes())
    if hasattr(lies_on_it, "untyped_storage"):
        lies_on_it = lies_on_it.numpy()
    return bytes(lies_on_it.tobytes())


@pytest.mark.parametrize("module", WAYS)
def test_a_freed_buffer_gives_its_memory_to_nobody(client: EmbeddedClient, module: str) -> None:
    library = installed(module)
    buffer = client.alloc_contig(2 * PAGE)
    buffer.free()
    for way in WAYS[module].values():
        with pytest.raises((StaleHandle, RuntimeError) if module == "torch" else StaleHandle):  # torch raises its own
            way(library, buffer)


def test_arrays_of_all_bytes(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE + 1)
    for number, way in enumerate(("asarray", "array, not copied", "from_dlpack", "__array__")):
        array = WAYS["numpy"][way](np, buffer)
        assert (array.dtype, array.shape, array.flags.writeable) == (np.uint8, (2 * PAGE,), True), way
        array[:2] = (7, number)
        assert bytes(buffer.view[:2]) == bytes([7, number])


def test_copies_where_they_are_asked_for(client: EmbeddedClient) -> None:
    with client.alloc_contig(PAGE, zero=True) as buffer:
        copies: list[Any] = [
            np.array(buffer),
            np.asarray(buffer, "float32"),
            np.array(buffer.__array__("int16")),
            bytes(buffer),
        ]
        buffer.view[0] = 5
        assert [copy[0] for copy in copies] == [0, 0, 0, 0]


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="this numpy's DLPack has no such arguments")
def test_dlpack_as_consumers_ask_for_it(client: EmbeddedClient) -> None:
    with client.alloc_contig(PAGE, zero=True) as buffer:
        here = np.asarray(buffer)
        options: dict[str, Any]
        for options, shared in (
            ({"copy": None}, True),
            ({"copy": False, "device": "cpu"}, True),
            ({"copy": True}, False),
        ):
            array = np.from_dlpack(buffer, **options)
            assert np.shares_memory(array, here) == shared
            assert array.flags.writeable
        assert buffer.__dlpack_device__() == here.__dlpack_device__()
        with pytest.raises(BufferError):  # DLPack's own words for another device
            buffer.__dlpack__(dl_device=(2, 0))
        with pytest.raises((RuntimeError, ValueError)):  # up to NumPy 2.4, and since
            buffer.__dlpack__(stream=1)
        del array, here
        capsule = buffer.__dlpack__(max_version=(1, 0), dl_device=(1, 0), stream=None)
        assert "versioned" in repr(capsule)
        with pytest.raises(BufferError):
            buffer.free()
        del capsule  # which nobody has taken


def test_torch_writes_the_memory_itself(client: EmbeddedClient) -> None:
    torch = installed("torch")
    buffer = client.alloc_contig(PAGE, zero=True)
    for tensor in (
        torch.from_dlpack(buffer),
        torch.frombuffer(buffer, dtype=torch.uint8),
        torch.from_numpy(np.asarray(buffer)),
    ):
        tensor.add_(1)
    assert set(bytes(buffer.view)) == {3}
    del tensor
    buffer.free()


def test_where_bytes_are_expected(client: EmbeddedClient) -> None:
    """A buffer of a page can be stored, and loaded into."""
    swap = client.swap(0, 10)
    with client.alloc_contig(PAGE) as buffer, client.alloc_contig(PAGE) as other:
        buffer.view[:] = b"gcma" * (PAGE // 4)
        swap.store(3, buffer)
        assert swap.load_into(3, other)
        assert bytes(other) == bytes(buffer) == b"gcma" * (PAGE // 4)


def test_views_of_views_are_released_in_any_order(client: EmbeddedClient) -> None:
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        buffer = client.alloc_contig(PAGE)
        whole = memoryview(buffer)
        views: list[memoryview] = [whole, whole[8:16], whole[8:].cast("I").toreadonly()]
        del whole
        for n in order:
            with pytest.raises(BufferError):
                buffer.free()
            views[n].release()
        buffer.free()
        with pytest.raises(ValueError, match="released"):
            views[0][0]


def test_exports_come_and_go_without_a_trace(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE)
    for way in (memoryview, np.asarray, np.from_dlpack):
        way(buffer)
        references = sys.getrefcount(buffer)
        for _ in range(1000):
            way(buffer)
        assert (sys.getrefcount(buffer), buffer.exports) == (references, 0)
    buffer.free()
