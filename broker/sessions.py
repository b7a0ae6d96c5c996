"""Sessions: which peer of the socket is which client, and who is alive.

Pure of sockets. A session belongs to a client record and through it to a process, watched by a pidfd. A record without
a session is that of a forked child that has not said hello (it needs not: the data plane asks nobody); it is watched
like the others.

A *keeper* stands for a process too, but not for its session: it holds what is kept until that process ends, whichever of the
process's children asked for that. It has a record of its own, made like a client's and watched and buried like one, so a broker that
takes over finds it by the same means.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gcma_shm import layout
from gcma_shm._core import Plane
from gcma_shm.broker.rights import Sender
from gcma_shm.broker.window import Window
from gcma_shm.errors import ArenaError, ProtocolError, QuotaExceeded
from gcma_shm.presence import Presence
from gcma_shm.process import open_pidfd, pid_namespace, start_time
from gcma_shm.records import Record, Records, State

log = logging.getLogger(__name__)

LOCK_S = 60.0  # what a client that we do not see may take to lock its record
# What a session over TCP may be silent for, should its connection's end not be told. It holds nothing but its record, and who is
# taken for gone too early says hello again with the next request.
REMOTE_SILENCE_S = 300.0
NOBODY = Sender()


@dataclass
class Client:
    """A client that the broker knows. `pidfd` -1: its process has not begun, or lives in a PID namespace that we do not see, or on
    another host (`sender.remote`).
    `peer` None: it has said no hello.
    """

    number: int
    pid: int  # as we see it; 0: we do not
    known_at: float = 0.0
    pidfd: int = -1
    peer: bytes | None = None
    mapped: bool = True
    window: Window = field(default_factory=Window)
    sender: Sender = NOBODY  # who said hello
    heard_at: float = 0.0  # of a remote one
    keeps: bool = False  # a keeper: nobody's session


class Sessions:
    """All clients of one arena. `inherit(parent, child)` is called for a fork before anything else happens to the
    parent, `watch(pidfd)` for each process whose end is to be told. `presence`: who holds the lock of its record; None: nobody
    is asked.
    """

    def __init__(
        self,
        plane: Plane,
        inherit: Callable[[int, int], None],
        watch: Callable[[int], None] = lambda _: None,
        presence: Presence | None = None,
    ) -> None:
        self._plane = plane
        self._geometry = plane.geometry
        self._presence = presence
        self._pidns = pid_namespace()
        self._watch_pidfd = watch
        self._records = Records(plane)
        self._inherit = inherit
        self._freeing = threading.Lock()
        self._forks_seen = 0
        self._unwatched: set[int] = set()  # numbers of local clients without a pidfd
        self.clients: dict[int, Client] = {}
        self._by_peer: dict[bytes, Client] = {}
        self._keepers: dict[tuple[int, int], Client] = {}  # by pid and start, as we see them
        self.by_pidfd: dict[int, Client] = {}

    def restore(self) -> list[int]:
        """Takes in the clients that another broker left, but for forked children that it had not taken in yet; returns the numbers
        of those that it was burying.
        """
        burying: list[int] = []
        for record in self._records.used():
            if record.state is State.DEAD:
                burying.append(record.number)
            elif record.state is State.TAKEN:
                if record.parent == layout.BROKER:  # for a hello that was never answered
                    self._records.free(record.number)
            elif record.parent == layout.BROKER or record.has_inherited:
                client = Client(record.number, 0, known_at=time.monotonic(), keeps=record.keeps)
                self.clients[record.number] = client
                self._unwatched.add(record.number)
                if record.keeps:
                    self._keepers[record.pid, record.start] = client
                if record.state is State.ALIVE and record.pidns in (0, self._pidns):
                    self._complete(client, record)
        return burying

    def has_session(self, peer: bytes) -> bool:
        """Whether anybody has said hello there."""
        return peer in self._by_peer

    def __len__(self) -> int:
        """How many clients have said hello, and may send pages."""
        return len(self._by_peer)

    def find(self, peer: bytes, sender: Sender = NOBODY) -> Client | None:
        """Whose messages these are; None: a peer that has not said hello. A peer chooses its address itself, so one that came
        after the session's is told from it by who it is.
        """
        client = self._by_peer.get(peer)
        if client is None or client.sender != sender:
            return None
        if sender.remote:
            client.heard_at = time.monotonic()
        return client

    def hello(
        self,
        peer: bytes,
        pid: int,
        start: int,
        mapped: bool,
        number: int | None,
        sender: Sender = NOBODY,
        pidns: int = 0,
        generation: int | None = None,
    ) -> Client:
        """A client introduces itself: a new one, or, by its `number`, one that forked, or lost its socket or its broker. A remote
        one has no process here, and its connection is all that it is known by.

        `pid` and `start` are as the client sees them, in its PID namespace `pidns` (0: in ours); `sender.pid` is its pid as we
        see it. `generation` came with the number: two clients of one process may have had the same, one after the other. Raises
        ProtocolError, QuotaExceeded.
        """
        known = self._by_peer.get(peer)
        if known is not None and known.sender != sender:
            raise ProtocolError("hello from an address that is another's; connect again")
        if known is not None and number in (None, known.number):
            return known  # its first hello was answered too late
        if known is not None:
            raise ProtocolError("hello in another name from a peer that has a session already; say bye first")
        pidns = pidns or self._pidns
        identity = (pid, start, pidns, generation)
        client = self._known(number, identity, sender.pid, mapped) if number is not None else None
        if client is None:
            client = self._take_remote() if sender.remote else self._enter(pid, start, pidns, sender.pid)
        self._by_peer.pop(client.peer or b"", None)
        if client.peer is not None:
            client.window.moved()
        client.peer, client.mapped, client.sender = peer, mapped, sender
        self._by_peer[peer] = client
        return client

    def generation(self, client: Client) -> int:
        """How often its number was used before."""
        return self._records.read(client.number).generation

    def _known(self, number: int, identity: tuple[int, int, int, int | None], seen: int, mapped: bool) -> Client | None:
        """The client of that number, if this is its process. None: one that maps nothing, and may be a new one as well."""
        record, client = self._records.read(number), self.clients.get(number)
        generation = record.generation if identity[3] is not None else None
        found = (record.pid, record.start, record.pidns or self._pidns, generation)
        if (
            client is None
            or client.keeps
            or record.state is not State.ALIVE
            or found != identity
            or (seen and client.pid and seen != client.pid)
        ):
            if not mapped:
                return None
            raise ProtocolError(f"client {number} is not process {identity[0]}; say hello without a number")
        return client

    def keeper(self, client: Client, pid: int, start: int) -> Client:
        """Who holds what is kept until that process ends, at the wish of `client`, in whose PID namespace it is. When we do not see
        it, or it has ended already, until the client's own process does.

        Raises QuotaExceeded: no record is free; ArenaError: nor do we see the client.
        """
        is_seen = self._records.read(client.number).pidns in (0, self._pidns)
        there = (pid, start) if is_seen else self._as_seen(client)
        if there not in self._keepers:
            if not there[0]:
                raise ArenaError(
                    f"the broker sees no process of client {client.number}, which is in another PID namespace: what it makes can be "
                    "kept until it is unlinked, but not until a process ends"
                )
            try:
                self._keepers[there] = self._enter(*there, self._pidns, there[0], keeps=True)
            except ProtocolError:  # it has ended
                own = self._as_seen(client)
                if there == own:
                    raise
                return self.keeper(client, *own)
        return self._keepers[there]

    @staticmethod
    def _as_seen(client: Client) -> tuple[int, int]:
        """The client's own process, by our PID namespace; 0: we do not see it."""
        return client.pid, start_time(client.pid) or 0

    def keepers(self) -> set[int]:
        """The numbers of all of them."""
        return {keeper.number for keeper in self._keepers.values()}

    def _enter(self, pid: int, start: int, pidns: int, seen: int, keeps: bool = False) -> Client:
        if pidns == self._pidns:
            seen, seen_start = pid, start
        else:
            seen_start = start_time(seen) or 0 if seen else 0
        pidfd = open_pidfd(seen, seen_start) if seen else -1
        if pidfd is None:
            raise ProtocolError(f"the broker sees no process {pid} that began at {start}: hello needs the sender's own")
        try:
            number = self._records.take(layout.BROKER, self._presence)
        except BaseException:
            if pidfd >= 0:
                os.close(pidfd)
            raise
        if keeps:  # before it is alive: a broker that dies in between leaves a record that is taken, for nobody
            self._plane.write(self._geometry.client_at(number) + layout.CLIENT_KEEPS_AT, 1)
        self._records.fill(number, State.ALIVE, pid, start, pidns)
        client = self.clients[number] = Client(number, seen, known_at=time.monotonic(), keeps=keeps)
        self._unwatched.add(number)
        if pidfd >= 0:
            self._watch(client, pidfd)
        return client

    def _take_remote(self) -> Client:
        # Peers on other hosts never leave the processes of this one without a record.
        remote_max = max((self._plane.geometry.clients_max - 1) // 2, 1)
        if sum(client.sender.remote for client in self.clients.values()) >= remote_max:
            raise QuotaExceeded(f"{remote_max} clients are connected over TCP; start the broker with more --clients")
        number = self._records.take(layout.BROKER, self._presence)
        self._records.fill(number, State.ALIVE, 0, 0)  # no process: to a later broker it is dead
        client = Client(number, 0, heard_at=time.monotonic())
        self.clients[number] = client
        return client

    def remote(self) -> list[Client]:
        """Those that came over TCP."""
        return [client for client in self.clients.values() if client.sender.remote]

    def gone(self, peer: bytes) -> list[Client]:
        """A connection has ended. The session of a client that maps the arena stays, for it holds buffers and may come by another; any
        other holds nothing but its record, which whoever comes and goes without a word would collect: it ends.
        """
        client = self._by_peer.get(peer)
        return [client] if client is not None and not client.mapped else []

    def silent(self) -> list[Client]:
        """Remote clients that have not been heard of for too long."""
        return [client for client in self.remote() if time.monotonic() - client.heard_at > REMOTE_SILENCE_S]

    def adopt_forked(self, look_anyway: bool = False) -> list[Client]:
        """Takes in the children that clients have forked since the last look; returns those of all clients that are found dead
        and that no pidfd tells of. Cheap when there are none.
        """
        forks = self._plane.read(layout.FORKS_AT)
        if forks != self._forks_seen or look_anyway:
            self._forks_seen = forks
            new = {
                record.number: record
                for record in self._records.used()
                if record.number not in self.clients and record.state in (State.FORKED, State.STARTING, State.ALIVE)
            }
            while new:  # a child that forked again comes before its own children
                record = new.pop(next((n for n, r in new.items() if r.parent not in new), next(iter(new))))
                self._adopt(record)
        return [
            client
            for client in map(self.clients.__getitem__, tuple(self.clients if look_anyway else self._unwatched))
            if not client.sender.remote and self._has_gone(client, self._records.read(client.number))
        ]

    def _adopt(self, record: Record) -> None:
        self.clients[record.number] = Client(record.number, 0, known_at=time.monotonic())
        self._unwatched.add(record.number)
        self._inherit(record.parent, record.number)
        # Last: a broker that dies in between leaves it to the next, which does it again.
        self._plane.write(self._geometry.client_at(record.number) + layout.CLIENT_INHERITS_AT, 1)

    def _has_gone(self, client: Client, record: Record) -> bool:
        """Whether a client is found dead. Its lock, once it has it, tells for certain, also that its process is another program
        by now; the child of a fork has it from the start.
        """
        if record.is_locked and self._presence is not None and not self._presence.is_held(client.number):
            return True
        if client.pidfd >= 0 or record.state is not State.ALIVE:
            return False
        if record.pidns in (0, self._pidns):
            return not self._complete(client, record)
        held = self._presence is not None and self._presence.is_held(client.number)  # stopped before it could say so
        return not record.is_locked and not held and time.monotonic() - client.known_at > LOCK_S

    def _complete(self, client: Client, record: Record) -> bool:
        """The child has written who it is: from now on it is watched. False: it is dead already."""
        try:
            pidfd = open_pidfd(record.pid, record.start)
        except OSError as error:
            log.error("client %d cannot be watched: %s; trying again", client.number, error)
            return True
        if pidfd is None:
            return False
        client.pid = record.pid
        self._watch(client, pidfd)
        return True

    def _watch(self, client: Client, pidfd: int) -> None:
        client.pidfd = pidfd
        self._unwatched.discard(client.number)
        self.by_pidfd[pidfd] = client
        self._watch_pidfd(pidfd)

    def forget(self, client: Client) -> None:
        """The client is dead or has said goodbye; its record stays taken until `buried`."""
        for record in self._records.used():
            if record.state is State.TAKEN and record.parent == client.number:
                self._records.free(record.number)  # it died on its way to a fork
        self._records.mark(client.number, State.DEAD)
        del self.clients[client.number]
        if client.keeps:
            self._keepers = {process: other for process, other in self._keepers.items() if other is not client}
        self._unwatched.discard(client.number)
        if client.peer is not None:
            self._by_peer.pop(client.peer, None)
        if client.pidfd >= 0:
            del self.by_pidfd[client.pidfd]
            os.close(client.pidfd)

    def buried(self, number: int) -> None:
        """Everything that the client was granted is back: its number may be used again. From any thread."""
        with self._freeing:  # what it has counted becomes nobody's
            self._records.free(number)

    def counters(self) -> dict[int, dict[str, int]]:
        """What each client has counted, also one that is about to be buried; 0: those that have left; 1: the broker itself."""
        with self._freeing:
            dead = [record.number for record in self._records.used() if record.state is State.DEAD]
            numbers = (layout.NOBODY, layout.BROKER, *sorted({*self.clients, *dead}))
            return {number: self._records.counters(number) for number in numbers}

    def close(self) -> None:
        """Lets go of all pidfds."""
        for client in list(self.clients.values()):
            self.forget(client)

    def _check(self) -> None:
        """Raises AssertionError when an invariant is broken."""
        assert all(client.peer == peer for peer, client in self._by_peer.items()), (
            "a peer that its client does not know"
        )
        assert all(client.pidfd == pidfd for pidfd, client in self.by_pidfd.items()), (
            "a pidfd that its client does not know"
        )
        local = [client for client in self.clients.values() if not client.sender.remote]
        assert self._unwatched == {client.number for client in local if client.pidfd < 0}, (
            "a client that is not looked at"
        )
        assert {id(client) for client in self._keepers.values()} == {id(c) for c in self.clients.values() if c.keeps}, (
            "a keeper that is not found by its process"
        )
        assert {client.number for client in self._by_peer.values()} <= set(self.clients), "a session without a client"
        for client in self.clients.values():
            client.window._check()
        for number in self.clients:
            assert self._records.read(number).state in (State.ALIVE, State.FORKED, State.STARTING), (
                "a client whose record is not in use"
            )
