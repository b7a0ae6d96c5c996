"""What a broker makes of any frames, guided by coverage: the codec, and the service behind it, in one process and without sockets.

    python -m tests.fuzz.target [libFuzzer's options] [corpus]

`GCMA_FUZZ_S` bounds it, by default to a minute. It starts from one sound request of each operation. Any exception is a finding; so are a reply of no
known status, an invariant that `_check` finds broken, and a client record that is not given back. Needs atheris: `pip install 'gcma-shm[fuzz]'`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gcma_shm.messages", "gcma_shm.broker", "msgpack"]):
    import msgpack

    from gcma_shm import arena as arenas
    from gcma_shm import errors, layout, messages
    from gcma_shm._core import Plane
    from gcma_shm.broker.registry import TypeRegistry
    from gcma_shm.broker.rights import Rights, Sender
    from gcma_shm.broker.service import Peer, Service

from gcma_shm.messages import Frame, Reply
from gcma_shm.process import start_time
from tests.test_messages import PAGE, SOUND

SECONDS = int(os.environ.get("GCMA_FUZZ_S", "60"))
STATUSES = {*errors.__all__, "ok", "HelloNeeded", "IndexError", "ValueError", "TypeError"} - {"GcmaError"}
SLOTS = 1024
SEPARATOR = b"\xc1PAGE"  # a byte that msgpack never uses: what follows is the next frame
SENDERS = (Sender(pid=os.getpid()), Sender(remote=True, key="narrow"), Sender(remote=True, key="gone"))
NARROW = Rights("narrow", types=frozenset({0}), alloc=False)


def whole_pages(header: bytes, filling: bytes) -> bytes:
    """As many bytes as that header asks for, of those over and over: a page for each offset, or one."""
    filling = filling or b"\0"
    try:
        offsets = msgpack.unpackb(header)[3].get("offsets", b"")
        pages = min(len(offsets) // messages.OFFSET_BYTES, messages.batch_max(PAGE))
    except Exception:  # whatever else it is
        pages = 1
    size = PAGE * max(pages, 1)
    return (filling * (size // len(filling) + 1))[:size]


class Target:
    """One broker's service. Replies of its workers are looked at, too."""

    def __init__(self, directory: Path) -> None:
        geometry, areas = layout.plan(2 << 20, PAGE, {}, SLOTS, 8)
        memory = mmap.mmap(-1, geometry.size)
        with memoryview(memory) as view:
            layout.write_header(view, geometry, areas, bytes(16))
        arena = arenas.Arena("fuzz", memory, geometry, areas, bytes(16))
        plane = Plane(memory, geometry, layout.BROKER, os.fsencode(directory))
        self._plane, self._registry = plane, TypeRegistry(plane, directory)
        self.declare()
        self.service = Service(
            plane,
            arena,
            self._registry,
            str(directory),
            self.answer,
            rights=lambda sender: NARROW if sender.key == "narrow" else None,
        )
        self.wrong: list[Reply] = []
        self._answers: queue.SimpleQueue[tuple[Peer, Reply]] = queue.SimpleQueue()

    def answer(self, peer: Peer, reply: Reply) -> None:
        """On a worker's thread: as in the broker, the control thread does the rest."""
        self._answers.put((peer, reply))

    def take_answers(self) -> None:
        """Those that are there."""
        while not self._answers.empty():
            peer, reply = self._answers.get()
            self.service.answered(peer, reply)
            self.look_at(reply)

    def look_at(self, reply: Reply | None) -> None:
        if reply is not None:
            messages.encode_reply(reply)
            if reply.status not in STATUSES:
                self.wrong.append(reply)

    def one(self, data: bytes) -> None:
        """The first byte chooses the sender, and whether it has a session; the rest are frames."""
        head, rest = data[:1] or b"\0", data[1:]
        sender = SENDERS[head[0] % len(SENDERS)]
        frames: list[Frame] = list(rest.split(SEPARATOR, 4))
        if head[0] & 64 and len(frames) > 1:
            frames[1:] = [whole_pages(bytes(frames[0]), bytes(frames[1]))]
        peer = b"peer-%d" % (head[0] % len(SENDERS))
        if head[0] & 128:
            who = {"pid": os.getpid(), "start": start_time(os.getpid()) or 0, "mapped": not sender.remote}
            hello = messages.encode_request(messages.Request(1, "hello", who))
            self.look_at(self.service.request(peer, hello, sender))
        self.look_at(self.service.request(peer, frames, sender))
        self.take_answers()
        self.service.tick()
        self.service.sessions._check()
        assert not self.wrong, self.wrong
        assert len(self.service.sessions.clients) <= len(SENDERS), "a record for a peer that has one"
        bye = messages.encode_request(messages.Request(1, "bye", {}))
        for n, one in enumerate(SENDERS):
            self.look_at(self.service.request(b"peer-%d" % n, bye, one))
        self.declare()

    def declare(self) -> None:
        """Type 0, so that stores and loads meet pages. Its life is 1 again and again, as the requests of the corpus say."""
        life_at = self._plane.geometry.type_at(0) + layout.TYPE_LIFE_AT
        if not self._plane.read(life_at) & 1:
            self._plane.write(life_at, 0)
            with contextlib.suppress(ValueError):  # other types have all the slots
                self._registry.declare(0, messages.batch_max(PAGE), "behind")


def write_corpus(directory: Path) -> None:
    """One sound request of each operation, with and without a session."""
    for name, parameters in SOUND.items():
        pages = [b"a page"] * messages.OPERATIONS[name].pages
        for head in (b"\x00", b"\xc0", b"\xc1"):
            packed = messages.encode_request(messages.Request(7, name, parameters))[0]
            (directory / f"{name}-{head.hex()}").write_bytes(head + SEPARATOR.join([bytes(packed), *pages]))
            if messages.OPERATIONS[name].batch:
                many = parameters | {"offsets": messages.pack_offsets(range(messages.batch_max(PAGE)))}
                packed = messages.encode_request(messages.Request(7, name, many))[0]
                (directory / f"{name}-many-{head.hex()}").write_bytes(head + SEPARATOR.join([bytes(packed), *pages]))


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        spill, corpus = Path(scratch) / "spill", Path(scratch) / "corpus"
        spill.mkdir()
        corpus.mkdir()
        write_corpus(corpus)
        target = Target(spill)

        def test_one_input(data: bytes) -> None:
            target.one(data)

        options = [f"-max_total_time={SECONDS}", "-max_len=2048", "-timeout=20", "-rss_limit_mb=2048"]
        atheris.Setup([sys.argv[0], *options, *sys.argv[1:], str(corpus)], test_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
