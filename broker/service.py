"""What each request means, whichever transport it came by. Takes no socket; the control loop calls it, one request at
a time.

Requests that may touch a file or sweep a type become jobs on worker threads: pages on two, a session always on the
same one, so that its requests keep their order; declaring, ending and burying on one, which alone changes the
registry; syncs on one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from gcma_shm import layout, messages
from gcma_shm._core import Plane
from gcma_shm.arena import Arena
from gcma_shm.broker.allocations import Allocations
from gcma_shm.broker.registry import TypeRegistry
from gcma_shm.broker.sessions import Client, Sessions
from gcma_shm.broker.workers import Worker
from gcma_shm.errors import ArenaError, GcmaError, ProtocolError
from gcma_shm.messages import Frame, Reply, Request

log = logging.getLogger(__name__)

PAGE_WORKERS = 2
WINDOW_BYTES = 1 << 20  # of pages that one session may have under way
SYNC_MAX_MS = (
    60_000  # what a sync by message may wait for other processes' writes; the one thread for syncs serves all sessions
)
HELLO_NEEDED = "HelloNeeded"  # the status that tells a peer to introduce itself (again)

Answer = Callable[[bytes, Reply], None]
Results = tuple[dict[str, Any], list[bytes]]


class Service:
    """The state of one broker. `answer(peer, reply)` is called from worker threads, and must be safe for that."""

    def __init__(
        self, plane: Plane, arena: Arena, registry: TypeRegistry, spill_dir: str, epoch: int, answer: Answer
    ) -> None:
        self.plane = plane
        self._arena = arena
        self._answer = answer
        self._spill_dir = spill_dir
        self._epoch = epoch
        self._registry = registry
        self.allocations = Allocations(plane, arena.areas)
        self.sessions = Sessions(plane, self.allocations.inherit)
        self.window = max(4, min(messages.WINDOW, WINDOW_BYTES // arena.geometry.page_size))
        jobs_max = arena.geometry.clients_max * messages.WINDOW
        self._page_workers = [Worker(f"pages-{n}", jobs_max) for n in range(PAGE_WORKERS)]
        self._type_worker = Worker("types", jobs_max)
        self._sync_worker = Worker("sync", jobs_max)
        self._requests: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._control: dict[str, Callable[[Client, Request], dict[str, Any]]] = {
            "bye": self._bye,
            "ping": lambda _client, _request: {},
            "alloc_contig": self._alloc_contig,
            "free_contig": self._free_contig,
            "areas": lambda _client, _request: {"areas": self.allocations.areas()},
            "stats": lambda _client, _request: self.stats(),
        }
        self._jobs: dict[str, Callable[[dict[str, Any], Request], Results]] = {
            "swap_init": self._swap_init,
            "invalidate_area": self._invalidate_area,
            "sync": self._sync,
            "count": lambda p, _r: ({"count": len(registry.find(p["type"], p["life"]))}, []),
            "contains": lambda p, _r: ({"contains": p["offset"] in registry.find(p["type"], p["life"])}, []),
            "store": self._store,
            "load": self._load,
            "invalidate_page": self._invalidate_page,
        }
        assert {*self._control, *self._jobs, "hello"} == set(messages.OPERATIONS)

    def request(self, peer: bytes, frames: list[Frame]) -> Reply | None:
        """Serves one message: the reply; None when it comes later from a worker, or to nobody (not even a number could
        be read).
        """
        self._bury(self.sessions.adopt_forked())
        try:
            request = messages.decode_request(frames, self._arena.geometry.page_size)
        except messages.Malformed as error:
            refusal = self._refuse(error.number or 0, error)
            return None if error.number is None else refusal
        number = request.number
        try:
            self._requests[request.operation] += 1
            client = self.sessions.find(peer)
            if request.operation == "hello":
                return Reply(number, "ok", self._hello(peer, request.parameters))
            if client is None:
                return Reply(number, HELLO_NEEDED, {"message": "no session: say hello first"})
            if request.operation in self._control:
                return Reply(number, "ok", self._control[request.operation](client, request))
            self._submit(peer, client, request)
        except Exception as error:  # one request must not end the broker
            return self._refuse(number, error)
        return None

    def client_ended(self, pidfd: int) -> None:
        """A process has ended: all that it held is given back."""
        self._bury(self.sessions.adopt_forked())
        client = self.sessions.by_pidfd.get(pidfd)
        if client is not None:
            log.info("client %d (process %d) has ended", client.number, client.pid)
            self._bury([client])

    def tick(self) -> None:
        """Once a second or so: whatever no message and no pidfd tells."""
        self._bury(self.sessions.adopt_forked(look_anyway=True))

    def stop(self, timeout_s: float) -> None:
        """Ends all types, so that nobody goes on alone, and the workers."""
        self._type_worker.submit(self._registry.end_all)
        for worker in (*self._page_workers, self._sync_worker, self._type_worker):
            if not worker.stop(timeout_s):
                log.warning("a worker is still busy after %g s; leaving it", timeout_s)
        self.sessions.close()

    def stats(self) -> dict[str, Any]:
        """Counters and gauges; docs/protocol.md lists the keys."""
        clients = self.sessions.counters()
        geometry = self._arena.geometry
        by_client = {
            str(number): counters | {"pid": self.sessions.clients[number].pid if number in self.sessions.clients else 0}
            for number, counters in clients.items()
        }
        nursery_free = self.plane.read(layout.HAND_AT) + geometry.nursery_pages - self.plane.read(layout.HEAD_AT)
        return {
            "arena": {
                "name": self._arena.name,
                "epoch": self._epoch,
                "size": geometry.size,
                "page_size": geometry.page_size,
                "slots": geometry.slots,
                "nursery": geometry.nursery_pages * geometry.page_size,
                "nursery_free": max(nursery_free, 0) * geometry.page_size,
            },
            "areas": {str(info.pop("name")): info for info in self.allocations.areas()},
            "types": {str(type_): described for type_, described in self._registry.describe().items()},
            "counters": {name: sum(counters[name] for counters in clients.values()) for name in clients[layout.NOBODY]},
            "clients": by_client,
            "broker": {
                "requests": dict(self._requests),
                "refusals": dict(self._refusals),
                "clients": len(self.sessions.clients),
            },
        }

    # --- on the control thread

    def _hello(self, peer: bytes, p: dict[str, Any]) -> dict[str, Any]:
        client = self.sessions.hello(peer, p["pid"], p["start"], p["mapped"], p.get("client"))
        if "buffers" in p:  # whatever it does not know of was allocated for a reply that it never got
            self.allocations.drop(client.number, keep=p["buffers"])
        log.info("client %d is process %d%s", client.number, client.pid, "" if client.mapped else ", by messages")
        geometry = self._arena.geometry
        return {
            "client": client.number,
            "arena": self._arena.name,
            "arena_id": self._arena.arena_id,
            "epoch": self._epoch,
            "page_size": geometry.page_size,
            "window": self.window,
            "spill_dir": self._spill_dir,
        }

    def _bye(self, client: Client, _request: Request) -> dict[str, Any]:
        log.info("client %d (process %d) says bye", client.number, client.pid)
        self._bury([client])
        return {}

    def _bury(self, clients: list[Client]) -> None:
        for client in clients:
            self.allocations.drop(client.number)
            self.sessions.forget(client)
            number = client.number

            def take_back(number: int = number) -> None:
                self.plane.bury(number)
                self.sessions.buried(number)

            if not self._type_worker.submit(take_back):
                log.error(
                    "client %d could not be buried: the queue is full; its number is lost until the next start", number
                )

    def _alloc_contig(self, client: Client, request: Request) -> dict[str, Any]:
        if not client.mapped:
            raise ArenaError(
                "a buffer is memory of the arena, which this client does not map; connect with mapped=True on the broker's host"
            )
        return self.allocations.place(self.allocations.allocate(client.number, request.number, **request.parameters))

    def _free_contig(self, client: Client, request: Request) -> dict[str, Any]:
        self.allocations.free(client.number, request.parameters["buffer"])
        return {}

    def _submit(self, peer: bytes, client: Client, request: Request) -> None:
        if client.under_way >= self.window:
            raise ProtocolError(f"more than {self.window} requests under way in one session; wait for replies first")
        if request.operation in ("swap_init", "invalidate_area"):
            worker = self._type_worker
        elif request.operation == "sync":
            worker = self._sync_worker
        else:
            worker = self._page_workers[client.number % PAGE_WORKERS]
        client.under_way += 1
        if not worker.submit(lambda: self._work(peer, request)):
            client.under_way -= 1
            raise ProtocolError("the broker's queue is full; try again later")

    def _refuse(self, number: int, error: Exception) -> Reply:
        if not isinstance(error, GcmaError | IndexError | ValueError):
            log.error("a request failed", exc_info=error)
            error = GcmaError("the broker failed on this request; its log says why")
        reply = messages.error_reply(number, error)
        self._refusals[reply.status] += 1
        return reply

    # --- on worker threads

    def _work(self, peer: bytes, request: Request) -> None:
        try:
            results, pages = self._jobs[request.operation](request.parameters, request)
            reply = Reply(request.number, "ok", results, pages)
        except Exception as error:  # one request must not end the broker
            reply = self._refuse(request.number, error)
        self._answer(peer, reply)

    def answered(self, peer: bytes) -> None:
        """On the control thread, for each reply that a worker gave: one request less under way."""
        client = self.sessions.find(peer)
        if client is not None:
            client.under_way -= 1

    def _swap_init(self, p: dict[str, Any], _request: Request) -> Results:
        slots = self._registry.declare(p["type"], p["slots"], p["write"])
        return {"type": p["type"], "life": slots.life, "slots": slots.slots, "write": p["write"]}, []

    def _invalidate_area(self, p: dict[str, Any], _request: Request) -> Results:
        self._registry.end(p["type"], p["life"])
        return {}, []

    def _sync(self, p: dict[str, Any], _request: Request) -> Results:
        timeout_s = min(p.get("timeout_ms", SYNC_MAX_MS), SYNC_MAX_MS) / 1000
        self._registry.find(p["type"], p["life"]).sync(timeout_s)
        return {}, []

    def _store(self, p: dict[str, Any], request: Request) -> Results:
        self._registry.find(p["type"], p["life"]).store(p["offset"], request.pages[0])
        return {}, []

    def _load(self, p: dict[str, Any], _request: Request) -> Results:
        page = self._registry.find(p["type"], p["life"]).load(p["offset"])
        return {"hit": page is not None}, [] if page is None else [page]

    def _invalidate_page(self, p: dict[str, Any], _request: Request) -> Results:
        self._registry.find(p["type"], p["life"]).invalidate_page(p["offset"])
        return {}, []
