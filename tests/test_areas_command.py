"""Areas and quotas by `gcma area` and `gcma quota`, quotas by the API, and what is no area."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gcma_shm
from gcma_shm import AreaInfo, QuotaExceeded
from gcma_shm.areas import AreaSpec
from gcma_shm.clients.embedded import EmbeddedClient
from tests.processes import WAIT_S, broker_command, eventually
from tests.using_areas import PAGE, K, M, all_there, area, fill_until_lent, gcma

pytestmark = pytest.mark.arena("two areas")


# --- the command


def test_the_list(client: EmbeddedClient) -> None:
    client.alloc_contig(PAGE, "a").free()
    told = json.loads(gcma("area", "list", "--json", "--endpoint", client.endpoint))
    assert told["spare"] == 0
    assert [AreaInfo(**info) for info in told["areas"]] == client.areas()
    assert [info["name"] for info in told["areas"]] == ["a", "b"]
    client.drain_area("b")
    client.resize_area("a", 512 * K)
    words = gcma("area", "list", "--endpoint", client.endpoint)
    assert [line.split()[0] for line in words.splitlines()[:3]] == ["area", "a", "b"]
    assert "drained" in words.splitlines()[2]
    assert "drained" not in words.splitlines()[1]
    assert "in no area: 512 KiB" in words


def test_the_endpoint_from_the_environment(client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCMA_ENDPOINT", client.endpoint)
    assert len(json.loads(gcma("area", "list", "--json"))["areas"]) == 2


def test_the_script(client: EmbeddedClient) -> None:
    script = Path(sys.executable).with_name("gcma")
    if not script.exists():
        pytest.skip("gcma-shm is not installed, only its modules are there")
    done = subprocess.run(
        [script, "area", "drain", "a", "--endpoint", client.endpoint],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert "drained" in done.stdout
    assert area(client, "a").drained


def test_grow_and_shrink_by_command(client: EmbeddedClient) -> None:
    at = ("--endpoint", client.endpoint)
    buffer = client.alloc_contig(PAGE, "a", offset=10)
    swap = fill_until_lent(client, "a")
    told = json.loads(gcma("area", "shrink", "a", "512K", "--json", *at))
    assert told["size"] == 512 * K == area(client, "a").size
    assert gcma("area", "grow", "b", "256K", *at).splitlines()[1].split()[0] == "b"
    assert area(client, "b").size == M + 256 * K
    assert "in no area" in gcma("area", "grow", "a", "512K", *at, status=1)
    assert "in the way" in gcma("area", "shrink", "a", str(512 * K - PAGE), *at, status=1)
    assert area(client, "a").size == 512 * K
    gcma("area", "grow", "a", "1", *at)  # rounded up to a page
    assert area(client, "a").size == 512 * K + PAGE
    buffer.free()
    assert all_there(swap)


@pytest.mark.parametrize("by", ["1M", "2M", "100G"])
def test_no_area_is_shrunk_by_all_that_it_has(client: EmbeddedClient, by: str) -> None:
    words = gcma("area", "shrink", "a", by, "--endpoint", client.endpoint, status=1)
    assert words.startswith("gcma area: ")
    assert area(client, "a").size == M


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["area", "drain", "c"], 1, "no area 'c'"),
        (["area", "resume", "c"], 1, "no area 'c'"),
        (["area", "grow", "c", "1M"], 1, "no area 'c'"),
        (["area", "grow", "a", "much"], 1, "not a size"),
        (["area", "shrink", "a", "0"], 1, "more than zero"),
        (["area", "drain", ""], 1, "expected text"),
        (["area", "drain", "x" * 100], 1, "expected text"),
        (["area", "drain"], 2, "NAME"),
        (["area", "grow", "a"], 2, "BY"),
        (["area", "sell", "a"], 2, "invalid choice"),
        (["quota"], 2, "CLIENT"),
        (["quota", "x"], 2, "invalid int"),
        (["quota", "11"], 1, "no client 11"),
        (["quota", "9999"], 1, "expected an integer"),
        (["quota", "-1"], 1, "expected an integer"),
        (["quota", "2", "much"], 1, "not a size"),
    ],
    ids=lambda words: " ".join(words)[:30] if isinstance(words, list) else None,
)
def test_commands_that_fail_say_why(client: EmbeddedClient, words: list[str], status: int, says: str) -> None:
    said = gcma(*words, "--endpoint", client.endpoint, status=status)
    assert says in said
    assert [info.size for info in client.areas()] == [M, M]
    assert not any(info.drained for info in client.areas())


def test_nobody_listens() -> None:
    endpoint = f"ipc://{os.environ['XDG_RUNTIME_DIR']}/nobody/broker"
    for words in (["area", "list"], ["area", "drain", "a"], ["quota", "2"]):
        assert "no broker" in gcma(*words, "--endpoint", endpoint, status=1)
    assert gcma("area", "list", "--endpoint", "nonsense", status=1).startswith("gcma area: ")


def test_commands_leave_no_client(client: EmbeddedClient) -> None:
    gcma("area", "list", "--endpoint", client.endpoint)
    gcma("area", "drain", "nowhere", "--endpoint", client.endpoint, status=1)
    assert eventually(lambda: client.stats()["broker"]["clients"] == 1)


# --- quotas


def test_a_default_quota() -> None:
    with gcma_shm.embedded("4M", areas={"a": "1M"}, quota="64K") as client:
        assert client.quota() == gcma_shm.QuotaInfo(0, 64 * K)
        buffer = client.alloc_contig(60 * K)
        for ask in (client.alloc_contig, client.reserve):
            with pytest.raises(QuotaExceeded, match="64 KiB"):
                ask(8 * K)
        with gcma_shm.connect(client.endpoint) as other:
            assert other.quota().quota == 64 * K, "each client's own"
            with other.alloc_contig(64 * K):
                assert other.quota().held == 64 * K
            assert other.quota(M).quota == M
            with other.alloc_contig(128 * K):
                pass
            assert client.quota(client=other.number).quota == M
            number = other.number
        assert client.quota().quota == 64 * K
        with gcma_shm.connect(client.endpoint) as other:
            if other.number == number:
                assert other.quota().quota == 64 * K, "whoever had the number before"
        assert client.quota(0).quota is None, "no bound"
        client.alloc_contig(900 * K).free()
        assert client.quota(PAGE).held == 60 * K, "less than it holds: it keeps that"
        with pytest.raises(QuotaExceeded):
            client.alloc_contig(1)
        buffer.free()
        client.alloc_contig(1).free()


def test_quota_misuse(client: EmbeddedClient) -> None:
    for wrong in ({"nbytes": -1}, {"client": 9999}, {"client": -1}):
        with pytest.raises(ValueError):
            client.quota(**wrong)
    odd: list[dict[str, Any]] = [{"nbytes": 1.5}, {"nbytes": b"1M"}, {"client": 1.5}, {"client": "2"}]
    for wrong_type in odd:
        with pytest.raises(TypeError):
            client.quota(**wrong_type)
    assert client.quota().quota is None


def test_quota_by_command(client: EmbeddedClient) -> None:
    number, at = str(client.number), ("--endpoint", client.endpoint)
    buffer = client.alloc_contig(64 * K)
    assert gcma("quota", number, *at) == f"client {number} holds 64 KiB without bound\n"
    assert gcma("quota", number, "128K", *at) == f"client {number} holds 64 KiB of 128 KiB\n"
    assert json.loads(gcma("quota", number, "--json", *at)) == {
        "client": client.number,
        "held": 64 * K,
        "quota": 128 * K,
    }
    with pytest.raises(QuotaExceeded):
        client.alloc_contig(68 * K)
    gcma("quota", number, "none", *at)
    client.alloc_contig(68 * K).free()
    assert client.quota().quota is None
    buffer.free()


# --- what is no area


MALFORMED: list[tuple[Any, str]] = [
    ("1M,cache=maybe", "cache=maybe"),
    ("1M,cache", "cache"),
    ("1M,cache=", "cache="),
    ("1M,share=0", "share of 0"),
    ("1M,share=101", "share of 101"),
    ("1M,share=half", "share=half"),
    ("1M,share=-5", "share=-5"),
    ("1M,align=3000", "power of two"),
    ("1M,align=", "align="),
    ("1M,align=big", "not a size"),
    ("1M,colour=red", "colour=red"),
    ("1M,share=50,share=60", "twice"),
    ("1M,", "option"),
    (",cache=off", "not a size"),
    ("", "not a size"),
    ("much", "not a size"),
    ("0", "more than zero"),
    ("-1M", "not a size"),
]


@pytest.mark.parametrize(("spec", "says"), MALFORMED)
def test_malformed_specs(spec: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        gcma_shm.embedded("4M", areas={"x": spec})
    endpoint = f"ipc://{os.environ['XDG_RUNTIME_DIR']}/b/broker"
    done = subprocess.run(
        broker_command(endpoint, "--size", "4M", "--area", f"x={spec}"),
        capture_output=True,
        text=True,
        cwd="/",
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("spec", [0, -5])
def test_sizes_that_are_none(spec: int) -> None:
    with pytest.raises(ValueError, match="more than zero"):
        gcma_shm.embedded("4M", areas={"x": spec})


@pytest.mark.parametrize("spec", [1.5, None, b"1M", ["1M"]])
def test_specs_of_another_type(spec: Any) -> None:
    with pytest.raises(TypeError):
        gcma_shm.embedded("4M", areas={"x": spec})


@pytest.mark.parametrize("name", ["", "a=b", "x" * 49, "a\nb"])
def test_malformed_names(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        gcma_shm.embedded("4M", areas={name: "1M"})


def test_a_name_given_twice_by_command() -> None:
    done = subprocess.run(
        broker_command("ipc:///tmp/nowhere", "--size", "4M", "--area", "x=1M", "--area", "x=1M"),
        capture_output=True,
        text=True,
        cwd="/",
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 2
    assert "each name once" in done.stderr
    assert done.stderr.startswith("usage: gcma broker ")


@pytest.mark.parametrize(
    "spec", [{"size": 0}, {"size": M, "align": 3}, {"size": M, "share": 0}, {"size": M, "share": 101}]
)
def test_malformed_objects(spec: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        AreaSpec(**spec)  # type: ignore[arg-type] # cache is not among them
