"""Plasma as a contender of `peers.py`: pyarrow 11, the last release with it, in the environment that `plasma.py` makes, so by a process beside each worker.

What it is to do goes there in one message through a pipe, for 64 pages at once. Its own processor time is not counted, its store's is a server's.
"""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _common import STOP_S
from peers_local import numbers
from peers_ways import NotHere, Place, Way, Ways
from plasma import NoPlasma, environment

STORE_BYTES = 1 << 30
CLIENT = Path(__file__).parent / "peers_plasma_server.py"


def plasma_command(path: Path, _directory: Path) -> list[str]:
    """Its store, with room for the working set several times."""
    try:
        return [str(environment().parent / "plasma_store"), "-m", str(STORE_BYTES), "-s", str(path)]
    except NoPlasma as reason:
        raise NotHere(str(reason)) from None


class Plasma:
    """Objects cannot be changed, so a store deletes and creates; two processes cannot do that to one object, so the first alone stores."""

    def __init__(self, place: Place, stack: ExitStack) -> None:
        command: list[str | Path] = [environment(), "-W", "ignore", CLIENT, place.sockets["plasma"]]
        self._client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(self._stop)
        self._send(place.page.hex())
        add = Ways()
        add.load_many("plasma get, all at once", numbers, lambda ns: self._ask("load_many", ns), self._see)
        add.loop("load", "plasma get", numbers, lambda ns: self._ask("load", ns), self._see)
        if not place.index:
            add.loop("store", "plasma delete and create", numbers, lambda ns: self._ask("store", ns), None)
        self.ways: dict[str, dict[str, Way]] = add.found

    def put(self, n: int, page: bytes) -> None:
        """See `Store.put`."""
        self._ask("put", [n], page.hex())

    def get(self, n: int) -> bytes | None:
        """See `Store.get`."""
        return self._see([n])[0]

    def _see(self, ns: list[int]) -> list[bytes]:
        return [bytes.fromhex(page) for page in self._ask("see", ns)]

    def _ask(self, operation: str, ns: list[int], *page: str) -> Any:
        return self._send(json.dumps([operation, ns, *page]))

    def _send(self, line: str) -> Any:
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        self._client.stdin.write(f"{line}\n")
        self._client.stdin.flush()
        answer = self._client.stdout.readline()
        if not answer:
            raise OSError("plasma's client process ended; its words are above")
        return json.loads(answer)

    def _stop(self) -> None:
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        self._client.stdin.close()
        try:
            self._client.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._client.kill()
            self._client.wait()
        self._client.stdout.close()
