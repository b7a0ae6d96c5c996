"""`multiprocessing.shared_memory` over an arena: CPython's own tests of it, what a segment is, and what there is no room for."""

from __future__ import annotations

import errno
import os
import pickle
import tempfile
from collections.abc import Callable
from multiprocessing import shared_memory as stdlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gcma_shm
from gcma_shm import Client
from gcma_shm.clients import shared_memory
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.shared_memory import ShareableList, SharedMemory, buffer_name, using
from gcma_shm.messages import Reply, Request
from tests.cpython import shared_memory as cpython
from tests.cpython.where import HOW, has
from tests.processes import broker, eventually

from .client import held
from .segments import METHODS, MIB, PAGE, buf, names

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


# --- CPython's own tests


@pytest.mark.skipif(not has(cpython.THEIRS), reason=HOW)
@pytest.mark.parametrize("method", METHODS)
def test_cpythons_own_tests(method: str, tmp_path: Path) -> None:
    cpython.write(tmp_path)
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    with broker(endpoint, size="16M") as running:
        os.environ["GCMA_ENDPOINT"] = endpoint
        try:
            done = cpython.run(method, tmp_path)
        finally:
            del os.environ["GCMA_ENDPOINT"]
        assert done.returncode == 0, done.stdout + done.stderr
        assert "skipped" not in done.stderr
        with gcma_shm.connect(running.endpoint) as client:
            assert eventually(lambda: not held(client)), names(client)


# --- what a segment is


def test_it_is_the_standard_librarys_class_on_a_named_buffer(at: Client) -> None:
    segment = SharedMemory("frames", create=True, size=PAGE + 1)
    assert isinstance(segment, stdlib.SharedMemory)
    assert (segment.name, segment.size, len(buf(segment))) == ("frames", 2 * PAGE, 2 * PAGE)
    assert bytes(buf(segment)) == bytes(2 * PAGE)
    assert (buf(segment).format, buf(segment).readonly, buf(segment).nbytes) == ("B", False, 2 * PAGE)
    buf(segment)[:5] = b"bytes"
    with at.attach("frames") as buffer:
        assert bytes(buffer.view[:5]) == b"bytes"
    segment.close()
    segment.close()
    segment.unlink()
    with pytest.raises(FileNotFoundError) as raised:
        segment.unlink()
    assert (raised.value.errno, raised.value.filename) == (errno.ENOENT, "/frames")
    assert not held(at)


def test_any_named_buffer_can_be_attached_to(at: Client) -> None:
    with at.alloc_contig(PAGE, name="made elsewhere") as buffer:
        buffer.view[:1] = b"x"
        segment = SharedMemory("made elsewhere")
        assert buf(segment)[0] == ord("x")
        with pytest.raises(FileExistsError):
            SharedMemory("made elsewhere", create=True, size=1)
        segment.close()
        segment.unlink()
        assert not names(at)
        assert bytes(buffer.view[:1]) == b"x"


def test_memory_that_held_something_else_is_cleared(at: Client) -> None:
    with at.alloc_contig(6 * MIB) as buffer:
        buffer.view[:] = b"\xff" * buffer.nbytes
    segment = SharedMemory(create=True, size=6 * MIB)
    assert not np.frombuffer(buf(segment), np.uint8).any()
    segment.close()
    segment.unlink()


@pytest.mark.parametrize(
    "name", ["n" * 48, "n" * 49, "ä" * 24, "ä" * 25, "a\nb", "shm#1", "n" * 255, "blank and \t tab"]
)
def test_names_that_a_buffer_cannot_have(name: str, at: Client) -> None:
    segment = SharedMemory(name, create=True, size=1)
    assert segment.name == name
    (told,) = at.names()
    assert told.name == buffer_name(name)
    assert (told.name == name) == (len(name.encode()) <= 48 and name.isprintable() and not name.startswith("shm#"))
    with pytest.raises(FileExistsError):
        SharedMemory(name, create=True, size=1)
    other = pickle.loads(pickle.dumps(segment))
    assert other.name == name
    other.close()
    segment.close()
    segment.unlink()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "n" * 256, "a\0b", "\ud800"])
def test_names_that_no_segment_can_have(name: str, at: Client) -> None:
    for arguments in ({"create": True, "size": 1}, {}):
        with pytest.raises((OSError, ValueError)) as raised:
            SharedMemory(name, **arguments)  # type: ignore[arg-type]
        if (
            "\0" not in name and len(name) < 256
        ):  # which Python 3.11 cut off; and glibc asks for less, the kernel for this
            with pytest.raises((OSError, ValueError)) as expected:
                stdlib.SharedMemory(name, **arguments)  # type: ignore[arg-type]
            found, wanted = (getattr(one.value, "errno", type(one.value)) for one in (raised, expected))
            assert found == wanted or (found, wanted) == (errno.EINVAL, errno.EEXIST), "a directory is there already"


def test_misuse_is_what_it_is_in_the_standard_library(at: Client) -> None:
    wrong: list[tuple[tuple[Any, ...], type[Exception]]] = [
        ((), ValueError), (("x", True, 0), ValueError), (("x", True, -1), ValueError), ((None, False, 5), ValueError),
        ((5, True, 1), TypeError), ((b"x", True, 1), TypeError), (("x", True, "1"), TypeError),
        (("gcma-nobody",), FileNotFoundError),
    ]  # fmt: skip
    for arguments, expected in wrong:
        for kind in (SharedMemory, stdlib.SharedMemory):
            with pytest.raises(expected):
                kind(*arguments)
    with pytest.raises(TypeError):  # after which the standard library's would be there
        SharedMemory("x", True, 1.5)  # type: ignore[arg-type]
    assert not at.names()
    assert not held(at)


def test_views_and_arrays(at: Client) -> None:
    """As long as one is alive the segment cannot be closed, which is said as the standard library says it."""
    for kind in (SharedMemory, stdlib.SharedMemory):
        segment = kind(create=True, size=PAGE)
        array = np.frombuffer(buf(segment), np.uint8)
        with pytest.raises(BufferError, match="exported pointers exist"):
            segment.close()
        array[:] = 7
        assert segment.buf is None
        del array
        segment.close()
        again = kind(segment.name)
        part = buf(again)[:5]
        with pytest.raises(BufferError, match="exported pointers exist"):
            again.close()
        assert part[0] == 7
        part.release()
        again.close()
        segment.unlink()
    assert not held(at)


def test_an_array_that_has_no_view_does_not_stand_in_the_way(at: Client) -> None:
    """As in the standard library, where the last line is a crash; here the memory is the array's until it has gone."""
    for kind in (SharedMemory, stdlib.SharedMemory):
        segment = kind(create=True, size=PAGE)
        array = np.ndarray((PAGE,), np.uint8, buffer=segment.buf)
        array[:] = 7
        segment.close()
        segment.unlink()
        with pytest.raises(FileNotFoundError):
            kind(segment.name)
    segment = SharedMemory(create=True, size=PAGE)
    array = np.ndarray((PAGE,), np.uint8, buffer=segment.buf)
    array[:] = 7
    segment.close()
    segment.unlink()
    assert held(at) == PAGE
    with at.alloc_contig(PAGE) as other:
        other.view[:] = bytes(PAGE)
        assert (array == 7).all()
    del array
    assert eventually(lambda: not held(at))


def test_a_client_is_not_closed_under_an_array_on_a_closed_segment(client: EmbeddedClient) -> None:
    with gcma_shm.connect(client.endpoint) as mine:
        with using(mine):
            segment = SharedMemory(create=True, size=PAGE)
        array = np.ndarray((PAGE,), np.uint8, buffer=segment.buf)
        segment.close()
        segment.unlink()
        with pytest.raises(BufferError, match="views or arrays of its buffers are alive"):
            mine.close()
        array[:] = 7
        assert held(mine) == PAGE
        del array
        assert eventually(lambda: not held(mine))


@pytest.mark.parametrize(
    "array_of", [lambda of: np.frombuffer(of, np.uint8), lambda of: np.ndarray((PAGE,), np.uint8, of)]
)
def test_an_array_outlives_its_segment_and_nothing_is_said(
    array_of: Callable[[memoryview], npt.NDArray[np.uint8]], at: Client
) -> None:
    """The second one would be of memory that is gone, in the standard library."""
    segment = SharedMemory(create=True, size=PAGE)
    segment.unlink()
    array = array_of(buf(segment))
    del segment
    array[:] = 7
    assert held(at) == PAGE
    del array
    assert eventually(lambda: not held(at))


def test_a_name_is_free_as_soon_as_it_is_unlinked(at: Client) -> None:
    first = SharedMemory("again", create=True, size=PAGE)
    buf(first)[0] = 1
    first.unlink()
    second = SharedMemory("again", create=True, size=PAGE)
    assert (buf(first)[0], buf(second)[0], held(at)) == (1, 0, 2 * PAGE)
    third = SharedMemory("again")
    buf(third)[0] = 3
    assert (buf(first)[0], buf(second)[0]) == (1, 3)
    for segment in (first, second, third):
        segment.close()
    assert held(at) == PAGE
    second.unlink()
    assert not held(at)


@pytest.mark.parametrize("track", [True, False])
def test_an_interrupt_before_the_answer_leaves_no_segment(
    track: bool, at: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C when the broker has done its part, and nobody knows of it."""
    channel = at._channel
    receive = channel._receive
    interrupted: list[str] = []

    def interrupt(request: Request, deadline: float) -> Reply:
        reply = receive(request, deadline)
        if request.operation == "keep" and not interrupted:
            interrupted.append(reply.status)
            raise KeyboardInterrupt
        return reply

    monkeypatch.setattr(channel, "_receive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        SharedMemory("mine", create=True, size=PAGE, track=track)
    assert interrupted == ["ok"]
    assert not names(at)
    assert not held(at)
    segment = SharedMemory("mine", create=True, size=PAGE, track=track)
    segment.close()
    segment.unlink()


# --- no room


def test_an_arena_without_room(at: Client) -> None:
    whole = sum(area.largest_free for area in at.areas())
    first = SharedMemory("first", create=True, size=whole - PAGE)
    with pytest.raises(OSError, match="No space left") as raised:
        SharedMemory(create=True, size=2 * PAGE)
    assert raised.value.errno == errno.ENOSPC
    assert isinstance(raised.value.__cause__, gcma_shm.ArenaExhausted)
    with pytest.raises(FileExistsError):  # which matters more than that there is no room either
        SharedMemory("first", create=True, size=whole)
    first.close()
    first.unlink()
    assert not held(at)


def test_quotas_of_a_process_and_of_its_tree() -> None:
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    with broker(endpoint, "--quota", "1M"), gcma_shm.connect(endpoint) as client, using(client):
        with pytest.raises(OSError, match="may hold 1 MiB") as raised:
            SharedMemory(create=True, size=2 * MIB)
        assert raised.value.errno == errno.EDQUOT
        for track in (True, False):
            SharedMemory("kept", create=True, size=MIB // 2, track=track).close()
            SharedMemory("too", create=True, size=MIB // 2, track=track).close()
            with pytest.raises(OSError, match="may hold 1 MiB"):
                SharedMemory(create=True, size=PAGE, track=track)
            assert names(client).keys() == {"kept", "too"}, "refused, and made all the same"
            client.unlink("kept")
            client.unlink("too")
        assert not held(client)


def test_using_is_of_one_block(client: EmbeddedClient, at: Client) -> None:
    with using(client):
        segment = SharedMemory(create=True, size=PAGE)
        with using(at):
            other = SharedMemory(segment.name, create=True, size=PAGE)
        numbers = ShareableList([1])
    assert names(client).keys() == {segment.name, numbers.shm.name}
    assert names(at).keys() == {other.name}
    pickled: list[Callable[[], Any]] = [lambda one=one: pickle.loads(pickle.dumps(one)) for one in (segment, other)]  # type: ignore[misc]
    found = [load() for load in pickled]
    assert [one._client for one in found] == [client, at]
    for one in (segment, other, numbers.shm, *found):
        one.close()
    for one in (segment, other, numbers.shm):
        one.unlink()
    assert shared_memory.__all__ == ["ShareableList", "SharedMemory", "SharedMemoryManager", "buffer_name", "using"]
