"""Named buffers that are kept: by whom, until when, what is refused, and how the tools tell it."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile

import pytest

import gcma_shm
from gcma_shm import Buffer, Client, layout
from gcma_shm.broker.rights import Sender
from gcma_shm.broker.sessions import Sessions
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.endpoint import arena_name
from gcma_shm.errors import ArenaError, BufferExists, NoSuchBuffer, ProtocolError, QuotaExceeded, StaleHandle
from gcma_shm.process import start_time
from gcma_shm.records import Records, State
from tests.client import held
from tests.conftest import Bare
from tests.invariants import check_at_rest
from tests.processes import WAIT_S, Said, broker, eventually, forked
from tests.test_protocol import Stranger

PAGE = 4096
ME = os.getpid()
MY_START = start_time(ME) or 0

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def kept_by(client: Client) -> dict[str, tuple[int, ...]]:
    return {told.name: told.kept_by for told in client.names()}


def waits(said: Said) -> None:
    said.hear()


# --- in workers' hands


def test_until_it_is_unlinked(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(3 * PAGE)
    buffer.view[:4] = b"kept"
    buffer.keep("frames")
    assert buffer.name == "frames"
    buffer.keep("frames")  # once more has no effect
    buffer.free()
    assert kept_by(client) == {"frames": (layout.BROKER,)}
    assert held(client) == 3 * PAGE
    again = client.attach("frames")
    assert bytes(again.view[:4]) == b"kept"
    client.unlink("frames")
    with pytest.raises(NoSuchBuffer):
        client.attach("frames")
    with pytest.raises(NoSuchBuffer):
        client.unlink("frames")
    assert bytes(again.view[:4]) == b"kept"
    assert held(client) == 3 * PAGE
    again.free()
    assert not held(client)
    check_at_rest(arena_name(client.endpoint))


def test_a_name_is_taken_off_one_buffer_and_no_other(client: EmbeddedClient) -> None:
    with client.alloc_contig(PAGE) as buffer, client.alloc_contig(PAGE) as other:
        buffer.keep("frames")
        with pytest.raises(NoSuchBuffer):
            client._unkeep(other._number, "frames")
        assert kept_by(client) == {"frames": (layout.BROKER,)}
        client._unkeep(buffer._number, "frames")
        assert not kept_by(client)


def test_until_a_process_ends(client: EmbeddedClient) -> None:
    with forked(waits) as first, forked(waits) as second:
        for name, process in (("a", first), ("b", first), ("c", second), ("both", first)):
            with client.alloc_contig(PAGE) as buffer:
                buffer.keep(name, process.pid)
                if name == "both":
                    buffer.keep(name, second.pid)
        (of_first,), (of_second,) = kept_by(client)["a"], kept_by(client)["c"]
        keepers = {"a": (of_first,), "b": (of_first,), "c": (of_second,), "both": tuple(sorted((of_first, of_second)))}
        assert kept_by(client) == keepers
        first.kill()
        assert eventually(lambda: kept_by(client) == {"c": (of_second,), "both": (of_second,)})
        client.unlink("c")
        second.kill()
        assert eventually(lambda: not held(client))
    assert eventually(lambda: client.stats()["broker"]["clients"] == 1), "a record that nobody gives back"
    check_at_rest(arena_name(client.endpoint))


def test_a_process_that_has_ended_is_this_one(client: EmbeddedClient) -> None:
    with forked(lambda _said: None) as child:
        child.receive()
        child.wait()
    for pid in (child.pid, 2**31 - 1):
        with client.alloc_contig(PAGE) as buffer:
            buffer.keep("mine", pid)
        (keeper,) = kept_by(client)["mine"]
        assert client.stats()["clients"][str(keeper)]["pid"] == ME
        client.unlink("mine")


def test_what_is_refused(client: EmbeddedClient) -> None:
    named, other, promised = (
        client.alloc_contig(PAGE, name="n"),
        client.alloc_contig(PAGE),
        client.reserve(PAGE, name="r"),
    )
    for name in ("n", "r"):
        with pytest.raises(BufferExists):
            other.keep(name, ME)
    with pytest.raises(ValueError, match="has the name 'n' already"):
        named.keep("m")
    for name in ("", "x" * 49, "a\nb"):
        with pytest.raises(ValueError, match="expected 1 to 48 bytes"):
            other.keep(name)
        with pytest.raises(ValueError, match="expected 1 to 48 bytes"):
            client.unlink(name)
    with pytest.raises(NoSuchBuffer):
        client.unlink("r")
    claimed = promised.claim()
    with pytest.raises(ValueError, match="is a reservation"):
        claimed.keep("c")
    assert kept_by(client) == {"n": (), "r": ()}
    named.keep("n")
    other.free()
    with pytest.raises(StaleHandle):
        other.keep("o")
    with gcma_shm.connect(client.endpoint) as stranger:
        (told,) = [told for told in client.names() if told.name == "n"]
        with pytest.raises(NoSuchBuffer):
            stranger._channel.request("keep", {"buffer": named._number, "name": "n"})
        with pytest.raises(ProtocolError, match="both pid and start"):
            client._channel.request("keep", {"buffer": named._number, "name": "n", "pid": ME})
    assert told.holders == 1
    with gcma_shm.connect(client.endpoint, mapped=False) as unmapped, pytest.raises(ArenaError, match="does not map"):
        unmapped.unlink("n")
    assert not [one for one in client.stats()["clients"] if int(one) > client.number], "a record for what was refused"
    claimed.free()
    promised.release()
    named.free()
    client.unlink("n")
    assert not held(client)


def test_a_name_that_was_given_by_alloc_contig_can_be_taken_off(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(PAGE, name="n")
    client.unlink("n")
    assert not client.names()
    assert held(client) == PAGE
    with client.alloc_contig(PAGE, name="n"):
        buffer.free()
    assert not held(client)


def _keeps(buffer: Buffer, name: str) -> bool:
    with contextlib.suppress(QuotaExceeded):
        buffer.keep(name, ME)
        return True
    return False


def test_records_and_quotas_are_bounds() -> None:
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    with broker(endpoint, "--clients", "3", "--quota", "64K"), gcma_shm.connect(endpoint) as client:
        buffer = client.alloc_contig(PAGE)
        with gcma_shm.connect(endpoint), pytest.raises(QuotaExceeded, match="client records"):
            buffer.keep("n", ME)
        assert not client.names(), "refused, and done in part"
        assert eventually(lambda: _keeps(buffer, "n")), (
            "the record of a client that has left is free when all that it held is back"
        )
        with pytest.raises(QuotaExceeded, match="client records"):
            gcma_shm.connect(endpoint)
        buffer.free()
        buffer = client.alloc_contig(15 * PAGE)
        buffer.keep("m", ME)
        buffer.free()
        buffer = client.alloc_contig(PAGE)
        with pytest.raises(QuotaExceeded, match="may hold 64 KiB"):
            buffer.keep("o", ME)
        buffer.keep("o")
        buffer.free()
        keeper = client.names()[0].kept_by[0]
        assert client._channel.request("quota", {"client": keeper}).results["held"] == 16 * PAGE
        for name in "nmo":
            client.unlink(name)


def test_a_takeover() -> None:
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    with (
        broker(endpoint) as first,
        gcma_shm.connect(endpoint, timeout=WAIT_S) as client,
        forked(waits) as dies,
        forked(waits) as lives,
    ):
        for name, pid in (("dies", dies.pid), ("lives", lives.pid), ("nobody", None)):
            with client.alloc_contig(PAGE) as buffer:
                buffer.view[:1] = name[:1].encode()
                buffer.keep(name, pid)
        before = kept_by(client)
        first.stop(signal.SIGKILL)
        dies.kill()
        with broker(endpoint):
            del before["dies"]
            assert eventually(lambda: kept_by(client) == before)
            with client.alloc_contig(PAGE) as buffer:
                buffer.keep("more", lives.pid)
            assert kept_by(client)["more"] == before["lives"], "one process, one keeper"
            lives.kill()
            assert eventually(lambda: kept_by(client) == {"nobody": (layout.BROKER,)})
            with client.attach("nobody") as buffer:
                assert bytes(buffer.view[:1]) == b"n"
            client.unlink("nobody")
            assert not held(client)
            check_at_rest(arena_name(endpoint))
            client.close()


# --- by the protocol alone


def test_as_it_is_specified(client: EmbeddedClient) -> None:
    stranger = Stranger(client.endpoint)
    try:
        who = {"pid": ME, "start": MY_START, "mapped": True}
        assert stranger.request("hello", who)[0] == "ok"
        place = stranger.request("alloc_contig", {"nbytes": 1})[1]
        kept = stranger.request("keep", {"buffer": place["buffer"], "name": "n", "pid": ME, "start": MY_START})
        assert (kept[0], kept[1].keys()) == ("ok", {"keeper"})
        (told,) = stranger.request("names", {})[1]["names"]
        assert (told["name"], told["holders"], told["kept_by"]) == ("n", 1, [kept[1]["keeper"]])
        assert stranger.request("keep", {"buffer": place["buffer"], "name": "n"})[1] == {"keeper": 1}
        assert stranger.request("free_contig", {"buffer": place["buffer"]})[0] == "ok"
        assert stranger.request("attach_name", {"name": "n"})[1]["buffer"] == place["buffer"]
        assert stranger.request("unlink", {"name": "n"})[:2] == ("ok", {})
        assert stranger.request("unlink", {"name": "n"})[0] == "NoSuchBuffer"
        assert stranger.request("keep", {"buffer": place["buffer"], "name": "n"})[0] == "ok"  # it is held still
        assert stranger.request("unlink", {"name": "n"})[0] == "ok"
        assert stranger.request("bye")[0] == "ok"
    finally:
        stranger.close()
    assert eventually(lambda: not held(client))


# --- keepers, without a socket


def sessions_of(bare: Bare) -> Sessions:
    return Sessions(bare.plane, lambda _parent, _child: None, presence=bare.arena.presence)


def test_a_keeper_is_nobodys_session(bare: Bare) -> None:
    kept = sessions_of(bare)
    client = kept.hello(b"a", ME, MY_START, True, None)
    keeper = kept.keeper(client, ME, MY_START)
    assert keeper is kept.keeper(client, ME, MY_START)
    assert (kept.keepers(), keeper.pid, keeper.peer) == ({keeper.number}, ME, None)
    with pytest.raises(ProtocolError, match="say hello without a number"):
        kept.hello(b"b", ME, MY_START, True, keeper.number)
    assert not kept.adopt_forked(look_anyway=True)
    kept._check()
    again = sessions_of(bare)
    again.restore()
    assert again.keepers() == {keeper.number}
    assert again.keeper(client, ME, MY_START).number == keeper.number
    again._check()
    for one in (again, kept):
        one.forget(keeper if one is kept else again.clients[keeper.number])
        assert not one.keepers()
        one._check()
    kept.buried(keeper.number)
    assert not Records(bare.plane).read(keeper.number).keeps
    again.close()
    kept.close()


def test_a_client_in_another_pid_namespace(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process is called there means nothing to the broker; the client's own end it sees, if it sees the client."""
    kept = sessions_of(bare)
    elsewhere = 7
    seen = kept.hello(b"a", 5, 6, True, None, Sender(pid=ME), pidns=elsewhere)
    keeper = kept.keeper(seen, 1, 1)
    record = Records(bare.plane).read(keeper.number)
    assert (keeper.pid, record.pid, record.start, record.state) == (ME, ME, MY_START, State.ALIVE)
    unseen = kept.hello(b"b", 5, 7, True, None, pidns=elsewhere)
    with pytest.raises(ArenaError, match="another PID namespace"):
        kept.keeper(unseen, 1, 1)
    kept._check()
    kept.close()


def test_an_answer_that_was_lost_can_be_asked_for_again() -> None:
    """`keep` is sent again after a takeover and has no effect then; `unlink` is not: the name may be another's by now."""
    from gcma_shm.clients.correspondence import ONCE

    assert "unlink" in ONCE
    assert "keep" not in ONCE
