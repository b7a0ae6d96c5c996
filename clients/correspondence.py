"""What one socket has under way at a broker, and what each reply means for that. Pure of sockets, clocks and threads; two shells drive it: `channel`, which
blocks, and `aio_channel`.

A broker may be killed and another take over. The new one does not know this socket, answers HelloNeeded, and is introduced to
us. A request that the old one took with it is answered by nobody; while we wait, we ask now and then (`ping`) whether we are
known still. If not, the request may have been served or not. What may be done twice is sent again, after the hello, by which the
new broker takes back what we know nothing of; a page that was stored or invalidated may not, since somebody else may have
stored another one since.

What was given up, because its time was over, is under way still, and the broker bounds what is: a request for which it leaves
no room waits for the late replies first. A HelloNeeded tells that nothing sent before it is under way any more, and so does a
hello that begins another session.

Invariants: numbers are sent in order, none twice. What is not under way any more is in none of the counts. A buffer, or a place in line, that comes in a
reply which nobody waits for is among what is to be given back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypedDict

from gcma_shm import curve, messages
from gcma_shm.clients.holds import Holds
from gcma_shm.endpoint import check_endpoint, is_deserted, is_tcp, refuse_strangers, socket_path
from gcma_shm.errors import BrokerUnavailable, ProtocolError, QuotaExceeded
from gcma_shm.messages import Frame, Reply, Request

PROBE_S = 0.1  # between two questions whether we are known still
EARLY_S = 0.01  # between two hellos, while the broker takes back what clients have left
ONCE = {"store", "store_many", "invalidate_page", "invalidate_area", "hand_over", "unlink"}  # not to be done twice
BATCHES = {"store_many", "load_many"}  # of each kind messages.BATCHES may be under way
# ... and of these together, `window`. All others are answered at once.
SINGLES = {"store", "load", "invalidate_page", "contains", "count", "swap_init", "invalidate_area", "sync"}
HELLO_NEEDED = "HelloNeeded"
LOST = "Lost"  # stands for the reply to a request that a broker took with it
Wanted = tuple[str, dict[str, Any], tuple[Frame, ...]]  # an operation, its parameters and pages
BEGIN_AGAIN = (HELLO_NEEDED, LOST)  # the broker does not know this socket (any more)


class Patience(TypedDict, total=False):
    """Of what `connect` takes, in seconds; what is not said is as it is there."""

    timeout: float
    wait_for_broker: float


class Correspondence:
    """The state of a session's requests. `introduce` makes the parameters of a hello; it is said first, and again to whoever asks
    for it. It must not refer to the owner strongly: the two would only be collected together.
    """

    def __init__(
        self,
        endpoint: str,
        timeout: float,
        wait_for_broker: float,
        introduce: Callable[[], dict[str, Any]],
        credentials: curve.Credentials | None = None,
    ) -> None:
        check_endpoint(endpoint)
        self.endpoint = endpoint
        self.timeout = timeout
        self._wait_for_broker = wait_for_broker
        self._introduce = introduce
        self._path = None if is_tcp(endpoint) else socket_path(endpoint)
        self.closed = False
        self.greeting: dict[str, Any] = {}
        self.holds = Holds()
        self.attaching: list[
            dict[str, Any]
        ] = []  # parameters of requests to attach that are sent again after the next hello
        self._credentials = credentials  # for the socket
        self._begin()

    @property
    def patience(self) -> Patience:
        """How long this client waits for its broker."""
        return {"timeout": self.timeout, "wait_for_broker": self._wait_for_broker}

    def _begin(self) -> None:
        """At first, and in a forked child."""
        self._number = 0
        self._late = 0  # requests whose replies may still come
        self._given_up: dict[int, str] = {}  # of these, the ones that the broker bounds: number to kind
        self._unknown = 0  # the last number that was answered by HelloNeeded: nothing up to it is under way
        self._receipt = 0  # of the last batch of loads whose reply was read
        self._greeted = False
        self._parting = False  # a bye was said, or is about to be

    def _make(self, operation: str, parameters: dict[str, Any], pages: tuple[Frame, ...]) -> Request:
        self._number += 1
        return Request(self._number, operation, parameters, pages)

    def _renumber(self, request: Request) -> int:
        """To send it again: what still comes for the old number, or for questions asked after that, says nothing of this. Returns the old one."""
        self._number += 1
        before, request.number = request.number, self._number
        return before

    def _encode(self, request: Request) -> list[Frame]:
        """Raises ProtocolError for what no message can say."""
        if request.operation == "load_many":
            request.parameters = request.parameters | {"receipt": self._receipt}
        try:
            return messages.encode_request(request)
        except (OverflowError, ValueError) as error:  # a number of more than 64 bits, half a surrogate pair
            raise ProtocolError(f"{request.operation}: {error}") from error

    def _give_up(self, sent: Iterable[Request]) -> None:
        """Nobody waits for these any more; their replies may still come, but to what was lost with a session."""
        for request in sent:
            if request.number <= self._unknown:
                continue
            self._late += 1
            if kind := self._kind(request.operation):
                self._given_up[request.number] = kind

    def _kind(self, operation: str) -> str:
        return kind_of(operation)

    def _room(self, kind: str) -> int:
        """How many of this kind may be under way beside those that were given up."""
        bound = messages.BATCHES if kind in BATCHES else int(self.greeting["window"])
        return bound - sum(other == kind for other in self._given_up.values())

    def _read(self, reply: Reply) -> None:
        """What the reply to a request that is waited for says beside its results."""
        if reply.status == HELLO_NEEDED:
            self._forget_until(reply.number)
        self._receipt = reply.results.get("receipt", self._receipt)

    def _take_late(self, reply: Reply) -> None:
        """One that nobody waits for."""
        self._late = max(self._late - 1, 0)
        self._given_up.pop(reply.number, None)
        if reply.status == HELLO_NEEDED:
            self._greeted = False
            self._forget_until(reply.number)
        self._receipt = reply.results.get("receipt", self._receipt)
        if reply.status != "ok":
            return
        if "buffer" in reply.results:
            self.holds.give_up(int(reply.results["buffer"]), int(reply.results.get("claim", 0)), None)
        elif "ticket" in reply.results:
            self.holds.leave(int(reply.results["ticket"]))

    def _forget_until(self, number: int) -> None:
        """A broker that did not know us then has nothing of ours from before, and answers nothing of it."""
        self._unknown = max(self._unknown, number)
        self._given_up = {other: kind for other, kind in self._given_up.items() if other > number}

    def _refuse_absent(self) -> None:
        """Before a hello. Raises BrokerUnavailable when nobody can be there, and what `refuse_strangers` does."""
        if self._path is not None and not self._path.exists() and self._wait_for_broker <= 0:
            raise BrokerUnavailable(
                f"no broker listens on {self.endpoint}: start one with `gcma broker --endpoint {self.endpoint} --size …`, "
                "or use gcma_shm.embedded()"
            )
        refuse_strangers(self.endpoint)

    def _is_deserted(self) -> bool:
        """Whether nobody is there to hear a goodbye. Over TCP that is not known."""
        return self._path is not None and is_deserted(self._path)

    def _greeted_with(self, reply: Reply) -> None:
        """The hello was answered. Raises what the broker has against it."""
        if reply.status != "ok":
            raise messages.reply_error(reply)
        if session_of(reply.results) != session_of(self.greeting):  # nothing of what was sent before is under way there
            self._given_up.clear()
            self._late = self._receipt = 0
        self.greeting = reply.results
        self._greeted = True

    def _lost(self, request: Request) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"the broker on {self.endpoint} has ended, and another has taken over, during {request.operation}: it may have been done, "
            "or not"
        )

    def _unavailable(self, request: Request) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"no answer from the broker on {self.endpoint} to {request.operation} within {self.timeout:g} s; "
            f"is it running, and not stopped?{'' if self._path is not None else ' Over TCP: does it know our key, and we its own?'}"
        )


def anew(deadline: float, latest: float, now: float, timeout: float) -> float:
    """When a request's time is over that is sent, or asked after, only now, since no broker was there before: never after `latest`."""
    return max(deadline, min(now + timeout, latest))


def again_after(reply: Reply, left_s: float) -> float | None:
    """In how many seconds a hello is to be said again: one broker came after the other; or no client record was free, some are about to be,
    and there is time left. None: that was the answer.
    """
    if reply.status == LOST:
        return 0.0
    is_early = reply.status == QuotaExceeded.__name__ and reply.results.get("returning")
    return EARLY_S if is_early and left_s > EARLY_S else None


def kind_of(operation: str) -> str:
    """Of those that are bounded together; empty: of none."""
    return operation if operation in BATCHES else "single" if operation in SINGLES else ""


def session_of(greeting: dict[str, Any]) -> tuple[Any, ...]:
    """What tells it from every other one."""
    return tuple(greeting.get(name) for name in ("client", "generation", "epoch"))
