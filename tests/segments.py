"""What the tests of `shared_memory` share: looks at an arena and its segments, and programs of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import shared_memory as stdlib

from gcma_shm import Client
from tests.processes import WAIT_S

PAGE = 4096
MIB = 1 << 20
METHODS = ("fork", "spawn", "forkserver")


def buf(segment: stdlib.SharedMemory) -> memoryview:
    assert segment.buf is not None, "it was closed"
    return segment.buf


def names(client: Client) -> dict[str, tuple[int, ...]]:
    return {told.name: told.kept_by for told in client.names()}


def program(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A Python of its own, with everything that it says."""
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code, *arguments],
        cwd="/",
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    """What it wrote on standard output; it ended well, and wrote nothing on standard error."""
    out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, err) == (0, "")
    return out
