"""`multiprocessing.shared_memory` over an arena: CPython's own tests of it, and what it promises beyond them: who keeps a segment, and for how long."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory as stdlib
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gcma_shm
from gcma_shm import Client
from gcma_shm.clients import shared_memory, tree
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.shared_memory import ShareableList, SharedMemory, SharedMemoryManager, buffer_name, using
from gcma_shm.endpoint import arena_name
from gcma_shm.messages import Reply, Request
from tests.cpython import shared_memory as cpython
from tests.cpython.where import HOW, has
from tests.invariants import check_at_rest
from tests.processes import WAIT_S, Said, broker, eventually, forked, in_fork

PAGE = 4096
MIB = 1 << 20
METHODS = ("fork", "spawn", "forkserver")

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture
def at() -> Iterator[Client]:
    """A client of a broker that is a process of its own, by which children find it, too; segments are there."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    with broker(endpoint), gcma_shm.connect(endpoint) as client, using(client):
        yield client


def held(client: Client) -> int:
    return sum(area.held for area in client.areas())


def buf(segment: stdlib.SharedMemory) -> memoryview:
    assert segment.buf is not None, "it was closed"
    return segment.buf


def names(client: Client) -> dict[str, tuple[int, ...]]:
    return {told.name: told.kept_by for told in client.names()}


def program(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A Python of its own, with everything that it says."""
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code, *arguments],
        cwd="/",
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    """What it wrote on standard output; it ended well, and wrote nothing on standard error."""
    out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, err) == (0, "")
    return out


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


# --- who keeps it


def test_who_keeps_it(at: Client, capsys: pytest.CaptureFixture[str]) -> None:
    from gcma_shm.broker.cli import main

    tracked, untracked = (SharedMemory(name, create=True, size=PAGE, track=name == "t") for name in "tu")
    (keeper,) = names(at)["t"]
    assert names(at) == {"t": (keeper,), "u": (1,)}
    assert at.stats()["clients"][str(keeper)]["pid"] == tree.root().pid
    assert {told.name: told.holders for told in at.names()} == {"t": 1, "u": 1}
    tracked.close()
    untracked.close()
    assert {told.name: told.holders for told in at.names()} == {"t": 0, "u": 0}
    assert main(["holders", "--endpoint", at.endpoint]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [str(keeper), str(tree.root().pid), "1", "0", "4", "KiB", *["keeps", "it", "until", "it", "ends"]] in lines
    assert ["t", *["buffer", "default", "0", "B", "4", "KiB"], str(keeper), "kept"] in lines
    assert ["u", *["buffer", "default", "4", "KiB", "4", "KiB"], *["1", "kept", "until", "unlinked"]] in lines
    again = SharedMemory("t", track=False)  # to attach is to decide nothing
    assert names(at) == {"t": (keeper,), "u": (1,)}
    again.close()
    again.unlink()
    untracked.unlink()
    assert not held(at)


MAKER = """
import sys
from gcma_shm.clients import shared_memory
for track in (True, False):
    segment = shared_memory.SharedMemory(f"track={track}", create=True, size=4096, track=track)
    segment.buf[0] = 7
    if "close" in sys.argv:
        segment.close()
print("made", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
@pytest.mark.parametrize("closes", [True, False])
def test_what_a_program_leaves_behind(how: signal.Signals | None, closes: bool, at: Client) -> None:
    """However it ends: what it tracks goes with it, what it does not stays, and nothing is said."""
    maker = program(MAKER, *(["close"] if closes else []), GCMA_ENDPOINT=at.endpoint)
    assert maker.stdout is not None
    assert maker.stdout.readline() == "made\n"
    assert names(at).keys() == {"track=False", "track=True"}
    assert held(at) == 2 * PAGE
    if how is not None:
        maker.send_signal(how)
    assert maker.communicate(timeout=WAIT_S)[1] == ""
    assert maker.returncode == (-how if how is not None else 0)
    assert eventually(lambda: names(at) == {"track=False": (1,)})
    left = SharedMemory("track=False")
    assert buf(left)[0] == 7
    left.close()
    left.unlink()
    assert eventually(lambda: not held(at))
    check_at_rest(arena_name(at.endpoint))


def test_whoever_has_it_open_goes_on_after_its_programs_end(at: Client) -> None:
    maker = program(MAKER, "close", GCMA_ENDPOINT=at.endpoint)
    assert maker.stdout is not None
    assert maker.stdout.readline() == "made\n"
    ours = SharedMemory("track=True")
    SharedMemory("track=False").unlink()
    maker.kill()
    assert maker.communicate(timeout=WAIT_S)[1] == ""
    assert eventually(lambda: names(at) == {"track=True": ()})
    theirs = SharedMemory("track=True")
    assert (buf(ours)[0], buf(theirs)[0]) == (7, 7)
    ours.close()
    theirs.close()
    assert eventually(lambda: not held(at) and not names(at))


def child_makes(endpoint: str, talk: Connection) -> None:
    with gcma_shm.connect(endpoint) as client, using(client):
        segment = SharedMemory(create=True, size=PAGE)
        buf(segment)[:3] = b"abc"
        talk.send(segment.name)
        segment.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_child_makes_it_and_ends_before_its_parent_attaches(method: Any, at: Client) -> None:
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context(method).Process(target=child_makes, args=(at.endpoint, theirs))
    child.start()
    name = ours.recv()
    child.join()
    assert child.exitcode == 0
    ours.close()
    theirs.close()
    segment = SharedMemory(name)
    assert bytes(buf(segment)[:3]) == b"abc"
    (keeper,) = names(at)[name]
    assert at.stats()["clients"][str(keeper)]["pid"] == tree.root().pid
    segment.close()
    segment.unlink()
    assert not held(at)


def test_a_child_is_killed_while_it_has_it_open(at: Client) -> None:
    def child(said: Said) -> None:
        segment = SharedMemory("of a child", create=True, size=PAGE)
        buf(segment)[0] = 7
        said.say()
        said.hear()

    with forked(child) as one:
        one.receive()
        one.kill()
    segment = SharedMemory("of a child")
    assert buf(segment)[0] == 7
    segment.close()
    segment.unlink()
    assert eventually(lambda: not held(at))


def test_a_process_whose_root_is_over_is_a_root(at: Client) -> None:
    """An orphan's segments are its own: it is the end of this process that they go with."""
    code = """
import os, sys, time
from gcma_shm.clients import shared_memory, tree
before = tree.root().pid
assert before == os.getpid()
if os.fork():
    os._exit(0)
while tree.Process(before, tree._root.start).lives:
    time.sleep(0.01)
shared_memory.SharedMemory("of an orphan", create=True, size=1).close()
print(os.getpid(), flush=True)
sys.stdin.read()
"""
    orphan = program(code, GCMA_ENDPOINT=at.endpoint)
    assert orphan.stdout is not None
    pid = int(orphan.stdout.readline())
    (keeper,) = names(at)["of an orphan"]
    assert at.stats()["clients"][str(keeper)]["pid"] == pid != orphan.pid
    assert said(orphan) == ""
    assert eventually(lambda: not names(at))


# --- a broker that is killed


def test_what_is_kept_is_kept_by_the_next_broker() -> None:
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    with broker(endpoint) as first, gcma_shm.connect(endpoint, timeout=WAIT_S) as client, using(client):
        mine = SharedMemory("mine", create=True, size=PAGE)
        SharedMemory("closed", create=True, size=PAGE).close()
        SharedMemory("unlinked", create=True, size=PAGE).unlink()
        maker = program(MAKER, "close", GCMA_ENDPOINT=endpoint)
        assert maker.stdout is not None
        assert maker.stdout.readline() == "made\n"
        before = names(client)
        assert before.keys() == {"mine", "closed", "track=True", "track=False"}
        first.stop(signal.SIGKILL)
        maker.kill()  # and its root with it, which only the next broker can see
        maker.communicate(timeout=WAIT_S)
        with broker(endpoint):
            assert eventually(lambda: names(client) == {n: k for n, k in before.items() if n != "track=True"})
            closed = SharedMemory("closed")
            for segment in (mine, closed):
                segment.close()
                segment.unlink()
            client.unlink("track=False")
            assert eventually(lambda: not held(client))
            check_at_rest(arena_name(endpoint))
            client.close()  # while somebody listens


def test_a_broker_is_killed_during_unlink() -> None:
    """Whether it was done, nobody can say; what is not done can be done again, and it is never kept without its name."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    with broker(endpoint) as first, gcma_shm.connect(endpoint, timeout=WAIT_S) as client, using(client):
        segment = SharedMemory("mine", create=True, size=PAGE)
        segment.close()
        os.kill(first.pid, signal.SIGSTOP)
        outcome: list[object] = []

        def unlink() -> None:
            try:
                segment.unlink()
            except OSError as error:
                outcome.append(error)

        thread = threading.Thread(target=unlink)
        thread.start()
        thread.join(0.2)
        first.stop(signal.SIGKILL)
        with broker(endpoint):
            thread.join()
            assert isinstance(outcome[0], gcma_shm.BrokerUnavailable), outcome
            assert "it may have been done" in str(outcome[0])
            segment.unlink()
            assert not names(client)
            assert not held(client)
            client.close()  # while somebody listens


def test_an_arena_that_has_ended() -> None:
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    with broker(endpoint) as first, gcma_shm.connect(endpoint, timeout=0.5) as client, using(client):
        segment = SharedMemory(create=True, size=PAGE)
        pickled = pickle.dumps(segment)
        first.stop()
        with pytest.raises(gcma_shm.BrokerUnavailable):
            segment.unlink()
        with broker(endpoint):
            with pytest.raises(FileNotFoundError):
                segment.unlink()
            segment.close()
            client.close()
            with pytest.raises(gcma_shm.Closed):
                segment.unlink()
    with broker(endpoint), pytest.raises(FileNotFoundError):
        pickle.loads(pickled)


# --- pools, lists and managers


def doubled(segment: SharedMemory) -> int:
    array = np.frombuffer(buf(segment), np.int64)
    array *= 2
    total = int(array.sum())
    del array
    segment.close()
    return total


def appended(numbers: ShareableList[Any]) -> list[Any]:
    numbers[0] = "changed"
    found = [numbers[n] for n in range(len(numbers))]
    numbers.shm.close()
    return found


@pytest.mark.parametrize("method", METHODS)
def test_segments_and_lists_through_a_pool(method: Any, at: Client) -> None:
    """What is pickled finds its arena, whatever that process's own is."""
    items: Any = ["a list", 2.5, None, True, b"x"]
    segment, numbers = SharedMemory(create=True, size=PAGE), ShareableList(items)
    np.frombuffer(buf(segment), np.int64)[:] = 1
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(doubled, [segment, segment]) == [1024, 2048]
        assert pool.apply(appended, (numbers,)) == ["changed", 2.5, None, True, b"x"]
        pool.close()
        pool.join()
    assert np.frombuffer(buf(segment), np.int64).sum() == 2048
    assert numbers[0] == "changed"
    for one in (segment, numbers.shm):
        one.close()
        one.unlink()
    assert eventually(lambda: not held(at))


def make(manager: SharedMemoryManager) -> str:
    segment = manager.SharedMemory(PAGE)
    buf(segment)[0] = 7
    segment.close()
    return segment.name


@pytest.mark.parametrize("method", METHODS)
def test_a_manager(method: Any, at: Client) -> None:
    with SharedMemoryManager(ctx=multiprocessing.get_context(method)) as manager:
        assert isinstance(manager, multiprocessing.managers.SharedMemoryManager)
        segment, numbers = manager.SharedMemory(PAGE), manager.ShareableList(range(10))
        assert isinstance(segment, SharedMemory)
        assert isinstance(numbers, ShareableList)
        assert names(at).keys() == {segment.name, numbers.shm.name}
        gone = manager.SharedMemory(PAGE)
        gone.close()
        gone.unlink()  # which the standard library's manager would stumble over
    assert not names(at)
    segment.close()
    numbers.shm.close()
    assert eventually(lambda: not held(at))


def test_a_managers_server_that_is_killed_leaves_its_segments_to_the_tree(at: Client) -> None:
    manager = SharedMemoryManager()
    manager.start()
    segment = manager.SharedMemory(PAGE)
    server = manager._process  # type: ignore[attr-defined]
    os.kill(server.pid, signal.SIGKILL)
    server.join()
    (keeper,) = names(at)[segment.name]
    assert at.stats()["clients"][str(keeper)]["pid"] == tree.root().pid
    segment.close()
    segment.unlink()
    assert eventually(lambda: not held(at))


# --- threads and forks


def test_threads_that_create_one_name_have_one_segment(at: Client) -> None:
    made: list[object] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        with using(at):
            for n in range(25):
                barrier.wait()
                try:
                    made.append(SharedMemory(f"n{n}", create=True, size=PAGE))
                except FileExistsError as error:
                    made.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    segments = [one for one in made if isinstance(one, SharedMemory)]
    assert (len(made), len(segments), held(at)) == (100, 25, 25 * PAGE)
    for segment in segments:
        segment.close()
        segment.unlink()
    assert not held(at)


def test_a_forked_child_has_it_and_closes_its_own(at: Client) -> None:
    segment = SharedMemory(create=True, size=PAGE)

    def child(_said: Said) -> object:
        buf(segment)[0] = 7
        segment.close()
        return True

    assert in_fork(child)
    assert buf(segment)[0] == 7
    segment.close()
    segment.unlink()
    assert eventually(lambda: not held(at))


# --- with nothing but the import changed

ALONE = """
import multiprocessing, os, sys
from gcma_shm.clients import shared_memory

def make(talk):
    segment = shared_memory.SharedMemory(create=True, size=10)
    segment.buf[0] = 7
    numbers = shared_memory.ShareableList([1, 2])
    numbers.shm.close()
    talk.send((segment.name, numbers.shm.name))
    talk.close()
    segment.close()

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    if sys.argv[2] == "first":
        mine = shared_memory.SharedMemory(create=True, size=10)
    ours, theirs = context.Pipe()
    for _ in range(2):
        child = context.Process(target=make, args=(theirs,))
        child.start()
        name, list_name = ours.recv()
        child.join()
        segment = shared_memory.SharedMemory(name)
        numbers = shared_memory.ShareableList(name=list_name)
        print(segment.buf[0], list(numbers), child.exitcode, flush=True)
        if "unlink" in sys.argv:
            for one in (segment, numbers.shm):
                one.close()
                one.unlink()
    if "killed" in sys.argv:
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("first", "end"), [("first", "left"), ("last", "killed"), ("last", "unlink")])
@pytest.mark.parametrize("method", METHODS)
def test_a_program_without_a_broker(method: str, first: str, end: str, tmp_path: Path) -> None:
    """Whoever of it comes first starts the broker of them all; nothing is said, and in the end nothing is left (conftest.py looks)."""
    script = tmp_path / "program.py"
    script.write_text(ALONE)
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", str(script), method, first, end],
        env=os.environ | {"GCMA_SIZE": "16M"},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-9 if end == "killed" else 0, "7 [1, 2] 0\n" * 2, "")


LAUNCHED = """
import os, sys, time
from pathlib import Path
from gcma_shm.clients import shared_memory
socket = Path(os.environ["GCMA_ENDPOINT"].removeprefix("ipc://"))
print("started", flush=True)
sys.stdin.readline()
while socket.exists():
    time.sleep(0.01)
segment = shared_memory.SharedMemory("of its own", create=True, size=10)
again = shared_memory.SharedMemory("of its own")
for one in (segment, again):
    one.close()
segment.unlink()
print("well", flush=True)
"""
LAUNCHER = """
import subprocess, sys
from gcma_shm.clients import shared_memory
segment = shared_memory.SharedMemory(create=True, size=10)
subprocess.Popen([sys.executable, "-X", "dev", "-W", "error", "-c", sys.argv[1]]).returncode = 0
"""


def test_a_program_that_outlives_the_broker_of_who_started_it_has_its_own() -> None:
    """It was given that one's endpoint, and asks for a segment when nobody serves there any more."""
    launcher = program(LAUNCHER, LAUNCHED, GCMA_SIZE="16M")
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "started\n"
    out, err = launcher.communicate(
        "go\n", timeout=WAIT_S
    )  # until the other one has ended, too, which has the same streams
    assert (launcher.returncode, out, err) == (0, "well\n", "")


def test_an_endpoint_that_somebody_has_set_is_meant(tmp_path: Path) -> None:
    code = "from gcma_shm.clients import shared_memory\nshared_memory.SharedMemory(create=True, size=1)"
    alone = program(code, GCMA_ENDPOINT=f"ipc://{tmp_path}/nobody/broker")
    _, err = alone.communicate(timeout=WAIT_S)
    assert alone.returncode == 1
    assert "BrokerUnavailable" in err


def test_children_that_come_first_at_the_same_time_have_one_arena(tmp_path: Path) -> None:
    code = """
import multiprocessing
from gcma_shm.clients import shared_memory

def make(n, barrier):
    barrier.wait()
    segment = shared_memory.SharedMemory(f"n{n}", create=True, size=10)
    barrier.wait()
    other = shared_memory.SharedMemory(f"n{3 - n}")
    barrier.wait()
    other.close()
    segment.close()

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    children = [context.Process(target=make, args=(n, barrier)) for n in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    print([child.exitcode for child in children])
    print(sorted(shared_memory.SharedMemory(f"n{n}").name for n in range(4)))
"""
    script = tmp_path / "program.py"
    script.write_text(code)
    one = subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", str(script)],
        env=os.environ | {"GCMA_SIZE": "16M"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert said(one) == "[0, 0, 0, 0]\n['n0', 'n1', 'n2', 'n3']\n"


def test_a_program_of_another_tree_takes_nothing_away(at: Client) -> None:
    """The standard library's tracker does (gh-82300), unless that program says track=False, from Python 3.13 on."""
    segment = SharedMemory(create=True, size=PAGE)
    code = "import sys\nfrom gcma_shm.clients import shared_memory\nshared_memory.SharedMemory(sys.argv[1]).close()"
    assert said(program(code, segment.name, GCMA_ENDPOINT=at.endpoint)) == ""
    again = SharedMemory(segment.name)
    for one in (segment, again):
        one.close()
    segment.unlink()
    assert not held(at)


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
