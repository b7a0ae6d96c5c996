"""CURVE keys: the files that hold them, and what they do to a socket.

The files are ZeroMQ's certificates, as pyzmq and CZMQ read and write them: `NAME.key` has the public key, `NAME.key_secret`
both. A secret is read only from a file that is its owner's alone.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import zmq

from gcma_shm.endpoint import is_loopback, is_tcp, tcp_address
from gcma_shm.errors import ArenaError

KEY_CHARACTERS = 40  # 32 bytes in Z85
FILE_BYTES_MAX = 1 << 16
_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
# What a client's connection over TCP may take to be established, and how soon a host that is gone, or silent, is noticed.
HANDSHAKE_MS = 5_000
HEARTBEAT_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 15_000


@dataclass(frozen=True)
class KeyPair:
    """A public key and its secret, in Z85."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"<key {self.public}>"  # the secret is for no log


@dataclass(frozen=True)
class Credentials:
    """Who a client is, and which broker it will talk to."""

    pair: KeyPair
    server: str


def is_key(text: str) -> bool:
    """Whether `text` has the form of a key."""
    return _Z85.fullmatch(text) is not None


def load_pair(path: str | os.PathLike[str]) -> KeyPair:
    """The keys in a secret certificate. Raises ArenaError when others may read it, OSError, ValueError when it is none."""
    file = Path(path)
    mode = file.stat().st_mode
    if mode & 0o077:
        raise ArenaError(
            f"{file} can be read by others (mode {stat.S_IMODE(mode):o}); chmod 600 it, and consider new keys"
        )
    public, secret = _load(file)
    if secret is None:
        raise ValueError(
            f"{file} holds no secret key: expected a file such as client.key_secret, made by `gcma keygen`"
        )
    return KeyPair(public, secret)


def load_public(text_or_path: str | os.PathLike[str]) -> str:
    """A public key: its 40 characters themselves, or the file that holds it. Raises OSError, ValueError."""
    text = os.fspath(text_or_path)
    if is_key(text) and not Path(text).exists():
        return text
    return _load(Path(text))[0]


def _load(file: Path) -> tuple[str, str | None]:
    if not file.is_file():
        raise FileNotFoundError(2, f"no key file, and no key of {KEY_CHARACTERS} characters", str(file))
    if file.stat().st_size > FILE_BYTES_MAX:
        raise ValueError(f"{file} is no key file: it has more than {FILE_BYTES_MAX} bytes")
    import zmq.auth  # half of what it takes to import this module, and most clients have no keys

    public, secret = zmq.auth.load_certificate(file)
    pair = [key.decode(errors="replace") for key in (public, secret) if key is not None]
    if not all(is_key(key) for key in pair):
        raise ValueError(f"{file}: a key has {KEY_CHARACTERS} characters of Z85")
    return pair[0], pair[1] if len(pair) > 1 else None


def need_curve() -> None:
    """Raises ArenaError where ZeroMQ was built without CURVE."""
    if not zmq.has("curve"):
        raise ArenaError("this ZeroMQ was built without CURVE: install pyzmq from its wheels, or libzmq with libsodium")


def prepare(socket: zmq.Socket[bytes], endpoint: str, credentials: Credentials | None) -> None:
    """Of a client's socket that is to be connected over TCP: to that broker and no other, encrypted; without credentials to whoever
    listens there, which only a loopback address does.
    """
    watch(socket)
    socket.setsockopt(zmq.IPV6, int(tcp_address(endpoint)[0].startswith("[")))
    if credentials is not None:
        need_curve()
        socket.curve_serverkey = credentials.server.encode()
        socket.curve_publickey = credentials.pair.public.encode()
        socket.curve_secretkey = credentials.pair.secret.encode()


def watch(socket: zmq.Socket[bytes]) -> None:
    """Of what this socket connects or binds next, connections whose other side is silent are ended. ZeroMQ's own thread
    answers for a peer, so one that computes for long is not silent.
    """
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


def credentials_of(
    endpoint: str, curve_key: str | os.PathLike[str] | None, server_key: str | os.PathLike[str] | None
) -> Credentials | None:
    """What a client shows on `endpoint`: arguments, or `$GCMA_CURVE_KEY` and `$GCMA_SERVER_KEY`. None: nothing, on ipc and, without
    keys, on a loopback address.

    Raises ValueError when a key is missing, or what is given is none; OSError, ArenaError.
    """
    if not is_tcp(endpoint):
        return None
    key = curve_key or os.environ.get("GCMA_CURVE_KEY") or None
    server = server_key or os.environ.get("GCMA_SERVER_KEY") or None
    if key is None and server is None and is_loopback(endpoint):
        return None
    if key is None:
        raise ValueError(f"{endpoint}: no curve_key, the file with this client's secret key (or $GCMA_CURVE_KEY)")
    if server is None:
        raise ValueError(f"{endpoint}: no server_key, the broker's public key (or $GCMA_SERVER_KEY)")
    return Credentials(load_pair(key), load_public(server))
