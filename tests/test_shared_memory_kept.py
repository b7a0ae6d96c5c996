"""Who keeps a segment, and for how long: when its makers have ended, its program, the broker, the arena."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import tempfile
import threading
from multiprocessing.connection import Connection
from typing import Any

import pytest

import gcma_shm
from gcma_shm import Client
from gcma_shm.clients import tree
from gcma_shm.clients.shared_memory import SharedMemory, using
from gcma_shm.endpoint import arena_name
from gcma_shm.messages import Reply, Request
from tests.invariants import check_at_rest
from tests.processes import WAIT_S, Said, broker, eventually, forked, stop

from .client import held
from .segments import METHODS, PAGE, buf, names, program, said

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


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
assert tree.root().pid == os.getpid()
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


def test_a_program_of_another_tree_takes_nothing_away(at: Client) -> None:
    """The standard library's tracker does (gh-82300), unless that program says track=False, from Python 3.13 on."""
    segment = SharedMemory(create=True, size=PAGE)
    code = "import sys\nfrom gcma_shm.clients import shared_memory\nshared_memory.SharedMemory(sys.argv[1]).close()"
    assert said(program(code, segment.name, GCMA_ENDPOINT=at.endpoint)) == ""
    again = SharedMemory(segment.name)
    for one in (segment, again):
        one.close()
    segment.unlink()
    assert eventually(lambda: not held(at)), "that the program has ended the broker sees when it looks"


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


def test_a_broker_is_killed_during_unlink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it was done, nobody can say; what is not done can be done again, and it is never kept without its name."""
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    with broker(endpoint) as first, gcma_shm.connect(endpoint, timeout=WAIT_S) as client, using(client):
        segment = SharedMemory("mine", create=True, size=PAGE)
        segment.close()
        stop(first.pid)
        outcome: list[object] = []
        asked = threading.Event()
        receive = client._channel._receive

        def tell_and_receive(request: Request, deadline: float) -> Reply:
            asked.set()
            return receive(request, deadline)

        def unlink() -> None:
            try:
                segment.unlink()
            except OSError as error:
                outcome.append(error)

        thread = threading.Thread(target=unlink)
        monkeypatch.setattr(client._channel, "_receive", tell_and_receive)
        thread.start()
        assert asked.wait(WAIT_S)
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
    with broker(endpoint) as first, gcma_shm.connect(endpoint) as client, using(client):
        segment = SharedMemory(create=True, size=PAGE)
        pickled = pickle.dumps(segment)
        first.stop()
        client._channel.timeout = 0.5  # while nobody answers
        with pytest.raises(gcma_shm.BrokerUnavailable):
            segment.unlink()
        client._channel.timeout = WAIT_S
        with broker(endpoint):
            with pytest.raises(FileNotFoundError):
                segment.unlink()
            segment.close()
            client.close()
            with pytest.raises(gcma_shm.Closed):
                segment.unlink()
    with broker(endpoint), pytest.raises(FileNotFoundError):
        pickle.loads(pickled)
