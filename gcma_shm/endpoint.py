"""Names that follow from an endpoint: the socket's path, the arena, the spill directory.

A broker started again on the same endpoint finds by them what an earlier one left.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import socket
import stat
import tempfile
from pathlib import Path

from gcma_shm.errors import ArenaError

IPC = "ipc://"
TCP = "tcp://"
IPC_PATH_MAX = 107  # sockaddr_un.sun_path less the final zero


def default_endpoint() -> str:
    """`$GCMA_ENDPOINT`, else `default` in this user's runtime directory."""
    return os.environ.get("GCMA_ENDPOINT") or f"{IPC}{runtime_dir() / 'default'}"


def runtime_dir() -> Path:
    """Where sockets are: `$XDG_RUNTIME_DIR/gcma`, else `gcma-<uid>` in the temporary directory."""
    xdg = os.environ.get("XDG_RUNTIME_DIR")
    return Path(xdg) / "gcma" if xdg else Path(tempfile.gettempdir()) / f"gcma-{os.getuid()}"


def socket_path(endpoint: str) -> Path:
    """The path of an `ipc://` endpoint. Raises ValueError for any other, or one that is too long for a socket."""
    if not isinstance(endpoint, str):
        raise TypeError(
            f"endpoint of type {type(endpoint).__name__}: expected text such as 'ipc:///run/user/1000/gcma/default'"
        )
    path = endpoint.removeprefix(IPC)
    if path == endpoint or not path.startswith("/"):
        raise ValueError(f"endpoint {endpoint!r}: expected 'ipc://' and an absolute path")
    if len(os.fsencode(path)) > IPC_PATH_MAX:
        raise ValueError(
            f"endpoint {endpoint!r}: a socket's path has at most {IPC_PATH_MAX} bytes, this one {len(os.fsencode(path))}"
        )
    return Path(path)


def is_tcp(endpoint: str) -> bool:
    """Whether `endpoint` is reached over TCP: by whoever has the keys, and from other hosts."""
    return isinstance(endpoint, str) and endpoint.startswith(TCP)


def tcp_address(endpoint: str) -> tuple[str, int]:
    """Host and port of a `tcp://` endpoint; port 0, also written `*`: any that is free. An IPv6 address stands in brackets.
    Raises ValueError for any other endpoint.
    """
    host, separator, port_text = endpoint.removeprefix(TCP).rpartition(":")
    port = 0 if port_text == "*" else int(port_text) if port_text.isascii() and port_text.isdigit() else -1
    if not (is_tcp(endpoint) and separator and host and not set(host) & set("/ ;")) or not 0 <= port <= 0xFFFF:
        raise ValueError(f"endpoint {endpoint!r}: expected 'tcp://', a host, ':' and a port")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"endpoint {endpoint!r}: an IPv6 address stands in brackets")
    return host, port


def is_loopback(endpoint: str) -> bool:
    """Whether a `tcp://` endpoint is an address that only this host reaches. A name is not: what it means is decided elsewhere."""
    host, _ = tcp_address(endpoint)
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_endpoint(endpoint: str) -> None:
    """Raises ValueError or TypeError for what is no endpoint to connect to, or to name an arena by."""
    if not is_tcp(endpoint):
        socket_path(endpoint)
    elif tcp_address(endpoint)[1] == 0:
        raise ValueError(f"endpoint {endpoint!r}: expected a port")


def arena_name(endpoint: str) -> str:
    """The POSIX shared-memory name of the arena behind `endpoint`: one socket has one, however its path is written; of a
    `tcp://` endpoint the text counts.
    """
    check_endpoint(endpoint)
    if is_tcp(endpoint):
        real = endpoint.encode()
    else:
        path = socket_path(endpoint)
        real = os.fsencode(path.parent.resolve() / path.name)
    return f"/gcma-{os.getuid()}-{hashlib.sha256(real).hexdigest()[:16]}"


def default_spill_dir(endpoint: str) -> Path:
    """A directory of the arena's own under the user's cache directory. Raises ArenaError when there is none."""
    return default_spill_base() / arena_name(endpoint).removeprefix("/")


def default_spill_base() -> Path:
    """Where the spill directories of this user's arenas are, unless a broker was told otherwise.

    Not the runtime directory: that is memory on most systems, and pages that leave memory should not come to rest in
    memory.
    """
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise ArenaError("there is no home directory to keep spill files in; say where with --spill-dir") from None
    return Path(cache) / "gcma"


def private_dir(path: Path) -> Path:
    """Makes `path` (with parents) and sees to it that it is this user's alone. Raises ArenaError when it is not."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat(follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode):
        raise ArenaError(f"{path} is not a directory")
    if found.st_uid != os.getuid():
        raise ArenaError(f"{path} belongs to user {found.st_uid}, not to you ({os.getuid()}); choose another place")
    if found.st_mode & 0o077:
        raise ArenaError(
            f"{path} can be entered by others (mode {found.st_mode & 0o777:o}); chmod 700 it or choose another place"
        )
    return path


def is_deserted(path: Path) -> bool:
    """Whether nobody listens on a socket: there is none, or a dead process has left it. One that is stopped listens still."""
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.setblocking(False)
            asking.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return True
    except OSError:  # as many wait to be let in as may; or we have no descriptor to ask with
        return False
    return False


def refuse_strangers(endpoint: str) -> None:
    """Pages must not go to whoever was first to make a directory of the right name in /tmp. Raises ArenaError. Over TCP the
    keys say who is who.
    """
    if is_tcp(endpoint):
        return
    try:
        found = socket_path(endpoint).parent.stat()
    except FileNotFoundError:
        return
    if found.st_uid not in (0, os.getuid()) or found.st_mode & 0o022:
        raise ArenaError(
            f"the directory of {endpoint} belongs to user {found.st_uid} with mode {found.st_mode & 0o777:o}: "
            "others could listen there in the broker's place; use a directory of your own"
        )
