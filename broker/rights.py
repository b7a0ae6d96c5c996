"""What a peer may ask for, by the key that it has shown. Pure.

Decided here alone, whichever transport a request came by: a process of this user on the ipc socket may do everything, a peer over
TCP what its line in the file of authorized keys says, and nothing when there is no such line any more.

A line of that file is `NAME KEY [types=3,7-9] [alloc=no] [admin=yes]`; a line that begins with # is a comment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gcma_shm import layout, messages
from gcma_shm.curve import is_key
from gcma_shm.errors import Forbidden

AUTHORIZED_MAX = 4096  # lines with a key
_NAME = re.compile(r"[0-9A-Za-z._@-]{1,64}")
_ANSWER = {"yes": True, "no": False}

ALWAYS = {"hello", "bye", "ping", "stats", "areas", "names"}
ON_TYPES = {name for name, operation in messages.OPERATIONS.items() if "type" in operation.parameters}
ALLOCATION = {
    "alloc_contig", "reserve", "collect", "free_contig", "attach", "attach_name", "hand_over", "free_claim", "keep", "unlink",
}  # fmt: skip
ADMIN = {"area_drain", "area_resume", "area_resize"}
QUOTA = {"quota"}  # one's own may be read
assert set(messages.OPERATIONS) == ALWAYS | ON_TYPES | ALLOCATION | ADMIN | QUOTA


@dataclass(frozen=True)
class Sender:
    """Who sent a message, as the kernel and ZeroMQ know it, whatever the message says. `pid` 0: not known. `key`: the public
    key that was shown over TCP; empty: none.
    """

    remote: bool = False
    pid: int = 0
    key: str = ""


@dataclass(frozen=True)
class Rights:
    """What may be asked for. `types` None: all of them; `name` is for people."""

    name: str = ""
    types: frozenset[int] | None = None
    alloc: bool = True
    admin: bool = False

    def check(self, operation: str, parameters: dict[str, Any]) -> None:
        """Raises Forbidden unless this may be asked for."""
        if operation in ON_TYPES and self.types is not None and parameters["type"] not in self.types:
            raise Forbidden(f"{self.name} has no right to type {parameters['type']}")
        if operation in ALLOCATION and not self.alloc:
            raise Forbidden(f"{self.name} has no right to buffers and reservations")
        if not self.admin and (operation in ADMIN or (operation in QUOTA and parameters.keys() - {"arena_id"})):
            raise Forbidden(f"{self.name} has no right to {operation}")


LOCAL = Rights("a process of the broker's user", admin=True)
INSECURE = Rights("a peer without a key", alloc=False)


def no_rights(_sender: Sender) -> Rights | None:
    """Where nobody is let in from elsewhere."""
    return None


def parse_authorized(text: str) -> dict[str, Rights]:
    """Rights by public key. Raises ValueError that names the line."""
    found: dict[str, Rights] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            key, rights = _parse_line(words)
            if key in found:
                raise ValueError("this key stands in an earlier line, too")
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        found[key] = rights
        if len(found) > AUTHORIZED_MAX:
            raise ValueError(f"more than {AUTHORIZED_MAX} keys")
    return found


def _parse_line(words: list[str]) -> tuple[str, Rights]:
    if len(words) < 2 or not _NAME.fullmatch(words[0]) or not is_key(words[1]):
        raise ValueError("expected NAME KEY [types=3,7-9] [alloc=no] [admin=yes], KEY with 40 characters of Z85")
    name, key, *options = words
    given: dict[str, str] = {}
    for option in options:
        word, separator, value = option.partition("=")
        if not separator or word not in ("types", "alloc", "admin") or word in given:
            raise ValueError(f"{option!r}: expected types=, alloc= or admin=, each once")
        given[word] = value
    return key, Rights(
        name,
        _types(given["types"]) if "types" in given else None,
        _answer("alloc", given.get("alloc", "yes")),
        _answer("admin", given.get("admin", "no")),
    )


def _answer(word: str, value: str) -> bool:
    if value not in _ANSWER:
        raise ValueError(f"{word}={value}: expected yes or no")
    return _ANSWER[value]


def _types(text: str) -> frozenset[int]:
    """`3,7-9` → 3, 7, 8, 9; `none` → no type."""
    if text == "none":
        return frozenset()
    types: set[int] = set()
    for part in text.split(","):
        low, separator, high = part.partition("-")
        ends = (low, high if separator else low)
        if not all(end.isascii() and end.isdigit() and int(end) < layout.TYPES_MAX for end in ends):
            raise ValueError(
                f"types={text}: expected numbers from 0 to {layout.TYPES_MAX - 1} and ranges, such as 3,7-9"
            )
        if int(ends[0]) > int(ends[1]):
            raise ValueError(f"types={text}: {part} ends before it begins")
        types.update(range(int(ends[0]), int(ends[1]) + 1))
    return frozenset(types)
