"""Which process is the root of a tree: whoever started it, by whatever method, and whichever of its processes import us."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gcma_shm.clients import default
from gcma_shm.clients.tree import root
from gcma_shm.errors import BrokerUnavailable
from tests.processes import WAIT_S

METHODS = ("fork", "spawn", "forkserver")

CHILD = """
def child(talk):
    from gcma_shm.clients import tree
    talk.send(tree.root().pid)

def ask(method):
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    process.start()
    found = ours.recv()
    process.join()
    return found
"""

INNER = f"""
import multiprocessing, os, sys
{CHILD}
if __name__ == "__main__":
    print(ask(sys.argv[1]) == os.getpid())
"""

OUTER = f"""
import multiprocessing, os, subprocess, sys
{CHILD}
if __name__ == "__main__":
    from gcma_shm.clients import tree
    print(tree.root().pid == os.getpid(), ask(sys.argv[1]) == os.getpid(), flush=True)
    sys.exit(subprocess.run([sys.executable, *sys.argv[2:], sys.argv[1]]).returncode)
"""

# As its main module is imported, a child knows no parent yet.
EARLY = """
import multiprocessing, os
from gcma_shm.clients import tree
found = tree.root().pid

def child(talk):
    talk.send((found, tree.root().pid, os.environ["GCMA_ROOT"].partition(":")[0]))

if __name__ == "__main__":
    for method in ("spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        process = context.Process(target=child, args=(theirs,))
        process.start()
        print(set(ours.recv()) <= {os.getpid(), str(os.getpid())})
        process.join()
"""


def output(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-W", "ignore::DeprecationWarning", *command],
        env={name: value for name, value in os.environ.items() if name != "GCMA_ROOT"},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("method", METHODS)
def test_a_program_that_another_starts_is_a_root_though_only_its_children_ask(method: str, tmp_path: Path) -> None:
    outer, inner = tmp_path / "outer.py", tmp_path / "inner.py"
    outer.write_text(OUTER)
    inner.write_text(INNER)
    assert output(str(outer), method, str(inner)) == "True True\nTrue\n"


def test_a_child_that_asks_while_it_is_imported(tmp_path: Path) -> None:
    script = tmp_path / "early.py"
    script.write_text(EARLY)
    assert output(str(script)) == "True\nTrue\n"


def test_who_starts_a_broker_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be stopped: whoever else needs one says so."""
    monkeypatch.setattr(default, "runtime_dir", lambda: tmp_path)
    monkeypatch.setattr(default, "START_S", 0.1)
    starting = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(starting, fcntl.LOCK_EX)
        with pytest.raises(BrokerUnavailable, match=r"more than 0\.1 s"):
            default._client_of_tree(root())
    finally:
        os.close(starting)
    assert not list(tmp_path.iterdir())
