"""Who is let in over TCP: a thread that answers ZeroMQ's question (ZAP, RFC 27) for each CURVE handshake, and keeps the file of
authorized keys in mind.

CURVE has proved by then that the peer has the secret of the key that it shows, and that it knows the broker's public key. The file
is read again within a second of a change: whoever's line is gone has no rights from then on, and no new connection. A file
that cannot be read, or not be understood, leaves everything as it was.

pyzmq's ThreadAuthenticator answers handshakes, too, but looks at nothing in between, so a key that was taken away would keep its
connection; and it brings an asyncio loop.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import zmq
from zmq.utils import z85

from gcma_shm._core import scheduler_slice
from gcma_shm.broker.rights import INSECURE, Rights, Sender, parse_authorized
from gcma_shm.sizes import counted

log = logging.getLogger(__name__)

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
ZAP_VERSION = b"1.0"
LOOK_MS = 500  # for changes of the file
REFUSALS_TOLD_S = 10.0  # at least so long from one line of the log to the next
AUTHORIZED_BYTES_MAX = 1 << 20


class Admission:
    """`authorized` None: nobody is asked for a key, which `insecure` must have allowed. Raises OSError and ValueError for a file that
    is not to be had.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], authorized: Path | None) -> None:
        self._authorized = authorized
        self._seen: tuple[int, ...] = ()
        self._trouble = ""
        self._refused, self._told = 0, -REFUSALS_TOLD_S
        self._by_key: dict[str, Rights] = {}  # replaced as a whole, so that any thread may read it
        self._ended = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None
        if authorized is None:
            return
        try:
            self._read(authorized)
        except BaseException:
            os.close(self._ended)
            raise
        self._zap = context.socket(zmq.REP)
        self._zap.setsockopt(zmq.LINGER, 0)
        self._zap.bind(ZAP_ENDPOINT)
        self._thread = threading.Thread(target=self._run, args=(authorized,), name="admission", daemon=True)
        self._thread.start()

    def rights(self, sender: Sender) -> Rights | None:
        """What a remote peer may do; None: nothing, whatever it could before. From any thread."""
        return INSECURE if self._authorized is None else self._by_key.get(sender.key)

    def close(self) -> None:
        """Answers nobody any more."""
        if self._thread is not None:
            os.eventfd_write(self._ended, 1)
            self._thread.join()
            self._zap.close()
        os.close(self._ended)

    def _run(self, authorized: Path) -> None:
        scheduler_slice(0)  # not the control loop's
        poller = zmq.Poller()
        poller.register(self._zap, zmq.POLLIN)
        poller.register(self._ended, zmq.POLLIN)
        while self._ended not in (ready := dict(poller.poll(LOOK_MS))):
            try:
                self._read(authorized)
            except (OSError, ValueError) as error:
                if str(error) != self._trouble:  # once, and not twice a second
                    log.warning("%s cannot be used, so its former content holds: %s", authorized, error)
                self._trouble = str(error)
            if self._zap in ready:
                self._zap.send_multipart(self._answer(self._zap.recv_multipart()))

    def _read(self, authorized: Path) -> None:
        found = authorized.stat()
        seen = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if seen == self._seen:
            return
        if found.st_mode & 0o022:
            raise ValueError(f"others may write {authorized}; chmod 600 it")
        if found.st_size > AUTHORIZED_BYTES_MAX:
            raise ValueError(f"{authorized} has more than {AUTHORIZED_BYTES_MAX} bytes")
        try:
            self._by_key = parse_authorized(authorized.read_text())
        except ValueError as error:
            raise ValueError(f"{authorized}: {error}") from None
        self._seen, self._trouble = seen, ""
        log.info("%s: %s", authorized, counted(len(self._by_key), "key"))

    def _answer(self, question: list[bytes]) -> list[bytes]:
        """The reply to one request of ZAP: version, number, domain, address, identity, mechanism, credentials."""
        version, number, _domain, address, _identity, mechanism, *credentials = question
        key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" and credentials else ""
        where = address.decode(errors="replace")
        known = self._by_key.get(key) if version == ZAP_VERSION else None
        if known is None:
            self._refused += 1
            if time.monotonic() - self._told >= REFUSALS_TOLD_S:  # nobody is to fill the log with it
                log.warning("not let in: %d since the last such line, now %s with key %s", self._refused, where, key)
                self._told, self._refused = time.monotonic(), 0
            return [ZAP_VERSION, number, b"400", b"this key is not authorized", b"", b""]
        log.info("%s is let in from %s", known.name, where)
        return [ZAP_VERSION, number, b"200", b"OK", key.encode(), b""]
