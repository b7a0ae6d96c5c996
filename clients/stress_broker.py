"""A `gcma broker` process under stress: started, killed, and started again on the same endpoint."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from gcma_shm.clients.embedded import STOP_S, Leftovers, first_line
from gcma_shm.clients.stress_plan import Plan
from gcma_shm.endpoint import arena_name, default_spill_dir
from gcma_shm.errors import ArenaError

# The broker ends with us by its pidfd of us; where we had stopped it, it has to be woken for that (PR_SET_PDEATHSIG outlives exec). Not by
# `preexec_fn`: that would do in the child what a client does after a fork, and what that opens is closed under its feet.
_WAKE = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, int(sys.argv[1])); os.execv(sys.argv[2], sys.argv[2:])"


class BrokerProcess:
    """One broker after the other, for one arena; ended with this process, however that ends. What they log is in `log`."""

    def __init__(self, plan: Plan, log: Path) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="gs-"))  # short: a socket's path has little room
        self.endpoint = f"ipc://{self._directory}/broker"
        self._log = log
        self._command = [
            *(sys.executable, "-P", "-c", _WAKE, str(signal.SIGCONT.value)),
            *(sys.executable, "-P", "-m", "gcma_shm.broker.cli", "broker"),
            *("--log-level", "warning", "--endpoint", self.endpoint, "--size", str(plan.size())),
            *("--page-size", str(plan.page_size), "--slots", str(plan.slots), "--clients", str(plan.clients)),
        ]
        for n, pages in enumerate(plan.area_pages):
            self._command += ["--area", f"a{n}={pages * plan.page_size}"]
        self._process: subprocess.Popen[bytes] | None = None
        self.spill_dir = default_spill_dir(self.endpoint)
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the one that runs; 0: none."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    def start(self) -> None:
        """Runs a broker until it serves. Raises ArenaError with its words when it does not."""
        read_end, write_end = os.pipe()
        owner = os.pidfd_open(os.getpid())
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path)}
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(  # noqa: S603 - our own module
                    [*self._command, "--owner-pidfd", str(owner), "--ready-fd", str(write_end)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    pass_fds=(owner, write_end),
                    env=environment,
                    cwd="/",
                    start_new_session=True,
                )
        finally:
            os.close(owner)
            os.close(write_end)
        try:
            words = first_line(read_end)
        finally:
            os.close(read_end)
        if words != "ready":
            raise ArenaError(f"the broker does not start: {words or self.words()}")

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """Stops it cleanly; the exit status."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        return -signal.SIGKILL if self._process.poll() is None else self._process.returncode

    def words(self) -> str:
        """The end of what it has logged."""
        return self._log.read_text(errors="replace")[-2000:].strip()

    def close(self) -> None:
        """Ends it whatever it does, and removes what a killed one leaves."""
        assert self._process is not None
        if self.stop() != 0:
            self.kill()
            Leftovers(arena_name(self.endpoint), (self.spill_dir,)).remove()
        shutil.rmtree(self._directory, ignore_errors=True)
