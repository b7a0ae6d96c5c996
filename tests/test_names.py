"""Buffers and reservations by name: in any text that is a name, in order, once each."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

import gcma_shm
from gcma_shm import BufferExists, NoSuchBuffer, QuotaExceeded
from gcma_shm.clients.embedded import EmbeddedClient
from tests.client import PAGE, held
from tests.processes import eventually

pytestmark = pytest.mark.arena("small")


def test_by_name(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(3 * PAGE, name="frame/1")
    assert buffer.name == "frame/1"
    assert "frame/1" in repr(buffer)
    with buffer.view as view:
        view[:5] = b"hello"
    with gcma_shm.connect(client.endpoint) as other:
        theirs = other.attach("frame/1")
        assert (theirs.nbytes, theirs.offset, theirs.name) == (3 * PAGE, buffer.offset, "frame/1")
        with theirs.view as view:
            assert bytes(view[:5]) == b"hello"
        for taken in (client, other):
            with pytest.raises(BufferExists, match="frame/1"):
                taken.alloc_contig(PAGE, name="frame/1")
        (told,) = client.names()
        assert (told.name, told.area, told.offset, told.nbytes, told.holders, told.reservation) == (
            "frame/1",
            "default",
            buffer.offset,
            3 * PAGE,
            2,
            False,
        )
        buffer.free()
        assert client.names()[0].holders == 1
        with pytest.raises(BufferExists):
            client.alloc_contig(PAGE, name="frame/1")
    assert client.names() == []
    with pytest.raises(NoSuchBuffer, match="frame/1"):
        client.attach("frame/1")
    with client.alloc_contig(PAGE, name="frame/1"):
        assert [told.nbytes for told in client.names()] == [PAGE]
    assert isinstance(BufferExists("x"), FileExistsError)


def test_names_in_order(client: EmbeddedClient) -> None:
    names = ["b", "a", "B", "é", "10", "9", "日本", "z z"]
    kept = [(client.reserve if n % 3 == 0 else client.alloc_contig)(PAGE, name=name) for n, name in enumerate(names)]
    kept += [client.alloc_contig(PAGE)]
    assert [told.name for told in client.names()] == sorted(names)
    assert [told.name for told in client.names() if told.reservation] == sorted(names[::3])


def test_many_names() -> None:
    """More than one answer holds."""
    with gcma_shm.embedded("160M", slots=1000) as client:
        names = [f"buffer {n:04}" for n in range(2100)]
        kept = []
        try:
            for name in reversed(names):
                kept.append(client.alloc_contig(1, name=name))
        except QuotaExceeded:
            pytest.fail(f"room for {len(kept)} only")
        assert [told.name for told in client.names()] == names


@pytest.mark.parametrize(
    "name", ["x", "x" * 48, "日本語", "a b", "/dev/shm/psm_1", "é" * 24, "'\"\\%s{}", "default", "=,;"]
)
def test_names_of_odd_text(client: EmbeddedClient, name: str) -> None:
    with client.alloc_contig(PAGE, name=name) as buffer, client.attach(name) as again:
        assert buffer.name == again.name == name
        assert [told.name for told in client.names()] == [name]
        loaded = pickle.loads(pickle.dumps(buffer))
        assert loaded.name == name
        loaded.free()
    assert client.names() == []


@pytest.mark.parametrize(
    ("name", "error"),
    [("", ValueError), ("x" * 49, ValueError), ("é" * 25, ValueError), ("a\nb", ValueError), ("a\0", ValueError),
     ("\ud800", ValueError), (b"x", TypeError), (5, TypeError)],
    ids=repr,
)  # fmt: skip
def test_names_that_are_none(client: EmbeddedClient, name: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        client.alloc_contig(PAGE, name=name)
    with pytest.raises(error):
        client.attach(name)
    assert client.names() == []
    assert held(client) == 0


def test_attach_takes_a_name_or_a_handle(client: EmbeddedClient) -> None:
    with client.alloc_contig(PAGE) as buffer:
        for wrong in (None, 7, buffer):
            with pytest.raises(TypeError):
                client.attach(wrong)  # type: ignore[arg-type] # on purpose


def test_quotas_count_what_is_attached(client: EmbeddedClient) -> None:
    buffer = client.alloc_contig(10 * PAGE, name="large")
    with gcma_shm.connect(client.endpoint) as other:
        other.quota(9 * PAGE)
        for what in ("large", buffer.hand_over(timeout=0.01)):
            with pytest.raises(QuotaExceeded):
                other.attach(what)
        other.quota(10 * PAGE)
        with other.attach("large"), other.attach("large"):
            assert other.quota().held == 10 * PAGE, "held twice, counted once"
        assert other.quota().held == 0
    buffer.free()
    assert eventually(lambda: held(client) == 0)
