"""What a client asks of its broker, step by step: written once, for clients that block and for clients that await.

Each method is a generator. It yields what is to be done next (`Ask`, `Sleep`, `Leave`, `Free`), is given what came of it, and returns the result; an error
is thrown in where the step stands. `drive` does the steps of a client that blocks. Nothing here knows a socket or a thread.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import time
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from gcma_shm import layout
from gcma_shm._core import Plane, Span
from gcma_shm.clients.handles import Handle, Reference
from gcma_shm.clients.holds import Hold
from gcma_shm.clients.info import AreaInfo, NameInfo, QuotaInfo
from gcma_shm.clients.member import Member
from gcma_shm.errors import ArenaError, ArenaExhausted, BrokerUnavailable, Closed, NoSuchBuffer, StaleHandle
from gcma_shm.messages import Reply
from gcma_shm.sizes import SECONDS_MAX, check_seconds, parse_size

WAIT_SLICE_S = 1.0  # between two looks at the broker while a request waits in line
BYTES_MAX = 1 << 62  # of a buffer, in the protocol; whatever is larger is refused like this
SLOTS_MAX = 1 << 40  # of a type, in the protocol


@dataclass(slots=True)
class Ask:
    """A request. Its answer is the reply, or `then` of it, made before anything else of this client, or a fork, goes on."""

    operation: str
    parameters: dict[str, Any] = field(default_factory=dict)
    then: Callable[[Reply], Any] | None = None


@dataclass(slots=True)
class Sleep:
    """Until the broker has woken this client more than `seen` times, or so many seconds."""

    seen: int
    seconds: float


@dataclass(slots=True)
class Leave:
    """The line is left, where a request of that ticket stood, and what was served meanwhile is given back."""

    ticket: int


@dataclass(slots=True)
class Free:
    """A hold is ended."""

    number: int
    hold: Hold


Step = Ask | Sleep | Leave | Free
Granted = tuple[dict[str, Any], Span]  # the place and memory of a buffer or reservation
T = TypeVar("T")
B = TypeVar("B")
R = TypeVar("R")
Steps = Generator[Step, Any, T]


def drive(steps: Steps[T], do: Callable[[Step], Any]) -> T:
    """Does the steps one after another, and returns what they return. Ctrl-C that is heard between two of them is told to the steps as one in
    the middle of them is: they may have a place in line to leave.
    """
    try:
        step = next(steps)
        while True:
            try:
                while True:  # inside of the `try`: signals are heard at the jump back as well
                    step = steps.send(do(step))
            except BaseException as error:
                if inspect.getgeneratorstate(steps) == inspect.GEN_CLOSED:  # it is the steps' own, or their end
                    raise
                step = steps.throw(error)
    except StopIteration as done:
        return cast(T, done.value)


class Stepping(Member, Generic[B, R]):
    """A client whose buffers are `B` and whose reservations are `R`."""

    def _buffer(self, place: dict[str, Any], span: Span, claim: int = 0) -> B:
        raise NotImplementedError

    def _reservation(self, place: dict[str, Any]) -> R:
        raise NotImplementedError

    # --- connecting, types

    def _connecting(self, required: bool) -> Steps[Any]:
        """Says hello, and maps the arena if it may: returned then."""
        yield Ask("ping")
        self.page_size = self._channel.greeting["page_size"]
        if not self._mapped:
            return None
        try:
            return self._map()
        except (ArenaError, OSError):
            if required:
                raise
        # Not ours to map (another container, say): start over as one that sends its pages in messages.
        yield Ask("bye")
        del self._channel.greeting["client"]
        self._mapped = False
        yield Ask("ping")
        return None

    def _declaring(self, type_: int, slots: int, write: str, share: int) -> Steps[tuple[int, int, int]]:
        """The number, slots and life of a type, declared or found as it was declared."""
        type_, slots = operator.index(type_), operator.index(slots)
        if not 0 <= type_ < layout.TYPES_MAX:
            raise ValueError(f"type {type_}: expected 0 to {layout.TYPES_MAX - 1}")
        if not 1 <= slots <= SLOTS_MAX:
            raise ValueError(f"{slots} slots: expected 1 to {SLOTS_MAX}")
        if write not in ("through", "behind"):
            raise ValueError(f"write={write!r}: expected 'through' or 'behind'")
        if not 1 <= operator.index(share) <= layout.SHARE_WHOLE:
            raise ValueError(f"share={share}: expected 1 to {layout.SHARE_WHOLE} percent of the cache")
        wanted = {"type": type_, "slots": slots, "write": write, "share": operator.index(share)}
        declared = yield Ask("swap_init", wanted)
        return type_, slots, int(declared.results["life"])

    # --- what is told

    def _statistics(self) -> Steps[dict[str, Any]]:
        reply = yield Ask("stats")
        return cast(dict[str, Any], reply.results)

    def _areas(self) -> Steps[list[AreaInfo]]:
        told = yield from self._openly("areas", {})
        return [AreaInfo(**info) for info in told["areas"]]

    def _changing_area(self, operation: str, parameters: dict[str, Any]) -> Steps[AreaInfo]:
        told = yield from self._openly(operation, parameters)
        return AreaInfo(**told)

    def _names(self) -> Steps[list[NameInfo]]:
        found: list[NameInfo] = []
        more = True
        while more:
            after = {"after": found[-1].name} if found else {}
            reply = yield Ask("names", after)
            found += [
                NameInfo(
                    told["name"],
                    told["area"],
                    told["offset"],
                    told["nbytes"],
                    told["holders"],
                    "reservation" in told,
                    tuple(told.get("kept_by", ())),
                )
                for told in reply.results["names"]
            ]
            more = reply.results["more"]
        return found

    def _quota(self, nbytes: int | str | None, client: int | None) -> Steps[QuotaInfo]:
        wanted = {} if client is None else {"client": operator.index(client)}
        if nbytes is not None:
            wanted["nbytes"] = 0 if nbytes in (0, "none") else parse_size(nbytes)
        told = yield from self._openly("quota", wanted)
        return QuotaInfo(told["held"], told["quota"] or None)

    def _openly(self, operation: str, parameters: dict[str, Any]) -> Steps[dict[str, Any]]:
        """The results of a request that a broker serves without a session too: of this arena, and no other that came since."""
        reply = yield Ask(operation, parameters | {"arena_id": self.arena_id})
        return cast(dict[str, Any], reply.results)

    # --- buffers and reservations

    def _placing(
        self,
        operation: str,
        nbytes: int,
        area: str | None,
        offset: int | None,
        align: int | None,
        timeout: float | None,
        name: str | None,
    ) -> Steps[Granted]:
        """The place and memory of a new buffer or reservation."""
        wanted: dict[str, Any] = {"nbytes": min(operator.index(nbytes), BYTES_MAX)}
        if wanted["nbytes"] < 1:
            raise ValueError(f"{nbytes} bytes: expected at least 1")
        for what, text in (("area", area), ("name", name)):
            if text is not None:
                _check_name("area" if what == "area" else "buffer", text)
                wanted[what] = text
        for what, value, least in (("offset", offset, 0), ("align", align, 1)):
            if value is not None:
                wanted[what] = min(operator.index(value), BYTES_MAX)
                if wanted[what] < least:
                    raise ValueError(f"{what} {value}: expected at least {least}")
        if not self.closed:
            self._refuse_unmapped()
        patience = check_seconds("timeout", SECONDS_MAX if timeout is None else timeout)
        if patience:
            wanted["timeout_ms"] = max(int(patience * 1000), 1)
        deadline = time.monotonic() + patience
        while True:
            got: Granted | int = yield Ask(operation, wanted, self._take)
            if isinstance(got, tuple):
                return got
            with contextlib.suppress(NoSuchBuffer):  # we were stopped for so long that we lost our place: ask again
                return (yield from self._waiting(got, deadline))
            wanted["timeout_ms"] = max(int((deadline - time.monotonic()) * 1000), 0)

    def _waiting(self, ticket: int, deadline: float) -> Steps[Granted]:
        """Until a request in line was served. No lock and no socket is held meanwhile: the broker wakes us by a word in the
        arena.
        """
        plane = cast(Plane, self._plane)
        try:
            while True:
                seen = plane.wake_count()
                left = deadline - time.monotonic()
                got: Granted | int = yield Ask("collect", {"ticket": ticket, "give_up": left <= 0}, self._take)
                if isinstance(got, tuple):
                    return got
                yield Sleep(seen, min(left, WAIT_SLICE_S))
        except (ArenaExhausted, BrokerUnavailable, NoSuchBuffer):
            raise
        except BaseException:  # Ctrl-C or a cancellation, say: leave the line, and give back what was served meanwhile
            yield Leave(ticket)
            raise

    def _take(self, reply: Reply, claim: int = 0) -> Granted | int:
        """Under the channel's lock, which a fork takes too: a child has the memory and its hold, or neither. An int: the
        ticket of a request that waits in line. `claim`: the generation of a claim that was attached to.
        """
        place = reply.results
        if "ticket" in place:
            return int(place["ticket"])
        number = place["buffer"]
        span = cast(Plane, self._plane).span(place["first"], place["nbytes"])
        place["hold"] = hold = Hold()
        if claim or "reservation" not in place:
            # When nothing refers to the memory any more, neither a Buffer nor a view or array, it is given back; and the
            # client lives as long as that. (The promise of a reservation is given back by that.)
            give_up = weakref.finalize(span, self._give_up, number, claim, hold)
            give_up.atexit = False  # the broker sees the process end
        self._channel.holds.add(number, claim)
        return place, span

    def _attaching_name(self, name: str) -> Steps[Granted]:
        _check_name("buffer", name)
        self._refuse_unmapped()
        taken: Granted = yield Ask("attach_name", {"name": name}, self._take)
        return taken

    def _attaching(self, name: str | Handle) -> Steps[B]:
        """The buffer of a name, or of a handle."""
        if isinstance(name, Handle):
            place, span = yield from self._attaching_reference(name.refers_to_buffer())
            return self._buffer(place, span, name.reference.claim)
        place, span = yield from self._attaching_name(name)
        if "reservation" in place:
            yield Free(place["buffer"], place["hold"])
            raise TypeError(f"{name!r} is a reservation: use attach_reservation()")
        return self._buffer(place, span)

    def _attaching_reservation(self, name: str) -> Steps[R]:
        place, _ = yield from self._attaching_name(name)
        if "reservation" not in place:
            yield Free(place["buffer"], place["hold"])
            raise TypeError(f"{name!r} is a buffer: use attach()")
        return self._reservation(place)

    def _attach_parameters(self, reference: Reference) -> dict[str, Any]:
        """Of a request to attach. Raises StaleHandle, ArenaError."""
        self._refuse_unmapped()
        if reference.arena_id != self.arena_id:
            raise StaleHandle("this handle is of another arena, or of one that its broker has replaced")
        told = (("claim", reference.claim), ("token", reference.token))
        return {"buffer": reference.number} | {name: value for name, value in told if value}

    def _attaching_reference(self, reference: Reference) -> Steps[Granted]:
        parameters = self._attach_parameters(reference)
        try:
            taken: Granted = yield Ask("attach", parameters, lambda reply: self._take(reply, reference.claim))
        except Closed as error:
            if self.closed:
                raise
            raise StaleHandle(str(error)) from error  # the broker serves another arena now
        return taken

    def _handing_over(
        self, number: int, claim: int, timeout: float, after_end: float | None, reservation: bool
    ) -> Steps[Handle]:
        wanted = {"buffer": number, "timeout_ms": int(check_seconds("timeout", timeout) * 1000)}
        if claim:
            wanted["claim"] = claim
        if after_end is not None:
            wanted["after_end_ms"] = int(check_seconds("after_end", after_end) * 1000)
        reply = yield Ask("hand_over", wanted)
        return Handle(Reference(self.endpoint, self.arena_id, number, claim, reply.results["token"]), reservation)

    def _keeping(self, number: int, name: str, process: tuple[int, int] | None) -> Steps[None]:
        """`process`: until that one, by its number and start, has ended; None: until it is unlinked."""
        _check_name("buffer", name)
        until = {} if process is None else {"pid": process[0], "start": process[1]}
        yield Ask("keep", {"buffer": number, "name": name} | until)

    def _unlinking(self, name: str, number: int | None = None) -> Steps[None]:
        """`number`: only if it is that buffer's name."""
        _check_name("buffer", name)
        self._refuse_unmapped()
        yield Ask("unlink", {"name": name} | ({} if number is None else {"buffer": number}))


def _check_name(what: str, name: str) -> None:
    """Raises TypeError, ValueError for what cannot be the name of an area or buffer."""
    if not isinstance(name, str):
        raise TypeError(f"{what} name of type {type(name).__name__}: expected text")
    layout.refuse_name(what, name)
