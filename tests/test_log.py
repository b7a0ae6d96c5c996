"""The broker's log: nobody waits for whoever reads it."""

from __future__ import annotations

import fcntl
import logging
import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

import gcma_shm
from gcma_shm.broker import log as log_module
from gcma_shm.broker.log import Log
from tests.processes import WAIT_S, broker_command, eventually

CONNECTIONS = 100


def record(words: str) -> logging.LogRecord:
    return logging.LogRecord("x", logging.WARNING, __file__, 1, words, None, None)


def test_lines_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "END_S", WAIT_S)
    read_end, write_end = os.pipe()
    log = Log(write_end)
    for n in range(100):
        log.emit(record(f"line {n}"))
    log.end()
    os.close(write_end)
    with os.fdopen(read_end) as said:
        assert [line.rpartition(": ")[2].strip() for line in said] == [f"line {n}" for n in range(100)]


def test_a_reader_that_does_not_read_costs_lines_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    log = Log(write_end)

    def is_stuck() -> bool:
        """Whether a hundred lines in a row are lost, and not because it was not the thread's turn to write: pipe and queue are full."""
        before = log._lost
        for n in range(100):
            log.emit(record(f"line {n} {'x' * 200}"))
        return log._lost - before == 100 and not select.select([], [write_end], [], 0)[1]

    with os.fdopen(read_end, "rb", 0) as said:
        assert eventually(is_stuck)
        assert eventually(lambda: not log._lines.full() or not said.read(65536))
        log.emit(record("the last one"))
        found = b""
        while b"the last one" not in found:
            found += said.read(65536)
        assert b"lines before it were lost" in found
        assert eventually(is_stuck)
        monkeypatch.setattr(log_module, "END_S", 0.01)
        log.end()
        assert log._thread.is_alive(), "it is left behind, in its write"
    monkeypatch.setattr(log_module, "END_S", WAIT_S)
    log.end()
    assert not log._thread.is_alive()
    os.close(write_end)


def test_a_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "END_S", WAIT_S)
    read_end, write_end = os.pipe()
    os.close(read_end)
    log = Log(write_end)
    log.emit(record("to nobody"))
    log.end()
    assert not log._thread.is_alive()
    os.close(write_end)


def test_a_broker_whose_log_nobody_reads_serves_and_ends(endpoint: str) -> None:
    process = subprocess.Popen(
        # A record for each connection: those of clients that have left are free when the broker comes to it.
        broker_command(endpoint, "--size", "8M", "--log-level", "debug", "--clients", str(CONNECTIONS + 1)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd="/",
    )
    try:
        assert process.stderr is not None
        assert eventually(Path(endpoint.removeprefix("ipc://")).exists)
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        for _ in range(CONNECTIONS):  # two lines each, several times what the pipe holds
            gcma_shm.connect(endpoint, mapped=False, timeout=WAIT_S, wait_for_broker=WAIT_S).close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()  # one that does not end on a signal, which this is about; its arena is removed with the endpoint
        process.communicate()
