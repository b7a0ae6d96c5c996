"""When a broker is to stop: SIGTERM, SIGINT and SIGHUP, from its very first step to the end of its last."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignals:
    """While entered, a signal sets `reason` and writes to a pipe, whose end `fd` wakes the control loop; nothing is
    cut short.

    Entered before anything is made and left after everything is removed, so no signal can leave anything behind.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.fd, self._write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def wake(self) -> None:
        """Wakes the control loop, from any thread."""
        try:
            os.write(self._write_end, b"\0")
        except BlockingIOError:
            return  # a full pipe wakes as well

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        self.wake()

    def __enter__(self) -> Self:
        # What is ignored stays ignored: `nohup` means it.
        wanted = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        self._before = {number: signal.signal(number, self._note) for number in wanted}
        # Whichever thread the kernel gives the signal to, the pipe is written at once, and not when this one wakes next.
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.fd)
        os.close(self._write_end)
