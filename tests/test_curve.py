"""Key files, endpoints over TCP, and what `gcma broker` asks for before it listens there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import zmq.auth

import gcma_shm
from gcma_shm import curve, endpoint
from gcma_shm.broker.door import Doorway
from gcma_shm.broker.keys import keygen
from gcma_shm.errors import ArenaError
from tests.processes import WAIT_S, broker_command


def gcma(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gcma_shm.broker.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, cwd="/")


def test_keygen(tmp_path: Path) -> None:
    done = gcma("keygen", str(tmp_path / "keys"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    files = {path.name: path for path in (tmp_path / "keys").iterdir()}
    assert set(files) == {"server.key", "server.key_secret", "client.key", "client.key_secret"}
    for line in done.stdout.splitlines():
        name, public = line.split()
        assert curve.is_key(public)
        pair = curve.load_pair(files[f"{name}.key_secret"])
        assert pair.public == public == curve.load_public(files[f"{name}.key"]) == curve.load_public(public)
        assert zmq.curve_public(pair.secret.encode()).decode() == public
        assert zmq.auth.load_certificate(files[f"{name}.key_secret"]) == (public.encode(), pair.secret.encode())
        assert pair.secret not in repr(pair)
        assert pair.secret not in files[f"{name}.key"].read_text()
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {0o600}


def test_keygen_never_writes_over_a_file(tmp_path: Path) -> None:
    keygen(tmp_path, ["client"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    again = gcma("keygen", str(tmp_path))
    assert again.returncode == 1
    assert again.stderr == f"gcma keygen: {tmp_path}/client.key_secret: exists; never written over\n"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before, "nor leaves half of what it was to make"
    (tmp_path / "bob.key").symlink_to(tmp_path / "elsewhere")
    assert gcma("keygen", str(tmp_path), "bob").returncode == 1
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "bob.key_secret").exists()
    assert gcma("keygen", str(tmp_path), "alice").stdout.startswith("alice ")


@pytest.mark.parametrize("name", ["../x", "a/b", "a b", "\n", "."])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises((ValueError, OSError)):
        keygen(tmp_path / "keys", [name, "second"])
    assert not list((tmp_path / "keys").glob("second*"))


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    keygen(tmp_path, ["client"])
    secret = tmp_path / "client.key_secret"
    secret.chmod(0o640)
    with pytest.raises(ArenaError, match="chmod 600"):
        curve.load_pair(secret)
    secret.chmod(0o600)
    with pytest.raises(ValueError, match="no secret"):
        curve.load_pair(tmp_path / "client.key")


def test_files_that_hold_no_key(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for content in (
        b"",
        b"\xff\xfe",
        b'public-key = "short"',
        b'public-key = "' + b"\xff" * 40 + b'"',
        b"x" * (1 << 17),
    ):
        file.write_bytes(content)
        file.chmod(0o600)
        with pytest.raises(ValueError):
            curve.load_public(file)
    for missing in ("nowhere", "x" * 39, "/"):
        with pytest.raises(FileNotFoundError):
            curve.load_public(missing)


def test_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public = keygen(tmp_path, ["client", "server"])
    tcp, secret = "tcp://192.0.2.1:7", str(tmp_path / "client.key_secret")
    assert curve.credentials_of("ipc:///x", None, None) is None
    assert curve.credentials_of("tcp://127.0.0.1:7", None, None) is None, "a broker with --insecure"
    for curve_key, server_key, words in (
        (None, None, "curve_key"),
        (secret, None, "server_key"),
        (None, public["server"], "curve_key"),
    ):
        with pytest.raises(ValueError, match=words):
            curve.credentials_of(tcp, curve_key, server_key)
    given = curve.credentials_of(tcp, secret, tmp_path / "server.key")
    assert given is not None
    assert (given.pair.public, given.server) == (public["client"], public["server"])
    monkeypatch.setenv("GCMA_CURVE_KEY", secret)
    monkeypatch.setenv("GCMA_SERVER_KEY", public["server"])
    assert curve.credentials_of(tcp, None, None) == given
    with pytest.raises(ValueError, match="no server_key"):
        monkeypatch.delenv("GCMA_SERVER_KEY")
        gcma_shm.connect(tcp)


def test_over_tcp_nobody_maps() -> None:
    with pytest.raises(ValueError, match="maps nothing"):
        gcma_shm.connect("tcp://127.0.0.1:7", mapped=True)


@pytest.mark.parametrize(
    ("text", "address", "loopback"),
    [
        ("tcp://127.0.0.1:5", ("127.0.0.1", 5), True),
        ("tcp://127.9.9.9:*", ("127.9.9.9", 0), True),
        ("tcp://[::1]:65535", ("[::1]", 65535), True),
        ("tcp://0.0.0.0:5", ("0.0.0.0", 5), False),
        ("tcp://*:5", ("*", 5), False),
        ("tcp://localhost:5", ("localhost", 5), False),
        ("tcp://eth0:0", ("eth0", 0), False),
        ("tcp://192.0.2.1:5", ("192.0.2.1", 5), False),
    ],
)
def test_addresses(text: str, address: tuple[str, int], loopback: bool) -> None:
    assert endpoint.is_tcp(text)
    assert endpoint.tcp_address(text) == address
    assert endpoint.is_loopback(text) is loopback


@pytest.mark.parametrize(
    "wrong",
    ["tcp://", "tcp://:5", "tcp://a", "tcp://a:", "tcp://a:b", "tcp://a:65536", "tcp://a:-1", "tcp://::1:5", "tcp://a:5;b:6", "tcp://a/:5",
     "tcp://a:²", "udp://a:5", "ipc:///x"],
)  # fmt: skip
def test_what_is_no_address(wrong: str) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        endpoint.tcp_address(wrong)


def test_the_arena_of_a_tcp_endpoint_follows_from_its_text() -> None:
    names = {endpoint.arena_name(text) for text in ("tcp://127.0.0.1:5", "tcp://127.0.0.1:6", "ipc:///127.0.0.1:5")}
    assert len(names) == 3
    assert endpoint.arena_name("tcp://127.0.0.1:5") in names
    with pytest.raises(ValueError, match="expected a port"):
        endpoint.arena_name("tcp://127.0.0.1:*")


KEYS = Doorway(curve_key=Path("k"), authorized=Path("a"))


@pytest.mark.parametrize(
    ("where", "doorway", "words"),
    [
        ("tcp://127.0.0.1:5", Doorway(), "open to anybody"),
        ("ipc:///x", Doorway(("tcp://127.0.0.1:5",)), "open to anybody"),
        ("ipc:///x", Doorway(("tcp://0.0.0.0:5",), insecure=True), "no loopback"),
        ("tcp://localhost:5", Doorway(insecure=True), "no loopback"),
        ("ipc:///x", Doorway(("tcp://127.0.0.1:5", "tcp://*:5"), insecure=True), "no loopback"),
        ("ipc:///x", Doorway(curve_key=Path("k")), "needs both"),
        ("ipc:///x", Doorway(authorized=Path("a")), "needs both"),
        ("ipc:///x", replace(KEYS, insecure=True), "either"),
        ("ipc:///x", replace(KEYS, listen=("ipc:///y",)), "tcp://"),
    ],
)  # fmt: skip
def test_nobody_is_let_in_without_a_key(where: str, doorway: Doorway, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        doorway.check(where)


def test_who_is_let_in() -> None:
    Doorway().check("ipc:///x")
    Doorway(insecure=True).check("tcp://127.0.0.1:5")
    Doorway(("tcp://[::1]:0",), insecure=True).check("ipc:///x")
    replace(KEYS, listen=("tcp://*:5",)).check("tcp://0.0.0.0:6")


@pytest.mark.parametrize(
    "options",
    [
        ["--endpoint", "tcp://127.0.0.1:5"],
        ["--listen", "tcp://127.0.0.1:5"],
        ["--listen", "tcp://0.0.0.0:5", "--insecure"],
        ["--endpoint", "tcp://127.0.0.1:0", "--insecure"],
        ["--listen", "tcp://127.0.0.1:5", "--curve-key", "/nowhere", "--authorized", "/nowhere"],
    ],
)
def test_the_command_refuses_too(options: list[str]) -> None:
    endpoint_ = f"ipc://{endpoint.runtime_dir()}/b"
    refused = subprocess.run(
        broker_command(endpoint_, "--size", "4M", *options),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
        cwd="/",
    )
    assert refused.returncode in (1, 2)
    assert any(words in refused.stderr for words in ("open to anybody", "loopback", "expected a port", "/nowhere")), (
        refused.stderr
    )
    assert "Traceback" not in refused.stderr
    assert refused.stdout == ""
