"""The client of a program that names none: what an import that was changed, and nothing else, works with.

One client a process. It is connected to `$GCMA_ENDPOINT`, or to this user's default endpoint when a broker serves there; else to the
embedded broker of its tree of processes (tree.py), which whoever comes first starts. That broker ends with the tree's root. Whoever of
the tree comes later finds it by an endpoint that follows from the root, other programs by `$GCMA_ENDPOINT`, which is set for them; when it
has ended by then, they have one of their own.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time

from gcma_shm.arena import SHM_DIR
from gcma_shm.clients.client import Client, connect
from gcma_shm.clients.embedded import START_S, embedded
from gcma_shm.clients.tree import Process, root
from gcma_shm.endpoint import arena_name, runtime_dir
from gcma_shm.errors import ArenaError, BrokerUnavailable

ENDPOINT = "GCMA_ENDPOINT"
SIZE = "GCMA_SIZE"  # of the arena of an embedded broker
SIZE_DEFAULT = "1G"
NAP_S = 0.005  # between two tries to have one's turn: the kernel's own waiting has no bound

_lock = threading.Lock()
_client: Client | None = None


def default_client() -> Client:
    """This process's client. It maps the arena.

    Raises BrokerUnavailable when nobody serves the `$GCMA_ENDPOINT` that somebody has set, ArenaError when there is too little shared memory for an arena of
    `$GCMA_SIZE`, by default 1 GiB.
    """
    global _client  # noqa: PLW0603 - one a process
    with _lock:
        if _client is None or _client.closed:
            _client = _make()
        return _client


def _make() -> Client:
    try:
        return connect(mapped=True)
    except BrokerUnavailable:
        # Of the tree of who started this program, say: that broker may have ended before us, and nobody wished for it by name.
        if not os.environ.get(ENDPOINT, _trees()).startswith(_trees()):
            raise
    client = _client_of_tree(root())
    os.environ[ENDPOINT] = client.endpoint
    return client


def _trees() -> str:
    """What the endpoint of any tree's broker begins with."""
    return f"ipc://{runtime_dir()}/tree-"


def _client_of_tree(owner: Process) -> Client:
    endpoint = f"{_trees()}{owner.pid}-{owner.start}/broker"
    # One after the other: whose broker finds another one's arena, half made, would clear away what it takes for its own leftovers.
    runtime_dir().mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = os.open(runtime_dir(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        _take_turn(directory)  # for as long as a broker takes to start; it ends with its holder, too
        return _connect_or_start(endpoint, owner)
    finally:
        fcntl.flock(directory, fcntl.LOCK_UN)  # a child that was forked meanwhile has the same descriptor
        os.close(directory)


def _take_turn(directory: int) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            return fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise BrokerUnavailable(
                    f"another process has been starting its broker for more than {START_S:g} s, with {runtime_dir()} locked: is it stopped?"
                ) from None
            time.sleep(NAP_S)


def _connect_or_start(endpoint: str, owner: Process) -> Client:
    try:
        return connect(endpoint, mapped=True)
    except BrokerUnavailable:
        pass
    try:
        return embedded(os.environ.get(SIZE, SIZE_DEFAULT), endpoint=endpoint, owner=owner.pid)
    except ArenaError:
        # Another of the tree may have been first: its broker has the arena's name, and may take a while to serve.
        if not (SHM_DIR / arena_name(endpoint).removeprefix("/")).exists():
            raise
    return connect(endpoint, mapped=True, wait_for_broker=START_S)


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603 - another thread of the parent may have held it
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
