"""What a client does around os.fork.

The child's record is written before the fork, because afterwards the parent may end before the child has run at all. The
locks of the channel and of the claims are held meanwhile, so that what the child finds and what the broker lets it inherit are
the same.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, field

from gcma_shm import layout
from gcma_shm.clients import handles
from gcma_shm.clients.correspondence import PROBE_S
from gcma_shm.clients.handles import async_clients, clients
from gcma_shm.clients.member import Member
from gcma_shm.errors import QuotaExceeded
from gcma_shm.presence import Presence
from gcma_shm.process import pid_namespace, start_time
from gcma_shm.records import GENERATION_SHIFT, Records, State

log = logging.getLogger(__name__)


@dataclass
class Fork:
    """What was prepared for one client before a fork: its locks, and the record of the child (number 0: none) with the child's own
    lock on it.
    """

    client: Member
    locks: list[threading.Lock] = field(default_factory=list)
    number: int = 0
    word: int = 0
    presence: Presence | None = None


def _everyone() -> list[Member]:
    return [*clients, *async_clients]


def _prepare(fork: Fork) -> None:
    client, claims, plane = fork.client, fork.client._claims, fork.client._plane
    for lock in (client._channel.lock, *([claims.lock] if claims is not None else [])):
        if lock.acquire(timeout=client._channel.timeout + 2 * PROBE_S):  # a request under way ends before that
            fork.locks.append(lock)
    if plane is None or claims is None or client._presence is None or client.closed or plane.closed:
        return
    claims.share()
    records = Records(plane)
    fork.presence = client._presence.anew()
    try:
        fork.number = records.take(plane.number, fork.presence)
    except QuotaExceeded as error:
        log.warning("the child that is about to be forked cannot use %r: %s", client, error)
        return
    record = plane.geometry.client_at(fork.number)
    fork.presence.take(fork.number)
    claimed = plane.read(plane.geometry.client_at(plane.number) + layout.CLIENT_CLAIMS_AT)
    plane.write(record + layout.CLIENT_INHERITED_AT, claimed)
    plane.write(record + layout.CLIENT_LOCKED_AT, 1)
    records.fill(fork.number, State.FORKED, 0, 0)
    fork.word = records.word(fork.number)
    plane.add(layout.FORKS_AT, 1)


def _start(client: Member, fork: Fork | None) -> None:
    """In the child. `fork`: None for a client that another thread was just making."""
    if client._presence is not None:
        if client._plane is not None:
            client._plane.tell_presence(-1)
        client._presence.close()  # the parent's: it is to end with the parent
    if client.closed:
        return
    try:
        if client._plane is not None:
            pid = os.getpid()
            # Refused when no record was free, or this child was stopped for so long that it was taken for dead.
            if fork is None or not fork.number:
                raise QuotaExceeded("no client record was free at the fork")
            if not Records(client._plane).start(fork.number, fork.word, pid, start_time(pid) or 0, pid_namespace()):
                raise QuotaExceeded("this child began too late")
            client._plane.become(fork.number)
            client._generation = fork.word >> GENERATION_SHIFT
        client._reset(fork.presence if fork is not None else None)
    except BaseException:  # better no client than one that acts under its parent's number
        if fork is not None and fork.presence is not None:
            fork.presence.close()
        client._disown()


_forks = threading.local()  # of each thread that forks: threads may prepare forks at the same time


def _before_fork() -> None:
    # Sorted: one order of locks, whichever threads fork.
    # Each noted before it takes a lock: should a signal interrupt us here, what was taken is given back after the fork.
    _forks.prepared = []
    for client in sorted(_everyone(), key=id):
        fork = Fork(client)
        _forks.prepared.append(fork)
        try:
            _prepare(fork)
        except Exception:  # out of descriptors, say: the other clients are to be had in the child all the same
            log.exception("the child that is about to be forked cannot use %r", client)
            fork.number = 0


def _take_prepared() -> list[Fork]:
    """What this thread prepared for its fork, kept no longer: it refers to the clients, which must stay collectable."""
    prepared: list[Fork] = _forks.prepared
    _forks.prepared = []
    return prepared


def _after_fork_in_parent() -> None:
    for fork in _take_prepared():
        # The child's from now on, alone; nobody's when there is no child. Before the locks: a child that another thread forks next
        # must not keep it.
        if fork.presence is not None:
            fork.presence.close()
        for lock in fork.locks:
            lock.release()
        if fork.client._claims is not None:
            fork.client._claims.drain()


def _after_fork_in_child() -> None:
    handles.connecting = threading.Lock()  # another thread of the parent may have held it
    prepared: dict[Member, Fork] = {fork.client: fork for fork in _take_prepared()}
    for client in _everyone():
        _start(client, prepared.get(client))


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
