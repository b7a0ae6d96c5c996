"""Contiguous buffers in a worker's hands: views, arrays, giving back by hand, by scope and by garbage collection."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from typing import Any

import numpy as np
import pytest

import gcma_shm
from gcma_shm import ArenaError, ArenaExhausted, NoSuchArea, StaleHandle
from gcma_shm.clients.embedded import EmbeddedClient
from tests.client import held
from tests.processes import eventually

PAGE = 4096


def test_what_it_says_of_itself(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE + 1)
    assert (buffer.nbytes, buffer.area, buffer.freed) == (2 * PAGE, "default", False)
    assert len(buffer.view) == buffer.nbytes
    assert "8192 bytes" in repr(buffer)
    buffer.free()
    assert buffer.freed
    assert "freed" in repr(buffer)


def test_view_and_array_are_the_same_memory(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(8 * PAGE)
    view = buffer.view
    assert not view.readonly
    assert (view.format, view.itemsize, view.contiguous) == ("B", 1, True)
    array = buffer.numpy((4, 2 * PAGE // 8), np.float64)
    array[:] = 1.5
    assert view[:8] == np.float64(1.5).tobytes()
    view[:8] = np.float64(2.5).tobytes()
    assert array[0, 0] == 2.5
    assert array.flags.writeable
    assert buffer.numpy(5).dtype == np.uint8
    assert buffer.numpy(8 * PAGE).nbytes == buffer.nbytes
    assert buffer.exports == 2
    del view, array


def test_page_aligned_as_the_hardware_wants_it(client: EmbeddedClient) -> None:
    for nbytes in (1, 100 * PAGE):
        array = client.alloc_contig(nbytes).numpy(1)
        assert array.ctypes.data % PAGE == 0


@pytest.mark.parametrize(("shape", "dtype"), [(PAGE + 1, "uint8"), ((2, PAGE), "uint8"), (PAGE // 8 + 1, "float64")])
def test_an_array_larger_than_the_buffer(client: EmbeddedClient, shape: Any, dtype: str) -> None:
    buffer = client.alloc_contig(PAGE)
    with pytest.raises(ValueError):
        buffer.numpy(shape, dtype)
    assert buffer.exports == 0
    buffer.free()


def test_free_is_refused_while_a_view_or_array_lives(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE)
    view = buffer.view
    array = buffer.numpy(10)
    part = array[2:5]
    with pytest.raises(BufferError, match="2 views"):
        buffer.free()
    view.release()
    del array
    with pytest.raises(BufferError):
        buffer.free()  # `part` keeps it
    assert part.tolist() is not None
    assert held(client) == PAGE
    del part
    buffer.free()
    assert held(client) == 0
    buffer.free()  # a second time has no effect
    for use in (lambda: buffer.view, lambda: buffer.numpy(1)):
        with pytest.raises(StaleHandle):
            use()


def test_a_scope_frees(client: EmbeddedClient) -> None:
    with client.alloc_contig(PAGE) as buffer:
        assert held(client) == PAGE
    assert buffer.freed
    assert held(client) == 0
    with pytest.raises(RuntimeError, match="from inside"), client.alloc_contig(PAGE):
        raise RuntimeError("from inside")
    assert held(client) == 0


def test_garbage_collection_gives_the_memory_back(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE)
    gone = weakref.ref(buffer)
    del buffer
    gc.collect()
    assert gone() is None
    assert held(client) == 0
    for _ in range(50):  # the whole of it each time: each is given back before the next
        client.alloc_contig(client.areas()[0].largest_free)
    assert held(client) == 0


def test_garbage_in_a_cycle_is_given_back(client: EmbeddedClient) -> None:
    cycle: list[object] = [client.alloc_contig(PAGE)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert held(client) == 0


def test_views_and_arrays_keep_the_memory_of_a_forgotten_buffer(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE)
    array, view = buffer.numpy(PAGE), buffer.view
    del buffer
    gc.collect()
    array[:] = 7
    whole = client.areas()[0].largest_free
    with client.alloc_contig(whole, zero=True):
        assert array.tolist() == [7] * PAGE
        assert bytes(view) == b"\7" * PAGE
    del array
    assert held(client) == PAGE
    del view
    gc.collect()
    assert held(client) == 0


def test_close_is_refused_while_a_view_lives(client: EmbeddedClient) -> None:
    with gcma_shm.connect(client.endpoint) as other:
        buffer = other.alloc_contig(PAGE)
        view = buffer.view
        with pytest.raises(BufferError):
            other.close()
        assert not other.closed
        assert other.areas(), "it is as open as before"
        view.release()
    assert buffer.freed
    with pytest.raises(StaleHandle):
        _ = buffer.view
    buffer.free()
    assert held(client) == 0


def test_close_is_refused_while_an_array_of_a_forgotten_buffer_lives(client: EmbeddedClient) -> None:
    """Nobody refers to the Buffer any more, but the array's memory would be lent to the cache under it."""
    other = gcma_shm.connect(client.endpoint)
    array = other.alloc_contig(PAGE).numpy(PAGE)
    gc.collect()
    try:
        with pytest.raises(BufferError):
            other.close()
    finally:
        del array
        gc.collect()
        other.close()


def test_close_gives_everything_back(client: EmbeddedClient) -> None:
    with gcma_shm.connect(client.endpoint) as other:
        buffers = [other.alloc_contig(n * PAGE) for n in range(1, 10)]
        assert held(client) == 45 * PAGE
    assert held(client) == 0
    assert all(buffer.freed for buffer in buffers)
    del buffers
    gc.collect()
    assert held(client) == 0


def test_zeroed_on_demand(client: EmbeddedClient) -> None:
    size = client.areas()[0].size
    with client.alloc_contig(size) as buffer, buffer.view as view:
        view[:] = b"\xaa" * size
    with client.alloc_contig(size, zero=True) as buffer, buffer.view as view:
        assert not any(view.tobytes())


def test_every_size_up_to_the_whole_area_under_a_full_cache(client: EmbeddedClient) -> None:
    swap = client.swap(0, 8000)
    pages = {n: n.to_bytes(8, "little") * (PAGE // 8) for n in range(1, 8000)}
    for n, page in pages.items():
        swap.store(n, page)
    size = client.areas()[0].size
    for wanted in itertools.takewhile(lambda n: n <= size, (PAGE << n for n in range(20))):
        with client.alloc_contig(wanted) as buffer:
            assert buffer.nbytes == wanted
    with client.alloc_contig(size) as whole, whole.view as view:
        view[:] = b"\xbb" * size
        for n in range(1, 8000, 40):
            assert swap.load(n) == pages[n]
        assert view == b"\xbb" * size
    assert client.areas()[0].held == 0
    for n in range(1, 8000, 40):
        assert swap.load(n) == pages[n]


def test_exactly_there_and_aligned(client: EmbeddedClient) -> None:
    with client.alloc_contig(PAGE, "default", offset=17) as buffer:
        assert buffer.offset == 17
        with pytest.raises(ArenaExhausted), client.alloc_contig(3 * PAGE, "default", offset=16):
            pass
        with client.alloc_contig(PAGE, "default", offset=16), client.alloc_contig(PAGE, offset=18):
            pass
        for align in (1, PAGE, 64 * PAGE, 1 << 20):
            with client.alloc_contig(PAGE, align=align) as aligned:
                assert aligned.offset * PAGE % align == 0


def test_areas_by_name_and_by_fit() -> None:
    with gcma_shm.embedded("8M", areas={"small": "1M", "large": "4M"}) as client:
        assert client.alloc_contig(PAGE, "large").area == "large"
        assert client.alloc_contig(2 << 20).area == "large"
        assert client.alloc_contig(1 << 19).area == "small"
        with pytest.raises(ArenaExhausted) as raised:
            client.alloc_contig(2 << 20, "small")
        assert raised.value.largest_free == 1 << 20
        assert raised.value.requested == 2 << 20
        with pytest.raises(NoSuchArea, match="small, large"):
            client.alloc_contig(PAGE, "medium")


def test_exhausted_names_the_holders(client: EmbeddedClient) -> None:
    with gcma_shm.connect(client.endpoint) as other:
        size = client.areas()[0].size
        ours = client.alloc_contig(size // 2)
        theirs = other.alloc_contig(PAGE)
        with pytest.raises(ArenaExhausted) as raised:
            client.alloc_contig(size)
        error = raised.value
        assert error.holders == {client.number: ours.nbytes, other.number: theirs.nbytes}
        assert error.largest_free == client.areas()[0].largest_free
        assert error.requested == size
    assert isinstance(error, MemoryError)


@pytest.mark.parametrize("nbytes", [0, -1, -(2**70)])
def test_no_bytes(client: EmbeddedClient, nbytes: int) -> None:
    with pytest.raises(ValueError):
        client.alloc_contig(nbytes)


@pytest.mark.parametrize("nbytes", [2**40, 2**62, 2**62 + 1, 2**64, 2**70])
def test_more_than_there_can_be(client: EmbeddedClient, nbytes: int) -> None:
    with pytest.raises((ArenaExhausted, ValueError)):
        client.alloc_contig(nbytes)
    assert client.alloc_contig(PAGE).nbytes == PAGE


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"nbytes": "4K"}, TypeError),
        ({"nbytes": 1.5}, TypeError),
        ({"nbytes": None}, TypeError),
        ({"area": 5}, TypeError),
        ({"area": b"default"}, TypeError),
        ({"area": ""}, (LookupError, ValueError)),
        ({"area": "x" * 100}, (LookupError, ValueError)),
        ({"offset": "1"}, TypeError),
        ({"offset": -1}, ValueError),
        ({"offset": 10**9}, ValueError),
        ({"offset": 2**70}, ValueError),
        ({"align": 0}, ValueError),
        ({"align": -PAGE}, ValueError),
        ({"align": 3 * PAGE}, ValueError),
        ({"align": 1.0}, TypeError),
        ({"offset": 1, "align": 2 * PAGE}, ValueError),
    ],
    ids=str,
)
def test_misuse(client: EmbeddedClient, options: dict[str, Any], error: Any) -> None:
    with pytest.raises(error):
        client.alloc_contig(**({"nbytes": PAGE} | options))
    assert held(client) == 0


def test_a_client_by_messages_has_no_memory_to_hand_out(client: EmbeddedClient) -> None:
    with gcma_shm.connect(client.endpoint, mapped=False) as other, pytest.raises(ArenaError, match="map"):
        other.alloc_contig(PAGE)


def test_many_at_once_do_not_overlap(client: EmbeddedClient) -> None:
    buffers = []
    with pytest.raises((ArenaExhausted, gcma_shm.QuotaExceeded)):
        for n in range(5000):
            buffer = client.alloc_contig(3 * PAGE)
            buffer.numpy(3 * PAGE // 4, np.uint32)[:] = n
            buffers.append(buffer)
    assert len(buffers) >= 200
    for n, buffer in enumerate(buffers):
        assert (buffer.numpy(3 * PAGE // 4, np.uint32) == n).all()
    del buffer
    buffers.clear()
    gc.collect()
    assert eventually(lambda: held(client) == 0)


def test_what_is_being_cleared_counts_as_seen(client: EmbeddedClient) -> None:
    """So another thread can neither free nor close: whoever was given the memory then would find zeros in the middle of his own."""
    buffer = client.alloc_contig(8 << 20)

    def seen() -> bool:
        thread = threading.Thread(target=buffer._span.zero)
        thread.start()
        found = False
        while thread.is_alive() and not found:
            found = buffer.exports == 1
        thread.join()
        return found

    assert eventually(seen)
    assert buffer.exports == 0
    buffer.free()
    with pytest.raises(StaleHandle):
        buffer._span.zero()


def test_an_error_that_ends_a_block_is_not_replaced(client: EmbeddedClient) -> None:
    """By the BufferError of an array in a frame that it comes through; what could not be given back is with the last of these."""

    def work() -> None:
        with (
            gcma_shm.connect(client.endpoint) as own,
            own.reserve(PAGE) as reservation,
            own.alloc_contig(PAGE) as buffer,
            reservation.claim() as claimed,
        ):
            arrays = buffer.numpy(8), claimed.numpy(8)
            arrays[0][8]

    with pytest.raises(IndexError) as raised:
        work()
    assert client.stats()["broker"]["clients"] == 2
    assert held(client) == 2 * PAGE, "the frames have them still"
    del raised
    assert eventually(lambda: gc.collect() >= 0 and client.stats()["broker"]["clients"] == 1)
    assert eventually(lambda: held(client) + client.areas()[0].reserved == 0)
    with pytest.raises(BufferError), client.alloc_contig(PAGE) as buffer:
        array = buffer.numpy(8)
    del array
    buffer.free()


@pytest.mark.parametrize(
    "shape", [6, np.int64(6), (2, 3), [np.int8(2), 3], np.array([2, 3]), range(6, 7), (), 0, (0, 3)]
)
def test_shapes_as_numpy_takes_them(client: EmbeddedClient, shape: Any) -> None:
    with client.alloc_contig(PAGE) as buffer:
        assert buffer.numpy(shape).shape == np.empty(shape).shape
        for wrong in (2.0, "6", None, (2.0, 3)):
            with pytest.raises(TypeError):
                buffer.numpy(wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="the buffer has"):
            buffer.numpy((np.int64(1 << 62), 4))  # more than 64 bits hold
