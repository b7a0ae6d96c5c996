"""Requests and replies as frames: what is in them, and nothing about how they travel. docs/protocol.md is the
specification.

A request is a header, and for a store one frame of pages; a reply likewise. The header is one msgpack array, `[version,
number, operation, parameters]` or `[version, number, status, results]`. The pages of a batch lie in one frame, one after
another: ZeroMQ carries one long frame two to three times as fast as its pages in frames of their own. What comes over a
socket is never trusted: `decode_request` checks every length, type and bound against `OPERATIONS` and raises
ProtocolError for anything else.
"""

from __future__ import annotations

import builtins
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from gcma_shm import errors, layout

VERSION = 1
HEADER_BYTES_MAX = 1 << 20  # a hello that lists 65536 buffers
REPLY_BYTES_MAX = 16 << 20
PAGES_MAX = 1  # page frames of one message
WINDOW = 64  # requests that one session may have under way
# Of pages in one batch. Half of it takes half as much processor time again for each page; twice as much would be a frame of
# HEADER_BYTES_MAX, which malloc begins to map and unmap. Others on the same worker wait for one batch at the most.
BATCH_BYTES = 1 << 19
BATCHES = 4  # that one session may have under way, of each of the two kinds
OFFSET_BYTES = 8  # of one offset in a batch
NUMBER_MAX = 2**63 - 1


def batch_max(page_size: int) -> int:
    """How many pages one `store_many` or `load_many` may have."""
    return max(1, BATCH_BYTES // page_size)


Frame = bytes | bytearray | memoryview
Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Parameter:
    """What a parameter must be: `expected` says it in an error message."""

    check: Check
    expected: str
    required: bool = True


def _integer(low: int, high: int, required: bool = True) -> Parameter:
    return Parameter(lambda v: type(v) is int and low <= v <= high, f"an integer from {low} to {high}", required)


def _text(bytes_max: int, required: bool = True) -> Parameter:
    return Parameter(
        lambda v: type(v) is str and 0 < len(v.encode()) <= bytes_max, f"text of 1 to {bytes_max} bytes", required
    )


def _boolean(required: bool = True) -> Parameter:
    return Parameter(lambda v: type(v) is bool, "a boolean", required)


@dataclass(frozen=True)
class Operation:
    """What a request carries beside its name, and how many page frames: in a batch one, with a page for each offset."""

    parameters: dict[str, Parameter] = field(default_factory=dict)
    pages: int = 0
    batch: bool = False


_SIZE = _integer(1, 2**62)
_LIFE = {"type": _integer(0, layout.TYPES_MAX - 1), "life": _integer(1, NUMBER_MAX)}
_SLOT = _LIFE | {"offset": _integer(0, 2**40)}
_BATCH = _LIFE | {
    "offsets": Parameter(
        lambda v: type(v) is bytes and v != b"" and not len(v) % OFFSET_BYTES,
        f"the offsets of one page or more, {OFFSET_BYTES} bytes each",
    )
}
_NUMBERS = Parameter(
    lambda v: type(v) is list and len(v) <= 65536 and all(type(b) is int and 0 <= b <= NUMBER_MAX for b in v),
    "a list of buffer numbers",
    required=False,
)
_BUFFER = {"buffer": _integer(1, NUMBER_MAX)}
_ARENA = {"arena_id": Parameter(lambda v: type(v) is bytes and len(v) == 16, "16 bytes", required=False)}
_CLAIM = {"claim": _integer(1, NUMBER_MAX, required=False)}
_WAIT_MS = _integer(0, 2**40, required=False)
_NAME = _text(layout.NAME_BYTES)
_PLACE = {
    "nbytes": _SIZE,
    "area": _text(layout.NAME_BYTES, required=False),
    "offset": _integer(0, 2**62, required=False),
    "align": _integer(1, 2**62, required=False),
    "name": _text(layout.NAME_BYTES, required=False),
    "timeout_ms": _WAIT_MS,
}

OPERATIONS: dict[str, Operation] = {
    "hello": Operation(
        {
            "pid": _integer(1, 2**31 - 1),
            "start": _integer(0, NUMBER_MAX),
            "pidns": _integer(0, NUMBER_MAX, required=False),
            "mapped": _boolean(),
            "client": _integer(2, layout.CLIENTS_MAX, required=False),
            "generation": _integer(0, NUMBER_MAX, required=False),
            **_ARENA,
            "buffers": _NUMBERS,
            "claims": _NUMBERS,
            "made": _integer(0, NUMBER_MAX, required=False),
        }
    ),
    "bye": Operation(),
    "ping": Operation(),
    "swap_init": Operation(
        {
            "type": _integer(0, layout.TYPES_MAX - 1),
            "slots": _integer(1, 2**40),
            "write": Parameter(lambda v: v in ("through", "behind"), "'through' or 'behind'"),
            "share": _integer(1, layout.SHARE_WHOLE, required=False),
        }
    ),
    "sync": Operation(_LIFE | {"timeout_ms": _integer(0, 2**40, required=False)}),
    "store": Operation(_SLOT, pages=1),
    "load": Operation(_SLOT),
    "store_many": Operation(_BATCH, pages=1, batch=True),
    "load_many": Operation(_BATCH | {"receipt": _integer(0, NUMBER_MAX, required=False)}, batch=True),
    "invalidate_page": Operation(_SLOT),
    "contains": Operation(_SLOT),
    "count": Operation(_LIFE),
    "invalidate_area": Operation(_LIFE),
    "alloc_contig": Operation(_PLACE),
    "reserve": Operation(_PLACE),
    "collect": Operation({"ticket": _integer(1, NUMBER_MAX), "give_up": _boolean(required=False)}),
    "free_contig": Operation(_BUFFER),
    "attach": Operation(_BUFFER | _CLAIM | {"token": _integer(1, NUMBER_MAX, required=False)}),
    "attach_name": Operation({"name": _NAME}),
    "hand_over": Operation(_BUFFER | _CLAIM | {"timeout_ms": _integer(0, 2**40), "after_end_ms": _WAIT_MS}),
    "free_claim": Operation(_BUFFER | {"claim": _integer(1, NUMBER_MAX)}),
    "keep": Operation(
        _BUFFER
        | {
            "name": _NAME,
            "pid": _integer(1, 2**31 - 1, required=False),
            "start": _integer(0, NUMBER_MAX, required=False),
        }
    ),
    "unlink": Operation({"name": _NAME, "buffer": _integer(1, NUMBER_MAX, required=False)}),
    "names": Operation({"after": _text(layout.NAME_BYTES, required=False)}),
    "quota": Operation(
        {"client": _integer(2, layout.CLIENTS_MAX, required=False), "nbytes": _integer(0, 2**62, required=False)}
        | _ARENA
    ),
    "area_drain": Operation({"area": _NAME} | _ARENA),
    "area_resume": Operation({"area": _NAME} | _ARENA),
    "area_resize": Operation(
        {"area": _NAME, "nbytes": _integer(1, 2**62, required=False), "by": _integer(-(2**62), 2**62, required=False)}
        | _ARENA
    ),
    "areas": Operation(_ARENA),
    "stats": Operation(),
}


@dataclass(slots=True)
class Request:
    """A request that has been checked. Absent optional parameters are absent here too."""

    number: int
    operation: str
    parameters: dict[str, Any]
    pages: Sequence[Frame] = ()


@dataclass(slots=True)
class Reply:
    """`status` is "ok" or the name of an error."""

    number: int
    status: str
    results: dict[str, Any]
    pages: Sequence[Frame] = ()


def encode_request(request: Request) -> list[Frame]:
    """The frames of a request."""
    return _encode(request.number, request.operation, request.parameters, request.pages)


def encode_reply(reply: Reply) -> list[Frame]:
    """The frames of a reply."""
    return _encode(reply.number, reply.status, reply.results, reply.pages)


def _encode(number: int, word: str, values: dict[str, Any], pages: Sequence[Frame]) -> list[Frame]:
    return [msgpack.packb([VERSION, number, word, values]), *pages]


class Malformed(errors.ProtocolError):
    """A message that is no request. `number` is the request's, so that its sender can be answered; None: not even
    that.
    """

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.number = number


def _decode_header(frames: Sequence[Frame], bytes_max: int = HEADER_BYTES_MAX) -> tuple[int, str, dict[str, Any]]:
    if not frames:
        raise Malformed("a message without frames: expected a header")
    if len(frames[0]) > bytes_max:
        raise Malformed(f"a header of {len(frames[0])} bytes: expected at most {bytes_max}")
    try:
        header = msgpack.unpackb(frames[0], max_ext_len=0, strict_map_key=True)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise Malformed(f"a header that is not msgpack: {type(error).__name__} {error}") from None
    if not (type(header) is list and len(header) > 1 and type(header[1]) is int and 0 <= header[1] <= NUMBER_MAX):
        raise Malformed("a header of another shape: expected [version, number, word, map]")
    number = header[1]
    if type(header[0]) is not int or header[0] != VERSION:
        raise Malformed(f"protocol version {header[0]!r}: this gcma-shm speaks version {VERSION}", number)
    if not (len(header) == 4 and type(header[2]) is str and type(header[3]) is dict):
        raise Malformed("a header of another shape: expected [version, number, word, map]", number)
    return number, header[2], header[3]


def decode_request(frames: Sequence[Frame], page_size: int) -> Request:
    """Checks frames from a peer that nobody trusts. Raises Malformed, which is a ProtocolError."""
    number, name, values = _decode_header(frames)
    try:
        return _check_request(number, name, values, frames[1:], page_size)
    except errors.ProtocolError as error:
        raise Malformed(str(error), number) from None


def _check_request(number: int, name: str, values: dict[str, Any], pages: Sequence[Frame], page_size: int) -> Request:
    operation = OPERATIONS.get(name)
    if operation is None:
        raise errors.ProtocolError(f"unknown operation {name[:40]!r}: expected one of {', '.join(OPERATIONS)}")
    for key, value in values.items():
        parameter = operation.parameters.get(key)
        if parameter is None:
            raise errors.ProtocolError(f"{name} has no parameter {str(key)[:40]!r}")
        if not parameter.check(value):
            raise errors.ProtocolError(f"{name}: {key} is {str(value)[:40]!r}, expected {parameter.expected}")
    for key, parameter in operation.parameters.items():
        if parameter.required and key not in values:
            raise errors.ProtocolError(f"{name} without {key}: expected {parameter.expected}")
    if len(pages) != operation.pages:
        raise errors.ProtocolError(f"{name} with {len(pages)} page frames: expected {operation.pages}")
    expected_bytes = page_size
    if operation.batch:
        count = len(values["offsets"]) // OFFSET_BYTES
        if count > batch_max(page_size):
            raise errors.ProtocolError(f"{name} of {count} pages: expected at most {batch_max(page_size)}")
        expected_bytes *= count
    for page in pages:
        if len(page) != expected_bytes:
            raise errors.ProtocolError(f"{name} with a page frame of {len(page)} bytes: expected {expected_bytes}")
    return Request(number, name, values, pages)


def pack_offsets(offsets: Sequence[int]) -> bytes:
    """The offsets of a batch as they travel: unsigned, 64 bits, little-endian."""
    return struct.pack(f"<{len(offsets)}Q", *offsets)


def unpack_offsets(packed: bytes) -> tuple[int, ...]:
    """The inverse of `pack_offsets`, for what was checked."""
    return struct.unpack(f"<{len(packed) // OFFSET_BYTES}Q", packed)


def decode_reply(frames: Sequence[Frame]) -> Reply:
    """What a broker answered. Raises ProtocolError."""
    number, status, values = _decode_header(frames, REPLY_BYTES_MAX)
    return Reply(number, status, values, frames[1:])


_PLAIN = ("IndexError", "TypeError", "ValueError")
_ATTRIBUTES = ("errno", "stored", "requested", "largest_free", "holders", "returning")


def error_reply(number: int, error: Exception) -> Reply:
    """An error as a reply: the name of the first of its classes that peers know, its message, what else it carries."""
    known = (
        kind.__name__ for kind in type(error).__mro__ if kind.__name__ in errors.__all__ or kind.__name__ in _PLAIN
    )
    name = next(known, "GcmaError")
    results: dict[str, Any] = {"message": str(getattr(error, "strerror", None) or error)}
    for attribute in _ATTRIBUTES:
        value = getattr(error, attribute, None)
        if value is not None:
            results[attribute] = [list(item) for item in value.items()] if isinstance(value, dict) else value
    if done := getattr(error, "done", 0):  # of a batch
        results["done"] = done
    return Reply(number, name, results)


def reply_error(reply: Reply) -> Exception:
    """The exception that a reply stands for; the inverse of `error_reply`."""
    error = _error_of(reply)
    if done := reply.results.get("done", 0):
        error.done = int(done)  # type: ignore[attr-defined] # plain errors take the attribute as well
    return error


def _error_of(reply: Reply) -> Exception:
    message = str(reply.results.get("message", reply.status))
    more = reply.results
    kind: type[Exception]
    if reply.status in errors.__all__:
        kind = getattr(errors, reply.status)
    elif reply.status in _PLAIN:
        kind = getattr(builtins, reply.status)
    else:
        return errors.ProtocolError(f"the broker answered {reply.status!r}: {message}")
    if issubclass(kind, errors.SpillError):
        return kind(int(more.get("errno", 0)), message, bool(more.get("stored", False)))
    if issubclass(kind, errors.ArenaExhausted):
        holders = {int(number): int(held) for number, held in more.get("holders", [])}
        return kind(message, int(more.get("requested", 0)), int(more.get("largest_free", 0)), holders)
    if issubclass(kind, errors.QuotaExceeded):
        return kind(message, int(more.get("returning", 0)))
    if issubclass(kind, OSError) and "errno" in more:
        return kind(int(more["errno"]), message)
    return kind(message)
