"""Worker processes that do what the parent tells them, all at once; and what a process costs."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

STOP_S = 20.0  # how long a worker process may take to end
REPLY_S = 600.0  # ... or to answer


@dataclass
class Crew:
    """Worker processes that do what the parent tells them, all at once."""

    connections: list[Connection] = field(default_factory=list)
    processes: list[SpawnProcess] = field(default_factory=list)

    def ask(self, *command: Any) -> list[Any]:
        """Sends the same command to all; their answers in order. Raises RuntimeError when one fails or dies."""
        for connection in self.connections:
            connection.send(command)
        return [self.answer(connection) for connection in self.connections]

    @staticmethod
    def answer(connection: Connection) -> Any:
        """Of one of them, to what was sent before."""
        if not connection.poll(REPLY_S):
            raise RuntimeError(f"a worker process gave no answer within {REPLY_S:g} s")
        try:
            good, answer = connection.recv()
        except EOFError:
            raise RuntimeError("a worker process died") from None
        if not good:
            raise RuntimeError(f"a worker process failed: {answer}")
        return answer


@contextmanager
def crew(count: int, make: Callable[..., Callable[..., Any]], *arguments: Any) -> Iterator[Crew]:
    """`count` processes; each calls `make(index, stack, *arguments)` once, then what that returned for each command."""
    context = multiprocessing.get_context("spawn")
    team = Crew()
    try:
        for index in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, index, make, arguments), daemon=True)
            process.start()
            theirs.close()
            team.processes.append(process)
            team.connections.append(ours)
        for connection in team.connections:
            team.answer(connection)
        yield team
    finally:
        for connection in team.connections:
            connection.close()
        for process in team.processes:
            process.join(STOP_S)
            if process.is_alive():
                process.kill()
                process.join()


def _work(
    connection: Connection, index: int, make: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us by closing the pipe
    with ExitStack() as stack:
        try:
            act = make(index, stack, *arguments)
            connection.send((True, None))
            while True:
                command = connection.recv()
                connection.send((True, act(*command)))
        except (EOFError, BrokenPipeError):
            pass
        except Exception as error:
            connection.send((False, f"{type(error).__name__}: {error}"))
            raise


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")
