"""Programs in which nothing but the import was changed: whoever of one comes first starts the broker of them all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import WAIT_S

from .segments import METHODS, program, said

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


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
