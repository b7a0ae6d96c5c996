"""Keys for tests over TCP: a broker's, those of clients, and the file that says which of them may come."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypedDict

from gcma_shm.broker.keys import keygen
from tests.processes import Broker

ANY_PORT = "tcp://127.0.0.1:0"


class KeyArguments(TypedDict):
    """Of `connect`."""

    curve_key: str
    server_key: str


class Keys:
    """A directory with them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server = keygen(directory, ["server"])["server"]
        self.public: dict[str, str] = {}
        self.authorized = directory / "authorized"
        self._write({})

    def make(self, name: str) -> KeyArguments:
        """New keys; the arguments of `connect` that use them."""
        self.public |= keygen(self.directory, [name])
        return self.of(name)

    def of(self, name: str) -> KeyArguments:
        """The arguments of `connect` that use these keys."""
        return {"curve_key": str(self.directory / f"{name}.key_secret"), "server_key": self.server}

    def authorize(self, **options: str) -> None:
        """The file's new content: of each name its options. Replaced as a whole, so that nobody reads half of it."""
        self._write(options)

    def _write(self, options: dict[str, str]) -> None:
        self.replace("".join(f"{name} {self.public[name]} {words}\n" for name, words in options.items()))

    def replace(self, content: str) -> None:
        """The file's new content, whatever it is."""
        new = self.authorized.with_suffix(".new")
        new.write_text(content)
        new.chmod(0o600)
        new.rename(self.authorized)

    def broker_options(self) -> list[str]:
        """Of `gcma broker`: listen on TCP, too, with these keys."""
        secret = str(self.directory / "server.key_secret")
        return ["--listen", ANY_PORT, "--curve-key", secret, "--authorized", str(self.authorized)]


def tcp_of(running: Broker) -> str:
    """Where a broker listens on TCP, by its own words."""
    found = re.search(r"^over tcp +(tcp://\S+)$", running.description, re.MULTILINE)
    assert found is not None
    return found[1]
