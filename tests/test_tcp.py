"""Over TCP: who is let in, what each key gives a right to, and how sessions end whose process nobody can watch."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import gcma_shm
from gcma_shm import Client, Forbidden
from gcma_shm.broker import sessions as sessions_module
from gcma_shm.broker.rights import Sender
from gcma_shm.broker.sessions import Sessions
from gcma_shm.errors import BrokerUnavailable, ProtocolError, QuotaExceeded
from gcma_shm.records import Records, State
from tests.conftest import Bare
from tests.keys import ANY_PORT, Keys, tcp_of
from tests.processes import WAIT_S, Broker, Said, broker, eventually, forked
from tests.relay import Relay
from tests.zmtp import Raw

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

PAGE = b"p-gcma--" * 512  # no four bytes over and over, or it would take no page


@dataclass
class Place:
    broker: Broker
    tcp: str
    keys: Keys
    asking: Client

    def connect(self, name: str, timeout: float = 5.0) -> Client:
        return gcma_shm.connect(self.tcp, timeout=timeout, **self.keys.of(name))

    def clients(self) -> set[str]:
        """The numbers of those that the broker knows, but for whoever asks."""
        return set(self.asking.stats()["clients"]) - {"0", "1", str(self.asking.number)}


def here(name: str) -> str:
    return f"ipc://{os.environ['XDG_RUNTIME_DIR']}/{name}"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    keys = Keys(tmp_path / "keys")
    for name in ("all", "narrow", "ops", "nobody"):
        keys.make(name)
    keys.authorize(all="", narrow="types=3,7-8 alloc=no", ops="admin=yes types=none")
    with (
        broker(here("b"), "--clients", "10", *keys.broker_options()) as running,
        gcma_shm.connect(running.endpoint, mapped=False) as asking,
    ):
        yield Place(running, tcp_of(running), keys, asking)


def test_pages_there_and_back_and_with_those_who_map(place: Place) -> None:
    with place.connect("all") as far, gcma_shm.connect(place.broker.endpoint) as near:
        assert near.mapped
        assert not far.mapped
        ours, theirs = far.swap(3, 10), near.swap(3, 10)
        ours.store(1, PAGE)
        assert theirs.load(1) == PAGE
        theirs.store(2, PAGE[::-1])
        assert ours.load(2) == PAGE[::-1]
        with pytest.raises(gcma_shm.ArenaError, match="does not map"):
            far.alloc_contig(4096)


def test_who_has_no_key_in_the_file_is_not_let_in(place: Place, tmp_path: Path) -> None:
    for name in ("nobody", "all"):
        keys = place.keys.of(name)
        if name == "all":  # a key that is known, but for another broker
            keys["server_key"] = Keys(tmp_path / "others").server
        with pytest.raises(BrokerUnavailable, match="does it know our key"):
            gcma_shm.connect(place.tcp, timeout=0.5, **keys)
    with pytest.raises(BrokerUnavailable):  # none at all, as to a broker with --insecure
        gcma_shm.connect(place.tcp, timeout=0.5)
    with Raw(place.tcp) as plain:  # nor does the NULL mechanism
        plain.socket.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + bytes(32))
        assert plain.is_ended()
    with Raw(place.tcp) as oldest:  # nor the protocol's first version, which has no keys
        oldest.socket.sendall(b"\x01\x00\x05\x00ping")
        assert oldest.is_ended()
    assert place.clients() == set()
    with place.connect("all") as one:
        assert one.stats()["broker"]["requests"].get("hello", 0) >= 1, "and the others are served"


def test_a_narrow_key(place: Place) -> None:
    with place.connect("narrow") as narrow, place.connect("all") as other:
        for type_ in (3, 7, 8):
            narrow.swap(type_, 10).store(0, PAGE)
        for type_ in (0, 4, 9, 255):
            with pytest.raises(Forbidden, match=f"narrow has no right to type {type_}"):
                narrow.swap(type_, 10)
        swap = other.swap(4, 10)
        swap.store(0, PAGE)
        slot = {"type": 4, "life": other.stats()["types"]["4"]["life"], "offset": 0}
        life = {key: slot[key] for key in ("type", "life")}
        for operation, parameters in (
            ("load", slot), ("invalidate_page", slot), ("contains", slot), ("count", life), ("sync", life), ("invalidate_area", life),
        ):  # fmt: skip
            with pytest.raises(Forbidden):
                narrow._channel.request(operation, parameters)
        with pytest.raises(Forbidden):
            narrow._channel.request("store", slot, [PAGE[::-1]])
        assert swap.load(0) == PAGE
        for operation in ("alloc_contig", "reserve"):
            with pytest.raises(Forbidden, match="buffers and reservations"):
                narrow._channel.request(operation, {"nbytes": 4096})
        with pytest.raises(PermissionError):
            narrow.drain_area("default")
        with pytest.raises(Forbidden):
            narrow.quota(1 << 20)
        assert narrow.quota().held == 0
        assert [area.name for area in narrow.areas()] == ["default"]
        assert narrow.stats()["broker"]["refusals"]["Forbidden"] >= 10


def gcma(place: Place, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    keys = place.keys.of(name)
    options = ["--endpoint", place.tcp, "--curve-key", keys["curve_key"], "--server-key", keys["server_key"]]
    command = [sys.executable, "-m", "gcma_shm.broker.cli", *arguments, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, cwd="/")


def test_an_operator_needs_the_right(place: Place) -> None:
    assert "default" in gcma(place, "all", "area", "list").stdout
    refused = gcma(place, "all", "area", "drain", "default")
    assert refused.returncode == 1
    assert "all has no right to area_drain" in refused.stderr
    assert "drained" in gcma(place, "ops", "area", "drain", "default").stdout
    assert gcma(place, "ops", "area", "resume", "default").returncode == 0


def test_a_right_that_is_taken_away_ends_at_once(place: Place) -> None:
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(place.connect("all"))
        swap = client.swap(3, 10)
        swap.store(0, PAGE)
        place.keys.authorize(all="types=4", narrow="")

        def narrowed() -> bool:
            try:
                swap.load(0)
            except Forbidden:
                return True
            return False

        assert eventually(narrowed)
        client.swap(4, 10).store(0, PAGE)
        place.keys.replace("this is no line\n")
        place.connect("narrow").close()  # before anybody is let in the file is looked at
        assert client.swap(4, 10).load(0) == PAGE, "a file that is not understood changes nothing"
        place.keys.authorize(narrow="")
        assert eventually(lambda: place.clients() == set()), "nor does its session stay"
        with pytest.raises(Forbidden, match="not authorized"):
            client.stats()
        place.connect("narrow").close()
        with pytest.raises(BrokerUnavailable):
            place.connect("all", timeout=0.5)


def test_a_session_ends_with_its_connection(place: Place) -> None:
    def stranger(said: Said) -> None:
        client = place.connect("all")
        client.swap(3, 10).store(0, PAGE)
        said.say(client.number)
        said.hear()

    with forked(stranger) as child:
        number = str(child.receive())
        assert place.clients() == {number}
        child.kill()
        assert eventually(lambda: place.clients() == set())
    with place.connect("all") as again:
        assert again.swap(3, 10).load(0) == PAGE


def test_a_client_whose_wire_was_cut_says_hello_again(place: Place) -> None:
    with Relay(place.tcp) as relay, gcma_shm.connect(relay.endpoint, **place.keys.of("all")) as client:
        swap = client.swap(3, 10)
        swap.store(0, PAGE)
        assert place.clients()
        relay.cut()
        assert eventually(lambda: place.clients() == set())
        assert eventually(lambda: loaded_after_all(swap))
        assert len(place.clients()) == 1


def loaded_after_all(swap: gcma_shm.Swap) -> bool:
    with contextlib.suppress(BrokerUnavailable):  # a request that was sent into the cut
        return swap.load(0) == PAGE
    return False


def test_those_from_afar_never_take_all_client_records(place: Place) -> None:
    """Ten records, one of them the broker's: four for TCP."""
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(place.connect("all"))
        with pytest.raises(QuotaExceeded, match="over TCP"):
            place.connect("narrow")
        for _ in range(4):  # and one that asks
            stack.enter_context(gcma_shm.connect(place.broker.endpoint))


def test_hello_over_tcp_maps_nothing_and_takes_up_nothing(place: Place) -> None:
    with gcma_shm.connect(place.broker.endpoint) as near, place.connect("all") as far:
        far._channel.request("bye")
        who = {"pid": 1, "start": 1}
        for wrong in ({"mapped": True}, {"mapped": False, "client": near.number}):
            far._channel._greeted = True
            with pytest.raises(gcma_shm.ArenaError, match="over TCP"):
                far._channel.request("hello", who | wrong)
        greeting = far._channel.request("hello", who | {"mapped": False}).results
        assert not {"arena", "spill_dir"} & set(greeting), "of no use there"


def test_what_travels_is_encrypted(place: Place) -> None:
    with Relay(place.tcp) as relay:
        with gcma_shm.connect(relay.endpoint, **place.keys.of("all")) as client:
            client.swap(3, 10).store(0, b"very secret page" * 256)
            assert client.swap(3, 10).load(0) == b"very secret page" * 256
        assert len(relay.seen) > 2 * 4096
        assert b"very secret" not in relay.seen
        assert b"swap_init" not in relay.seen


def test_without_keys_on_a_loopback_address(tmp_path: Path) -> None:
    with broker(here("i"), "--listen", ANY_PORT, "--insecure") as running, gcma_shm.connect(tcp_of(running)) as client:
        swap = client.swap(0, 10)
        swap.store(0, PAGE)
        assert swap.load(0) == PAGE
        with pytest.raises(Forbidden, match="without a key"):
            client.drain_area("default")


def test_a_broker_on_tcp_alone(tmp_path: Path) -> None:
    """Its endpoint names the arena, so the port is given; where another process has taken it meanwhile, the next one is tried."""
    for _ in range(10):
        with socket.create_server(("127.0.0.1", 0)) as free:
            endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        try:
            with broker(endpoint, "--insecure") as running:
                with gcma_shm.connect(endpoint) as client:
                    client.swap(0, 10).store(0, PAGE)
                assert running.stop() == 0
            return
        except AssertionError as error:
            if "cannot listen" not in str(error):
                raise
    pytest.fail("no port is free")


# --- sessions, pure


def remote(key: str = "k") -> Sender:
    return Sender(remote=True, key=key)


def kept(bare: Bare) -> Sessions:
    return Sessions(bare.plane, lambda *_: None)


def test_a_remote_session(bare: Bare) -> None:
    sessions = kept(bare)
    client = sessions.hello(b"a", 5, 5, False, None, remote())
    assert (client.pidfd, client.pid) == (-1, 0)
    assert Records(bare.plane).read(client.number).pid == 0, "to a later broker it is nobody's"
    assert sessions.find(b"a", remote()) is client
    assert sessions.hello(b"a", 5, 5, False, None, remote()) is client
    assert sessions.adopt_forked(look_anyway=True) == [], "it is no child that was never born"
    assert sessions.gone(b"a") == [client]
    sessions._check()
    sessions.forget(client)
    assert sessions.gone(b"a") == []
    assert Records(bare.plane).read(client.number).state is State.DEAD


def test_who_takes_another_ones_address_has_not_its_session(bare: Bare) -> None:
    """A peer says itself what its address is: after a connection is lost, somebody else may come by that name."""
    sessions = kept(bare)
    sessions.hello(b"a", 5, 5, False, None, remote("k"))
    for other in (remote("l"), Sender(pid=7), Sender()):
        assert sessions.find(b"a", other) is None
        with pytest.raises(ProtocolError, match="another's"):
            sessions.hello(b"a", 5, 5, False, None, other)


def test_silence(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = kept(bare)
    client = sessions.hello(b"a", 5, 5, False, None, remote())
    assert sessions.silent() == []
    monkeypatch.setattr(sessions_module, "REMOTE_SILENCE_S", -1.0)
    assert sessions.silent() == [client]
    monkeypatch.undo()
    client.heard_at -= sessions_module.REMOTE_SILENCE_S + 1
    assert sessions.silent() == [client]
    sessions.find(b"a", remote())
    assert sessions.silent() == []
