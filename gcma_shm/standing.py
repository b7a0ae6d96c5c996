"""Who of those that an arena knows is there: asked of the kernel, without taking a lock and without a word to anybody.

A process that takes part holds a lock on its record (presence.py); whoever holds none is looked for by process number and start,
which tells only within one PID namespace.
"""

from __future__ import annotations

from pathlib import Path

from gcma_shm import layout
from gcma_shm.entries import ClientEntry, word
from gcma_shm.layout import Geometry
from gcma_shm.presence import Presence
from gcma_shm.process import pid_namespace, start_time
from gcma_shm.records import State


class Standing:
    """Of one arena, from now on: each question is asked anew."""

    def __init__(self, memory: memoryview, geometry: Geometry, presence: Presence) -> None:
        """`presence`: an open file of the arena's object, which need not be open for writing."""
        self._memory = memory
        self._geometry = geometry
        self._presence = presence
        self._pidns = pid_namespace()

    def is_served(self) -> bool:
        """Whether the broker lives."""
        return self._presence.is_held(layout.BROKER)

    def is_stopped(self) -> bool:
        """Whether the broker lives and is stopped (SIGSTOP, a debugger), as far as we see its process."""
        pid = word(self._memory, layout.BROKER_PID_AT)
        if start_time(pid) != word(self._memory, layout.BROKER_START_AT):
            return False
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return stat[stat.rindex(b")") + 2 :][:1] in b"Tt"

    def lives(self, client: ClientEntry) -> bool | None:
        """Whether the client's process is there; None: it cannot be told from here."""
        if client.is_locked:
            return self._presence.is_held(client.number)
        if client.state in (State.TAKEN, State.DEAD):
            return False
        if client.pidns not in (0, self._pidns):
            return None
        return bool(client.pid) and start_time(client.pid) == client.start
