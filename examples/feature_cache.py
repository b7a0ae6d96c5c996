"""A feature cache that gunicorn's workers share.

What one worker has computed, every other one finds: a `SwapMapping` is a dict in shared memory, for readers without a lock. It
lives in the broker's arena, so it outlives workers that are killed, restarted or added.

    python examples/feature_cache.py         needs gunicorn; starts it, asks some questions, kills a worker, and ends

For a server of your own, start `gcma broker` once, and then `gunicorn --workers 4 --chdir examples feature_cache:app`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO, cast

import gcma_shm
from gcma_shm.clients.mapping import SwapMapping


@functools.cache
def cache() -> SwapMapping:
    """A worker's door to the shared cache. The broker is the one that $GCMA_ENDPOINT names, or this user's."""
    return SwapMapping(gcma_shm.connect(), type=7, slots=8000)


def compute(item: str) -> bytes:
    """What takes its time."""
    return hashlib.pbkdf2_hmac("sha256", item.encode(), b"features", 100, dklen=4096)


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """GET /<item>: the checksum of its features, who answers, and whether they were cached."""
    item = environ["PATH_INFO"].strip("/")
    features = cache().get(item)
    cached = features is not None
    if features is None:
        features = cache()[item] = compute(item)
    start_response("200 OK", [("Content-Type", "application/json")])
    answer = {"features": hashlib.sha256(features).hexdigest(), "worker": os.getpid(), "cached": cached}
    return [json.dumps(answer).encode()]


def ask(port: int, item: str) -> dict[str, Any]:
    """One request, its answer checked against the plain computation."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", f"/{item}")
    answer: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    assert answer["features"] == hashlib.sha256(compute(item)).hexdigest()
    return answer


@contextlib.contextmanager
def gunicorn(workers: int) -> Iterator[int]:
    """Runs gunicorn on this file's `app`; gives its port, which the system has chosen."""
    options = [f"--workers={workers}", "--bind=127.0.0.1:0", "--no-control-socket", f"--chdir={Path(__file__).parent}"]
    command = [sys.executable, "-m", "gunicorn", *options, "feature_cache:app"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        log = cast(TextIO, server.stderr)
        try:
            yield next(int(found[1]) for line in log if (found := re.search(r"Listening at: .*:(\d+)", line)))
        finally:
            server.terminate()
            print(*(line for line in log if "[ERROR]" in line and "SIGKILL" not in line), end="")


def main() -> None:
    """Asks for 24 items three times, and kills a worker after each time."""
    with gcma_shm.embedded("16M") as client:
        os.environ["GCMA_ENDPOINT"] = client.endpoint
        with gunicorn(workers=3) as port, ThreadPoolExecutor(6) as users:
            for sweep in range(3):
                answers = list(users.map(functools.partial(ask, port), [f"item-{n}" for n in range(24)]))
                workers = {answer["worker"] for answer in answers}
                cached = sum(answer["cached"] for answer in answers)
                print(f"sweep {sweep}, answered by workers {sorted(workers)}: {cached} of {len(answers)} were cached")
                os.kill(min(workers), signal.SIGKILL)  # gunicorn starts another one; the cache does not notice


if __name__ == "__main__":
    main()
