"""A private broker for one process and its workers, gone with its owner however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import util
from pathlib import Path

import posix_ipc

from gcma_shm.areas import AreaSpec, parse_area
from gcma_shm.arena import end_dead, lock_dead
from gcma_shm.clients.client import Client
from gcma_shm.clients.living import Living
from gcma_shm.endpoint import arena_name, default_spill_dir, socket_path
from gcma_shm.errors import ArenaError
from gcma_shm.layout import plan
from gcma_shm.sizes import parse_size

# Of multiprocessing's finalizers, which its exit function runs: negative ones when it has joined the children, which may be at work in the
# arena. (So whatever is registered with `atexit` after multiprocessing was imported has the broker still.)
AFTER_CHILDREN = -10
START_S = 300.0  # a large arena takes half a second a GiB to commit
STOP_S = 30.0


class EmbeddedClient(Client):
    """The client of the process that owns an embedded broker; `close` stops the broker as well."""

    def __init__(
        self,
        endpoint: str,
        broker: subprocess.Popen[bytes],
        leftovers: Leftovers,
        prefault: bool,
        timeout: float,
        owner_pid: int,
    ) -> None:
        self.broker_pid = broker.pid
        self._owner_pid = owner_pid
        # After SIGKILL the broker sees by its pidfd that the owner has gone.
        self._stop_broker = weakref.finalize(self, _stop, broker, self._owner_pid, leftovers)
        self._stop_broker.atexit = False
        at_exit = util.Finalize(None, _stop, (broker, self._owner_pid, leftovers), exitpriority=AFTER_CHILDREN)
        weakref.finalize(self, at_exit.cancel).atexit = False
        if owner_pid == os.getpid():
            _brokers.add(broker)
        else:
            broker.returncode = 0  # not ours to wait for, or to be warned of
        try:
            super().__init__(endpoint, True, prefault, timeout, 0.0)
        except BaseException:
            self._stop_broker()
            raise

    def close(self) -> None:
        """As `Client.close`; in the process that owns it, stops the broker too, which ends every other client's types and
        buffers.
        """
        super().close()
        self._stop_broker()


def embedded(
    size: int | str = "256M",
    *,
    areas: Mapping[str, int | str | AreaSpec] | None = None,
    page_size: int | str = "4K",
    slots: int | None = None,
    clients: int | None = None,
    quota: int | str | None = None,
    spill_dir: str | os.PathLike[str] | None = None,
    spill_io: str = "buffered",
    policy: str = "s3fifo",
    prefault: bool = False,
    timeout: float = 5.0,
    endpoint: str | None = None,
    owner: int | None = None,
) -> EmbeddedClient:
    """Starts a private broker and connects to it. Workers connect to `client.endpoint`; forked ones just go on using
    the client.

    `size` of the arena, tables included; `areas`: name to size, or to text such as `"512M,cache=off,align=2M,share=75"`, by
    default one called `default`; `slots`: of all swap types together, by default four per page; `clients`: how many at
    once; `quota`: what each may hold in buffers and reservations, by default without bound; `spill_dir`: on a disk, by default in the
    user's cache directory; `spill_io` and `policy`: as `gcma broker --spill-io` and `--policy`; `endpoint`: by default one that nobody
    guesses; `owner`: the process with which the broker ends, by default this one.

    Raises ArenaError when there is too little memory or the broker cannot start, ValueError for what is no size.
    """
    specs = {name: parse_area(spec) for name, spec in (areas or {}).items()}
    size_bytes, page_bytes = parse_size(size), parse_size(page_size)
    plan(size_bytes, page_bytes, specs, slots, clients, policy, spill_io)  # refuses here what the broker would refuse
    if endpoint is None:
        endpoint = f"ipc://{tempfile.gettempdir()}/gcma-{os.getuid()}-{secrets.token_hex(8)}/broker"
    owner_pid = os.getpid() if owner is None else owner
    command = [
        sys.executable,
        "-P",
        "-m",
        "gcma_shm.broker.cli",
        "broker",
        "--log-level",
        "warning",
        "--endpoint",
        endpoint,
    ]
    command += ["--size", str(size_bytes), "--page-size", str(page_bytes), "--policy", policy, "--spill-io", spill_io]
    for name, spec in specs.items():
        command += ["--area", f"{name}={spec}"]
    spill_path = None if spill_dir is None else Path(spill_dir).absolute()  # the broker runs in another directory
    for option, value in (
        ("--slots", slots),
        ("--clients", clients),
        ("--quota", None if quota is None else parse_size(quota)),
        ("--spill-dir", spill_path),
    ):
        if value is not None:
            command += [option, str(value)]
    name = arena_name(endpoint)
    spill_files = default_spill_dir(endpoint) if spill_path is None else spill_path / name.removeprefix("/")
    leftovers = Leftovers(name, (socket_path(endpoint).parent, spill_files))
    return EmbeddedClient(endpoint, _start(command, leftovers, owner_pid), leftovers, prefault, timeout, owner_pid)


@dataclass(frozen=True)
class Leftovers:
    """What a broker that was killed could not remove. Its names are random, or those of one tree of processes, so hardly another
    broker would find it; one that has is left alone.
    """

    arena: str
    directories: tuple[Path, ...]

    def remove(self) -> None:
        """Removes what is left. The broker is dead."""
        try:
            fd = lock_dead(self.arena)
        except ArenaError:  # another one serves there, and was perhaps why ours did not
            return
        try:
            end_dead(self.arena, fd)
            for directory in self.directories:
                shutil.rmtree(directory, ignore_errors=True)
            posix_ipc.unlink_shared_memory(self.arena)
        finally:
            os.close(fd)


def _start(command: list[str], leftovers: Leftovers, owner_pid: int) -> subprocess.Popen[bytes]:
    """Runs the broker until it serves. Raises ArenaError with the broker's own words when it does not."""
    read_end, write_end = (_above_standard(fd) for fd in os.pipe())
    owner = _above_standard(os.pidfd_open(owner_pid))
    # The package by the path that this process found it by, whatever the working directory.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path)}
    try:
        broker = subprocess.Popen(  # noqa: S603 - our own module
            [*command, "--owner-pidfd", str(owner), "--ready-fd", str(write_end)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(owner, write_end),
            env=environment,
            cwd="/",
            start_new_session=True,  # Ctrl-C is the owner's to act on
        )
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(owner)
        os.close(write_end)
    try:
        words = first_line(read_end)
    except BaseException:  # Ctrl-C, too
        _end(broker, leftovers)
        raise
    finally:
        os.close(read_end)
    if words == "ready":
        return broker
    _end(broker, leftovers)
    raise ArenaError(words or f"the broker did not start (status {broker.returncode}); its words are on standard error")


def _above_standard(fd: int) -> int:
    """The same file under a number above 2, in a process that has closed its standard streams: a child is given new
    ones there.
    """
    if fd > 2:
        return fd
    higher = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return higher


def first_line(fd: int) -> str:
    """What the broker says when it serves, or why it does not; empty when it ends, or says nothing in time.

    Up to the end of the line and not of the file: a child that another thread forks just now keeps the file open.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    said = b""
    deadline = time.monotonic() + START_S
    while not said.endswith(b"\n") and poll.poll(max(deadline - time.monotonic(), 0) * 1000):
        more = os.read(fd, 4096)
        if not more:
            break
        said += more
    return said.decode().strip()


def _end(broker: subprocess.Popen[bytes], leftovers: Leftovers) -> None:
    broker.terminate()
    try:
        _wait(broker, STOP_S)
    except subprocess.TimeoutExpired:
        broker.kill()
        broker.wait()
    if broker.returncode != 0:
        leftovers.remove()


def _wait(broker: subprocess.Popen[bytes], timeout_s: float) -> None:
    """`broker.wait`, which looks for its end by the clock, but at once when it comes. Raises TimeoutExpired."""
    deadline = time.monotonic() + timeout_s
    if broker.poll() is not None:  # its number may be another process's by now
        return
    with contextlib.suppress(OSError):  # another has waited for it, or there is no descriptor: by the clock, then
        pidfd = os.pidfd_open(broker.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(timeout_s * 1000)
        finally:
            os.close(pidfd)
    broker.wait(max(deadline - time.monotonic(), 0.0))


def _stop(broker: subprocess.Popen[bytes], owner_pid: int, leftovers: Leftovers) -> None:
    if os.getpid() == owner_pid:
        _end(broker, leftovers)


_brokers: Living[subprocess.Popen[bytes]] = Living()  # of this process


def _after_fork_in_child() -> None:
    for broker in _brokers:
        broker.returncode = 0


os.register_at_fork(after_in_child=_after_fork_in_child)
