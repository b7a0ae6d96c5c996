"""`gcma keygen`: new CURVE key files, which never take the place of others."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import zmq

from gcma_shm.curve import KeyPair, need_curve

PUBLIC, SECRET = ".key", ".key_secret"


def keygen(directory: Path, names: list[str]) -> dict[str, str]:
    """Makes `NAME.key` and `NAME.key_secret` for each name, mode 0600; returns the public keys by name.

    Raises FileExistsError with nothing made when one of the files is there, ValueError for what is no name.
    """
    need_curve()
    for name in names:
        if not name or name != Path(name).name or not name.isprintable() or " " in name:
            raise ValueError(f"{name!r} is no name for a key file")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    made: dict[str, str] = {}
    with contextlib.ExitStack() as undo:
        for name in names:
            pair = _new_pair()
            for suffix, content in (
                (SECRET, _certificate(name, pair, True)),
                (PUBLIC, _certificate(name, pair, False)),
            ):
                path = directory / f"{name}{suffix}"
                _write_new(path, content)
                undo.callback(path.unlink, missing_ok=True)
            made[name] = pair.public
        undo.pop_all()
    return made


def _new_pair() -> KeyPair:
    while True:
        pair = KeyPair(*(key.decode() for key in zmq.curve_keypair()))
        if (
            pair.public[0] not in "-#"
        ):  # it stands on command lines, where the one begins an option, and the other a comment
            return pair


def _certificate(name: str, pair: KeyPair, secret: bool) -> str:
    """In the format of ZeroMQ's certificates; pyzmq's own function would write over a file, and let others read it."""
    lines = ["# A secret CURVE key: keep it to yourself." if secret else "# A public CURVE key.", "metadata"]
    lines += [f'    name = "{name}"', "curve", f'    public-key = "{pair.public}"']
    lines += [f'    secret-key = "{pair.secret}"'] if secret else []
    return "\n".join(lines) + "\n"


def _write_new(path: Path, content: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "exists; never written over", str(path)) from None
    with open(fd, "w") as file:
        file.write(content)
