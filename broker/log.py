"""The broker's log on standard error, written by a thread of its own: whoever reads it slowly, or not at all, delays nobody.

What the reader does not take is kept up to a bound; beyond it lines are lost, and their number is told with the next one that is
not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Iterator

LINES_MAX = 1000
END_S = 1.0  # what the last lines may take; the reader may be gone
STANDARD_ERROR = 2
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Log(logging.Handler):
    """Formats on the thread that logs, and hands over. Safe across threads."""

    def __init__(self, fd: int = STANDARD_ERROR) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(FORMAT))
        self._fd = fd
        self._lines: queue.Queue[bytes | None] = queue.Queue(LINES_MAX)
        self._lost = 0
        # Left behind when it is stuck in a write: nothing of it is to be flushed, or waited for, when the process ends.
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler; under its lock."""
        lost = f" ({self._lost} lines before it were lost: nobody reads them)" if self._lost else ""
        try:
            self._lines.put_nowait(f"{self.format(record)}{lost}\n".encode(errors="backslashreplace"))
        except queue.Full:
            self._lost += 1
        else:
            self._lost = 0

    def end(self) -> None:
        """Writes what is left, for a moment."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=END_S)
            self._thread.join(END_S)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            with contextlib.suppress(OSError):  # a reader that has gone: there is nobody left to tell
                while line:
                    line = line[os.write(self._fd, line) :]


@contextlib.contextmanager
def logging_to_standard_error(level: str) -> Iterator[None]:
    """Logs everything of this process from `level` on, until left."""
    root, log = logging.getLogger(), Log()
    root.setLevel(level.upper())
    root.addHandler(log)
    try:
        yield
    finally:
        root.removeHandler(log)
        log.end()
