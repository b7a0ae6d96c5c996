"""The servers that `peers.py` compares with: started on Unix sockets in a directory of the script's own, without persistence, ended by their pid.

A server that is not installed is left out, with the package that would bring it. One that runs already on this machine is neither used nor touched.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from _common import STOP_S
from peers_plasma import plasma_command
from peers_ways import NotHere

START_S = 60.0  # until it accepts connections
MEMCACHED_MIB = 2048  # it takes what it needs, up to that
MEMCACHED_ITEM_MIB = 4  # -I: the largest page and its key, with room


@dataclass(frozen=True)
class Server:
    """One that runs."""

    name: str
    socket: str
    pid: int


def redis_command(path: Path, directory: Path) -> list[str]:
    """No persistence, no TCP; one thread, as it is by default: more of them for its I/O gain nothing with one or two clients."""
    return [
        "redis-server", "--port", "0", "--unixsocket", str(path), "--dir", str(directory), "--save", "", "--appendonly", "no",
        "--daemonize", "no", "--loglevel", "warning",
    ]  # fmt: skip


def memcached_command(path: Path, _directory: Path) -> list[str]:
    """A thread a core; items as large as the largest page."""
    threads = len(os.sched_getaffinity(0))
    user = pwd.getpwuid(os.geteuid()).pw_name
    return [
        "memcached", "-s", str(path), "-u", user, "-m", str(MEMCACHED_MIB), "-I", f"{MEMCACHED_ITEM_MIB}m", "-t", str(threads), "-M",
    ]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How a server is run, and what brings it."""

    command: Callable[[Path, Path], list[str]]
    package: str


KINDS = {
    "redis": Kind(redis_command, "Debian: redis-server"),
    "memcached": Kind(memcached_command, "Debian: memcached"),
    "plasma": Kind(plasma_command, "PyPI: pyarrow==11.0.0"),
}


@contextmanager
def serving(name: str, directory: Path) -> Iterator[Server]:
    """Runs it there until the end. Raises NotHere."""
    path = directory / f"{name}.sock"
    command = KINDS[name].command(path, directory)
    if shutil.which(command[0]) is None:
        raise NotHere(f"no {command[0]} ({KINDS[name].package})")
    with (directory / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        _wait(path, process, directory / f"{name}.log")
        yield Server(name, str(path), process.pid)
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it takes connections."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                time.sleep(0.01)
            else:
                return
    words = log.read_text(errors="replace").strip().splitlines()
    raise NotHere(f"{log.stem} does not start: {words[-1] if words else 'no words from it'}")


def resident_bytes(pid: int) -> int:
    """Of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))
