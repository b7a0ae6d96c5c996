"""Messages there and back, and whatever a peer may send instead."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gcma_shm import errors, messages
from gcma_shm.errors import ProtocolError
from gcma_shm.messages import OPERATIONS, Reply, Request

PAGE = 4096
SOUND: dict[str, dict[str, Any]] = {
    "hello": {
        "pid": 1,
        "start": 0,
        "pidns": 4026531836,
        "made": 7,
        "generation": 3,
        "mapped": True,
        "client": 2,
        "arena_id": bytes(16),
        "buffers": [1, 2],
        "claims": [3],
    },
    "bye": {},
    "ping": {},
    "swap_init": {"type": 0, "slots": 1, "write": "behind", "share": 100},
    "sync": {"type": 255, "life": 1, "timeout_ms": 0},
    "store": {"type": 0, "life": 1, "offset": 0},
    "load": {"type": 0, "life": 1, "offset": 2**40},
    "store_many": {"type": 0, "life": 1, "offsets": bytes(8)},
    "load_many": {"type": 0, "life": 1, "offsets": b"\xff" * 8, "receipt": 2**63 - 1},
    "invalidate_page": {"type": 0, "life": 1, "offset": 0},
    "contains": {"type": 0, "life": 1, "offset": 0},
    "count": {"type": 0, "life": 2**63 - 1},
    "invalidate_area": {"type": 0, "life": 1},
    "alloc_contig": {"nbytes": 1, "area": "a", "offset": 0, "align": 1, "name": "n", "timeout_ms": 0},
    "reserve": {"nbytes": 2**62, "area": "a", "offset": 2**62, "align": 2**62, "name": "é" * 24, "timeout_ms": 2**40},
    "collect": {"ticket": 1, "give_up": True},
    "free_contig": {"buffer": 1},
    "attach": {"buffer": 1, "claim": 1, "token": 2**63 - 1},
    "attach_name": {"name": "n"},
    "hand_over": {"buffer": 1, "claim": 1, "timeout_ms": 0, "after_end_ms": 0},
    "free_claim": {"buffer": 1, "claim": 1},
    "keep": {"buffer": 1, "name": "n", "pid": 1, "start": 0},
    "unlink": {"name": "n", "buffer": 1},
    "names": {"after": "n"},
    "quota": {"client": 2, "nbytes": 0, "arena_id": bytes(16)},
    "area_drain": {"area": "a", "arena_id": bytes(16)},
    "area_resume": {"area": "a", "arena_id": bytes(16)},
    "area_resize": {"area": "a", "nbytes": 1, "by": -(2**62), "arena_id": bytes(16)},
    "areas": {"arena_id": bytes(16)},
    "stats": {},
}


def header(*parts: object) -> bytes:
    packed = msgpack.packb(list(parts))
    assert packed is not None
    return packed


def frames_of(name: str, change: dict[str, Any] | None = None) -> list[messages.Frame]:
    return messages.encode_request(
        Request(1, name, SOUND[name] | (change or {}), [bytes(PAGE)] * OPERATIONS[name].pages)
    )


def test_every_operation_has_a_sound_example() -> None:
    assert set(SOUND) == set(OPERATIONS)
    for name, parameters in SOUND.items():
        assert set(parameters) == set(OPERATIONS[name].parameters)


@pytest.mark.parametrize("name", sorted(SOUND))
def test_requests_there_and_back(name: str) -> None:
    request = Request(77, name, SOUND[name], [b"p" * PAGE] * OPERATIONS[name].pages)
    frames = messages.encode_request(request)
    assert messages.decode_request(frames, PAGE) == request
    assert messages.decode_request([memoryview(frame) for frame in frames], PAGE) == request
    required = {key: value for key, value in SOUND[name].items() if OPERATIONS[name].parameters[key].required}
    short = Request(messages.NUMBER_MAX, name, required, request.pages)
    assert messages.decode_request(messages.encode_request(short), PAGE) == short


@pytest.mark.parametrize(
    "reply", [Reply(0, "ok", {}), Reply(5, "ok", {"hit": True}, [b"p" * PAGE]), Reply(6, "Closed", {"message": "m"})]
)
def test_replies_there_and_back(reply: Reply) -> None:
    back = messages.decode_reply(messages.encode_reply(reply))
    assert (back.number, back.status, back.results, list(back.pages)) == (
        reply.number,
        reply.status,
        reply.results,
        list(reply.pages),
    )


@pytest.mark.parametrize("name", sorted(SOUND))
def test_a_required_parameter_that_is_missing_and_one_that_is_unknown(name: str) -> None:
    for key in [key for key in SOUND[name] if OPERATIONS[name].parameters[key].required]:
        less = {k: v for k, v in SOUND[name].items() if k != key}
        with pytest.raises(ProtocolError, match=key):
            messages.decode_request([header(1, 1, name, less), *[bytes(PAGE)] * OPERATIONS[name].pages], PAGE)
    with pytest.raises(ProtocolError, match="colour"):
        messages.decode_request(frames_of(name, {"colour": 1}), PAGE)


WRONG: dict[str, list[Any]] = {
    "integer": [-1, 2**63, True, 1.0, "1", None, b"1", [1], {}],
    "text": ["", "x" * 49, "é" * 25, 1, None, b"a", ["a"]],
    "a boolean": [0, 1, None, "true"],
    "'through' or 'behind'": ["", "back", 1, None, ["through"]],
    "16 bytes": [b"", bytes(15), bytes(17), "x" * 16, 1, None],
    "the offsets": [b"", bytes(7), bytes(9), bytearray(8), "x" * 8, 1, [1], None, True],
    "a list": [1, "1", [True], [-1], [1.0], [[]], {"1": 1}, None],
}


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, operation in OPERATIONS.items() for key in operation.parameters]
)
def test_parameters_of_another_kind(name: str, key: str) -> None:
    expected = OPERATIONS[name].parameters[key].expected
    (kind,) = [kind for kind in WRONG if kind in expected]
    for value in WRONG[kind]:
        if (key, value) == ("by", -1):
            continue  # a difference, which may be less than zero
        if isinstance(value, bytearray):
            value = list(value)  # noqa: PLW2901 - msgpack has one kind of bytes
        with pytest.raises(ProtocolError, match=key):
            messages.decode_request(frames_of(name, {key: value}), PAGE)


@pytest.mark.parametrize("name", sorted(SOUND))
def test_page_frames_that_do_not_fit(name: str) -> None:
    (head, *pages) = frames_of(name)
    for wrong in ([*pages, bytes(PAGE)], pages[1:] if pages else [b""], [bytes(PAGE - 1)], [bytes(PAGE + 1)], [b""]):
        with pytest.raises(ProtocolError):
            messages.decode_request([head, *wrong], PAGE)


@pytest.mark.parametrize("page_size", [4096, 1 << 16, 1 << 18, 1 << 20])
def test_batches_of_every_length(page_size: int) -> None:
    """As many pages as there are offsets, in one frame, and no more than the bound."""
    batch = messages.batch_max(page_size)
    assert batch >= 1
    assert batch == 1 or batch * page_size <= messages.BATCH_BYTES
    assert max(batch * page_size, page_size) <= max(messages.HEADER_BYTES_MAX, page_size), (
        "a frame that ends its connection"
    )
    for count in {1, 2, batch, batch + 1}:
        offsets = [n * 2**55 + 7 for n in range(count)]
        packed = messages.pack_offsets(offsets)
        assert packed[:8] == (7).to_bytes(8, "little")
        assert list(messages.unpack_offsets(packed)) == offsets
        slot = {"type": 1, "life": 1, "offsets": packed}
        for name, pages in (("store_many", [bytes(count * page_size)]), ("load_many", [])):
            frames = messages.encode_request(Request(5, name, slot, pages))
            if count > batch:
                with pytest.raises(ProtocolError, match=f"at most {batch}"):
                    messages.decode_request(frames, page_size)
                continue
            assert messages.decode_request(frames, page_size).parameters == slot
            for wrong in ([*pages, b""], pages[1:] if pages else [bytes(page_size)], [bytes(count * page_size + 1)]):
                with pytest.raises(ProtocolError):
                    messages.decode_request([frames[0], *wrong], page_size)
        if count > 1:  # each page in a frame of its own
            with pytest.raises(ProtocolError):
                messages.decode_request(
                    messages.encode_request(Request(5, "store_many", slot, [bytes(page_size)] * count)), page_size
                )


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"\xc1"],
        [header()],
        [header(1, 1, "ping", {}) + b"\0"],
        [header(1, 1, "ping", {})[:-1]],
        [header(1, 1, "ping")],
        [header(1, 1, "ping", {}, 1)],
        [header(2, 1, "ping", {})],
        [header(True, 1, "ping", {})],
        [header(1.0, 1, "ping", {})],
        [header("1", 1, "ping", {})],
        [header(1, -1, "ping", {})],
        [header(1, 2**63, "ping", {})],
        [header(1, True, "ping", {})],
        [header(1, 1, b"ping", {})],
        [header(1, 1, "ping", [])],
        [header(1, 1, "pong", {})],
        [header(1, 1, "ping", {1: 2})],
        [msgpack.packb({"version": 1})],
        [msgpack.packb(msgpack.Timestamp(1, 1))],
        [msgpack.packb([1, 1, "ping", {"a": msgpack.ExtType(5, b"x")}])],
        [b"\x91" * 5000],
        [b"\xdd\xff\xff\xff\xff"],
        [b"\xdf\xff\xff\xff\xff"],
        [b"\xc6\xff\xff\xff\xff"],
        [b"\x94\x01\x01\xa1\xff\x80"],
        [bytes(messages.HEADER_BYTES_MAX + 1)],
    ],
)
def test_headers_of_another_shape(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        messages.decode_request(frames, PAGE)


@pytest.mark.parametrize(
    ("frames", "number"),
    [
        ([header(1, 9, "pong", {"x": 1}), b"", b""], 9),
        ([header(1, 9, "load", {})], 9),
        ([header(1, 9, "ping", {}), b"page"], 9),
        ([header(2, 9, "ping", {})], 9),
        ([header(2, 9, "ping", {}, "of", "tomorrow")], 9),
        ([header(1, 9, 5, 5)], 9),
        ([header(1, True, "ping", {})], None),
        ([header(1, 2**63, "ping", {})], None),
        ([b"junk"], None),
        ([], None),
    ],
)
def test_the_number_of_a_request_that_is_wrong_otherwise(frames: list[bytes], number: int | None) -> None:
    """So that its sender can be told."""
    with pytest.raises(messages.Malformed) as raised:
        messages.decode_request(frames, PAGE)
    assert raised.value.number == number


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10) | st.integers(0, 9), inner, max_size=5)
    ),
    max_leaves=20,
)
names = st.sampled_from(sorted(OPERATIONS)) | st.text(max_size=10)
keys = st.sampled_from(sorted({key for operation in OPERATIONS.values() for key in operation.parameters})) | st.text(
    max_size=5
)
values = anything | st.integers(0, 300) | st.sampled_from(["through", "behind", "default"])
nearly = st.builds(
    header,
    st.just(1) | values,
    st.integers(0, 2**63) | values,
    names | values,
    st.dictionaries(keys, values, max_size=5) | values,
)
sizes = st.sampled_from([0, 1, PAGE - 1, PAGE, PAGE + 1])


@settings(max_examples=600, deadline=None)
@given(first=st.binary(max_size=300) | anything.map(header) | nearly, pages=st.lists(sizes, max_size=3))
@example(first=header(1, 1, "store", SOUND["store"]), pages=[PAGE])
def test_any_bytes_are_a_request_or_a_protocol_error(first: bytes, pages: list[int]) -> None:
    frames: list[messages.Frame] = [first, *map(bytes, pages)]
    try:
        request = messages.decode_request(frames, PAGE)
    except messages.Malformed as error:
        assert error.number is None or 0 <= error.number <= messages.NUMBER_MAX  # noqa: PT017 - one of several right answers
        assert len(str(error)) < 1000, "an error that quotes its peer at length"  # noqa: PT017 - one of several right answers
        return
    assert isinstance(request, Request)
    assert 0 <= request.number <= messages.NUMBER_MAX
    assert set(request.parameters) <= set(OPERATIONS[request.operation].parameters)
    assert messages.decode_request(messages.encode_request(request), PAGE) == request


@settings(max_examples=300, deadline=None)
@given(frames=st.lists(st.binary(max_size=100) | anything.map(header) | nearly, max_size=3))
def test_any_bytes_are_a_reply_or_a_protocol_error(frames: list[messages.Frame]) -> None:
    try:
        reply = messages.decode_reply(frames)
    except ProtocolError:
        return
    assert isinstance(reply, Reply)


# --- errors

EXAMPLES: list[Exception] = [
    errors.ArenaError("no"),
    errors.ArenaError(28, "too little"),
    errors.ArenaExhausted("none", 8192, 4096, {2: 100, 3: 5}),
    errors.BrokerUnavailable("late"),
    errors.BufferExists("taken"),
    errors.Closed("closed"),
    errors.Forbidden("no right"),
    errors.GcmaError("something"),
    errors.NoSuchArea("area"),
    errors.NoSuchBuffer("buffer"),
    errors.NoSuchType("type"),
    errors.NurseryFull("full"),
    errors.ProtocolError("what"),
    errors.QuotaExceeded("much"),
    errors.SlotBusy("busy"),
    errors.SpillCorrupt(0, "bad page", False),
    errors.SpillError(28, "no space", True),
    errors.SpillError(5, "broken", False),
    errors.StaleHandle("late"),
    IndexError("offset"),
    TypeError("type"),
    ValueError("value"),
]


def test_each_error_has_an_example() -> None:
    assert {type(error).__name__ for error in EXAMPLES} >= set(errors.__all__) - {"GcmaError"}


@pytest.mark.parametrize(
    "error", [e for e in EXAMPLES if type(e) is not errors.GcmaError], ids=lambda error: type(error).__name__
)
def test_errors_there_and_back(error: Exception) -> None:
    reply = messages.decode_reply(messages.encode_reply(messages.error_reply(9, error)))
    assert reply.number == 9
    assert reply.status == type(error).__name__
    back = messages.reply_error(reply)
    assert type(back) is type(error)
    assert str(back) == str(error)
    for attribute in ("errno", "strerror", "stored", "requested", "largest_free", "holders"):
        assert getattr(back, attribute, None) == getattr(error, attribute, None)


@pytest.mark.parametrize("error", [errors.SpillError(28, "no space", True), IndexError("offset"), errors.Closed("x")])
def test_an_error_of_a_batch_tells_how_far_it_came(error: Exception) -> None:
    assert "done" not in messages.error_reply(9, error).results
    error.done = 7  # type: ignore[attr-defined] # plain errors take the attribute as well
    reply = messages.decode_reply(messages.encode_reply(messages.error_reply(9, error)))
    assert reply.results["done"] == 7
    assert messages.reply_error(reply).done == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (messages.Malformed("x", 3), "ProtocolError"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "x"), "ValueError"),
        (KeyError("x"), "GcmaError"),
        (OverflowError("x"), "GcmaError"),
        (AssertionError("x"), "GcmaError"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_any_other_error_travels_as_what_peers_know(error: Exception, status: str) -> None:
    reply = messages.error_reply(1, error)
    assert reply.status == status
    assert str(error) in str(reply.results["message"])
    assert isinstance(messages.reply_error(reply), Exception)


def test_a_status_of_a_later_release_is_an_error_all_the_same() -> None:
    back = messages.reply_error(Reply(1, "TooTired", {"message": "after lunch"}))
    assert isinstance(back, ProtocolError)
    assert "TooTired" in str(back)
    assert "after lunch" in str(back)
