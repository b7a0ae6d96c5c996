"""Any bytes in any frames: a typed reply, or silence; never a crash, a leak, or a stall of others. The coverage-guided form is in tests/fuzz/."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gcma_shm
from gcma_shm import errors, messages
from gcma_shm.messages import OPERATIONS, Malformed, Request
from tests.processes import WAIT_S, Broker, broker, descriptors, eventually
from tests.test_messages import PAGE, SOUND
from tests.zmtp import Raw, frame, hello

pytestmark = pytest.mark.timeout(600)
TYPED = {*errors.__all__, "ok", "HelloNeeded", "IndexError", "ValueError", "TypeError"} - {"GcmaError"}

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=9) | st.integers(-(2**63), 2**63), inner, max_size=4)
    ),
    max_leaves=10,
)
BOUNDS = [0, 1, 2, 7, 255, 256, 4095, 4096, 2**31, 2**40, 2**62, 2**63 - 1]
values = st.sampled_from([*BOUNDS, True, "default", "n", "through", "behind", bytes(16), [1, 2]]) | anything


def _bytes_wanted(name: str, parameters: dict[str, Any]) -> int:
    """How long the page frame has to be, as far as the offsets can be counted."""
    offsets = parameters.get("offsets") if OPERATIONS[name].batch else bytes(messages.OFFSET_BYTES)
    if not isinstance(offsets, bytes):
        return PAGE
    return PAGE * max(len(offsets) // messages.OFFSET_BYTES, 1)


def _repeated(filling: bytes, size: int) -> bytes:
    return (filling * (size // len(filling) + 1))[:size]


FILLINGS = (b"fuzz-pages", bytes(range(251)), b"\7", bytes(1))  # pages of no pattern, of one, and of zeros
OPEN_TO_ALL = 201  # a type of ten slots, for pages of strangers


@st.composite
def nearly(draw: st.DrawFn) -> list[bytes]:
    """A request as it should be, but for something: a parameter that is missing, changed or unknown, other pages, bytes cut off, flipped
    or added, a header of another shape.
    """
    name = draw(st.sampled_from(sorted(OPERATIONS)) | st.sampled_from(["store", "load", "store_many", "load_many"]))
    parameters: dict[str, Any] = dict(SOUND[name])
    if "offset" in parameters or "offsets" in parameters:
        parameters["type"] = OPEN_TO_ALL
    if OPERATIONS[name].pages and draw(st.booleans()):  # as it should be: pages are stored
        sound = msgpack.packb([1, draw(st.integers(0, 99)), name, parameters]) or b""
        return [sound, _repeated(draw(st.sampled_from(FILLINGS)), _bytes_wanted(name, parameters))]
    for key in draw(st.lists(st.sampled_from([*parameters, "colour"]), max_size=3)):
        if key == "offsets" and draw(st.booleans()):
            parameters[key] = messages.pack_offsets(draw(st.lists(st.integers(0, 9), min_size=1, max_size=8)))
        elif draw(st.booleans()):
            parameters[key] = draw(values)
        else:
            parameters.pop(key, None)
    header: list[Any] = [1, draw(st.integers(0, 99)), name, parameters]
    if draw(st.integers(0, 9)) == 0:
        header[draw(st.integers(0, 3))] = draw(values)
    packed = bytearray(msgpack.packb(header) or b"")
    whole = _bytes_wanted(name, parameters)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        packed[draw(st.integers(0, len(packed) - 1))] = draw(st.integers(0, 255))
    if draw(st.integers(0, 9)) == 0:
        del packed[draw(st.integers(0, len(packed))) :]
    sizes = st.sampled_from([0, 1, whole, whole, whole, whole, whole - 1, whole + 1])
    pages = draw(st.lists(sizes, min_size=OPERATIONS[name].pages, max_size=OPERATIONS[name].pages))
    pages += draw(st.sampled_from([[], [], [], [PAGE], [0, 0, 0]]))
    filling = draw(st.sampled_from(FILLINGS))
    return [bytes(packed), *(_repeated(filling, size) for size in pages)]


frames = nearly() | st.lists(st.binary(max_size=40), min_size=1, max_size=4)


@settings(max_examples=500, deadline=None)
@given(sent=frames)
def test_the_codec(sent: list[messages.Frame]) -> None:
    try:
        request = messages.decode_request(sent, PAGE)
    except Malformed as error:
        assert len(str(error)) < 1000  # noqa: PT017 - one of several right answers
        return
    assert isinstance(request, Request)
    assert messages.decode_request(messages.encode_request(request), PAGE) == request


class Live:
    """A broker, who is watched while strangers talk to it."""

    def __init__(self, running: Broker) -> None:
        self.broker = running
        self.client = gcma_shm.connect(running.endpoint, mapped=False, timeout=WAIT_S)
        self.life = 0
        self.declare()
        self.descriptors = descriptors(running.pid)

    def declare(self) -> None:
        swap = self.client.swap(200, 8, "behind")
        swap.store(0, b"m-gcma--" * (PAGE // 8))
        self.client.swap(OPEN_TO_ALL, 10, "behind")

    def is_well(self) -> None:
        """Others are served, what they stored is there, unless a stranger has ended the type, as any process of this user may."""
        assert self.broker.process.poll() is None
        assert self.client.swap(200, 8, "behind").load(0) in (b"m-gcma--" * (PAGE // 8), None)
        self.declare()


@pytest.fixture
def live() -> Iterator[Live]:
    endpoint = f"ipc://{os.environ['XDG_RUNTIME_DIR']}/f"
    with broker(endpoint, "--clients", "8", "--log-level", "error") as running:
        found = Live(running)
        yield found
        found.is_well()
        # Types that strangers have declared keep their files open, two each.
        types = len(found.client.stats()["types"])
        assert eventually(lambda: descriptors(running.pid) <= found.descriptors + 2 * types)
        assert eventually(lambda: set(found.client.stats()["clients"]) == {"0", "1", str(found.client.number)})
        found.client.close()


def replies(raw: Raw, number: int) -> list[list[Any]]:
    """All headers up to the answer to a last request that is sound, in whatever state the session is."""
    raw.request(number, "areas")
    found = []
    while True:
        body = raw.receive()
        assert body, "the connection has ended"
        if len(body) % PAGE == 0:
            continue  # the pages of a load
        found.append(msgpack.unpackb(body))
        if found[-1][1] == number:
            return found


@pytest.mark.parametrize("session", [False, True], ids=["without a session", "with a session"])
def test_a_live_broker(live: Live, session: bool) -> None:
    last = 1000

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(sent=st.lists(frames, min_size=1, max_size=6))
    def talk(sent: list[list[bytes]]) -> None:
        nonlocal last
        last += 1
        with Raw(live.broker.endpoint).greet() as raw:
            if session:
                hello(raw)
            for one in sent:
                raw.send(*one)
            for version, _number, status, results in replies(raw, last):
                assert version == 1
                assert status in TYPED, (status, results)
            if session:
                raw.request(3, "bye")
                replies(raw, last + 1)
                last += 1
        live.is_well()

    talk()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def _bytes_on_the_wire(endpoint: str, data: st.DataObject) -> None:
    with Raw(endpoint) as raw:
        if data.draw(st.booleans()):
            raw.greet()
        flags = st.integers(0, 255)
        for piece in data.draw(
            st.lists(st.binary(max_size=100) | st.builds(frame, st.binary(max_size=300), flags), max_size=5)
        ):
            try:
                raw.socket.sendall(piece)
            except OSError:
                return  # it was ended: silence


def test_any_bytes_on_the_wire(live: Live) -> None:
    """Below messages: what ZeroMQ itself makes of a peer that does not speak its protocol, or nearly."""
    for _ in range(3):
        _bytes_on_the_wire(live.broker.endpoint)
        live.is_well()
