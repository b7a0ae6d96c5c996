"""What a key gives a right to, and the file that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from zmq.utils import z85

from gcma_shm import messages
from gcma_shm.broker import rights
from gcma_shm.broker.admission import Admission
from gcma_shm.broker.rights import LOCAL, Rights, Sender, parse_authorized
from gcma_shm.errors import Forbidden
from tests.test_messages import SOUND

KEY = "#" * 40  # every character of Z85 may come first, also that of a comment
OTHER = "a" * 40


def allowed(given_rights: Rights, operation: str, parameters: dict[str, Any] | None = None) -> bool:
    try:
        given_rights.check(operation, SOUND[operation] if parameters is None else parameters)
    except Forbidden:
        return False
    return True


def test_each_operation_is_of_one_kind() -> None:
    kinds = (rights.ALWAYS, rights.ON_TYPES, rights.ALLOCATION, rights.ADMIN, rights.QUOTA)
    assert sorted(name for kind in kinds for name in kind) == sorted(messages.OPERATIONS)


@pytest.mark.parametrize("operation", sorted(messages.OPERATIONS))
def test_a_process_of_this_user_may_do_everything(operation: str) -> None:
    assert allowed(LOCAL, operation)


def test_a_line_without_options() -> None:
    (given_rights,) = parse_authorized(f"worker-7 {KEY}\n").values()
    refused = {name for name in messages.OPERATIONS if not allowed(given_rights, name)}
    assert refused == {"area_drain", "area_resume", "area_resize", "quota"}, "nobody administers from afar unasked"
    assert allowed(given_rights, "quota", {}), "one's own may be read"
    assert not allowed(given_rights, "quota", {"nbytes": 0})
    assert not allowed(given_rights, "quota", {"client": 2})


def test_types() -> None:
    (given_rights,) = parse_authorized(f"w {KEY} types=3,7-9").values()
    for operation in rights.ON_TYPES:
        for type_ in range(256):
            may = allowed(given_rights, operation, SOUND[operation] | {"type": type_})
            assert may is (type_ in {3, 7, 8, 9}), (operation, type_)
    (none,) = parse_authorized(f"w {KEY} types=none").values()
    assert not any(allowed(none, operation) for operation in rights.ON_TYPES)


def test_no_allocation() -> None:
    (given_rights,) = parse_authorized(f"w {KEY} alloc=no").values()
    assert not any(allowed(given_rights, operation) for operation in rights.ALLOCATION)
    assert all(allowed(given_rights, operation) for operation in rights.ON_TYPES)


def test_admin() -> None:
    (given_rights,) = parse_authorized(f"ops {KEY} admin=yes types=none alloc=no").values()
    assert all(allowed(given_rights, operation) for operation in rights.ADMIN | rights.QUOTA)
    assert not allowed(given_rights, "load")


def test_comments_and_several_lines() -> None:
    text = f"# who may come\n\n  a {KEY} types=0 \n#b {OTHER}\n\tc\t{OTHER}\talloc=no\n"
    found = parse_authorized(text)
    assert {key: one.name for key, one in found.items()} == {KEY: "a", OTHER: "c"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a", "expected NAME KEY"),
        (OTHER, "expected NAME KEY"),
        (f"a {KEY[:-1]}", "expected NAME KEY"),
        (f"a {KEY[:-1]}é", "expected NAME KEY"),
        (f"a/b {KEY}", "expected NAME KEY"),
        (f"a {KEY} types", "types="),
        (f"a {KEY} colour=red", "types="),
        (f"a {KEY} alloc=no alloc=yes", "each once"),
        (f"a {KEY} alloc=maybe", "yes or no"),
        (f"a {KEY} types=", "numbers from 0 to 255"),
        (f"a {KEY} types=256", "numbers from 0 to 255"),
        (f"a {KEY} types=-1", "numbers from 0 to 255"),
        (f"a {KEY} types=1,,2", "numbers from 0 to 255"),
        (f"a {KEY} types=²", "numbers from 0 to 255"),
        (f"a {KEY} types=9-7", "ends before"),
        (f"a {KEY}\nb {KEY}", "line 2: this key"),
    ],
)
def test_lines_that_are_none(line: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"line [12]") as raised:
        parse_authorized(line)
    assert words in str(raised.value)


@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from("aA#=,-\n "), max_size=200))
def test_any_text_is_rights_or_a_value_error(text: str) -> None:
    try:
        found = parse_authorized(text)
    except ValueError as error:
        assert "line" in str(error)  # noqa: PT017 - one of two right answers
        return
    assert all(isinstance(one, Rights) for one in found.values())


def test_there_may_be_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rights, "AUTHORIZED_MAX", 1)
    with pytest.raises(ValueError, match="more than 1"):
        parse_authorized(f"a {KEY}\nb {OTHER}")


def test_a_file_that_others_may_write_is_none(tmp_path: Path) -> None:
    file = tmp_path / "authorized"
    file.write_text(f"a {KEY}\n")
    file.chmod(0o622)
    with zmq.Context() as context, pytest.raises(ValueError, match="others may write"):
        Admission(context, file)
    with zmq.Context() as context, pytest.raises(FileNotFoundError):
        Admission(context, tmp_path / "nowhere")
    file.chmod(0o644)
    with zmq.Context() as context:
        admission = Admission(context, file)
        assert admission.rights(Sender(remote=True, key=KEY)) == Rights("a")
        assert admission.rights(Sender(remote=True, key=OTHER)) is None
        assert admission.rights(Sender(remote=True)) is None
        admission.close()


def test_the_log_tells_who_came_from_where(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    known, other = "0" * 40, "1" * 40
    file = tmp_path / "authorized"
    file.write_text(f"a {known}\n")
    file.chmod(0o600)
    with zmq.Context() as context:
        admission = Admission(context, file)
        for key, status in ((known, b"200"), (other, b"400")):
            question = [b"1.0", b"1", b"gcma", b"127.0.0.1", b"", b"CURVE", z85.decode(key)]
            assert admission._answer(question)[2] == status
        admission.close()
    assert caplog.messages == [
        f"{file}: 1 key",
        "a is let in from 127.0.0.1",
        f"not let in: 1 since the last such line, now 127.0.0.1 with key {other}",
    ]


def test_without_keys_nobody_administers(tmp_path: Path) -> None:
    with zmq.Context() as context:
        admission = Admission(context, None)
        given_rights = admission.rights(Sender(remote=True))
        admission.close()
    assert given_rights is not None
    assert allowed(given_rights, "store")
    assert not any(allowed(given_rights, operation) for operation in rights.ADMIN | rights.ALLOCATION)
