"""What each request means, whichever transport it came by. Takes no socket; the control loop calls it, one request at
a time.

Requests that may touch a file or sweep a type become jobs on worker threads: pages on two, a session always on the
same one, so that its requests keep their order; declaring, ending and burying on one, which alone changes the
registry; syncs on one.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gcma_shm import layout, messages
from gcma_shm._core import Plane
from gcma_shm.arena import Arena
from gcma_shm.broker.allocations import Allocations
from gcma_shm.broker.areas import Areas
from gcma_shm.broker.health import Health
from gcma_shm.broker.line import Line
from gcma_shm.broker.recovery import recover
from gcma_shm.broker.registry import TypeRegistry
from gcma_shm.broker.rights import Rights, Sender, no_rights
from gcma_shm.broker.sessions import NOBODY, Client, Sessions
from gcma_shm.broker.table import Allocation
from gcma_shm.broker.window import Entry
from gcma_shm.broker.workers import Job, Worker
from gcma_shm.errors import ArenaError, Closed, Forbidden, GcmaError, ProtocolError, SlotBusy
from gcma_shm.messages import Frame, Reply, Request
from gcma_shm.process import pid_namespace

log = logging.getLogger(__name__)

PAGE_WORKERS = 2
PAGED = {"store", "load", "store_many", "load_many", "invalidate_page", "contains", "count"}  # answered in order
WINDOW_BYTES = 1 << 20  # of pages that one session may have under way
AT_HAND_BYTES = 1 << 16  # of a page that the control thread copies itself
# What a sync by message may wait for other processes' writes, and how much of it at once.
SYNC_MAX_MS = 60_000
SYNC_SLICE_S = 0.2
TICKET_SHIFT = 32  # a broker's tickets in line are none of the one before it
DROPS_MAX = 64  # buffers of a client that has left, freed in one turn of the loop
HELLO_NEEDED = "HelloNeeded"  # the status that tells a peer to introduce itself (again)


@dataclass(slots=True)
class Peer:
    """Whom a worker's reply goes to, and what it was in their window."""

    address: bytes
    client: Client
    entry: Entry


Answer = Callable[[Peer, Reply], None]
Results = tuple[dict[str, Any], list[Frame]]


def window_of(page_size: int) -> int:
    """How many requests of the kinds pages, types and sync one session may have under way."""
    return max(4, min(messages.WINDOW, WINDOW_BYTES // page_size))


def _refuse_unmapped(client: Client) -> None:
    if not client.mapped:
        raise ArenaError(
            "a buffer is memory of the arena, which this client does not map; connect with mapped=True on the broker's host"
        )


class Service:
    """The state of one broker. `answer(peer, reply)` is called from worker threads, and must be safe for that."""

    def __init__(
        self,
        plane: Plane,
        arena: Arena,
        registry: TypeRegistry,
        spill_dir: str,
        answer: Answer,
        watch: Callable[[int], None] = lambda _: None,
        quota: int | None = None,
        rights: Callable[[Sender], Rights | None] = no_rights,
    ) -> None:
        """`rights(sender)` of a remote sender; None: none, and whatever it has ends."""
        self._remote_rights = rights
        self.plane = plane
        self._arena = arena
        self._answer = answer
        self._spill_dir = spill_dir
        self._epoch = plane.read(layout.EPOCH_AT)
        self._registry = registry
        self.allocations = Allocations(plane, Areas(plane, arena.areas, memoryview(arena.memory), arena.fresh), quota)
        self.line = Line(self.allocations, plane.wake, self._epoch << TICKET_SHIFT)
        self.sessions = Sessions(plane, self._inherit, watch, arena.presence)
        self.health = Health(time.time())
        self.window = window_of(arena.geometry.page_size)
        jobs_max = arena.geometry.clients_max * (messages.WINDOW + 2 * messages.BATCHES)
        self._page_workers = [Worker(f"pages-{n}", jobs_max) for n in range(PAGE_WORKERS)]
        self._type_worker = Worker("types", jobs_max)
        self._sync_worker = Worker("sync", jobs_max)
        self._leaving: deque[int] = deque()  # numbers of clients that are gone, and still hold something
        self._dropped: list[int] = []  # of those that hold nothing any more, to be buried together
        self._requests: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._control: dict[str, Callable[[Client, Request], dict[str, Any]]] = {
            "bye": self._bye,
            "ping": lambda _client, _request: {},
            "alloc_contig": lambda client, request: self._ask(client, request, layout.BUFFER),
            "reserve": lambda client, request: self._ask(client, request, layout.RESERVATION),
            "collect": self._collect,
            "free_contig": self._free_contig,
            "attach": self._attach,
            "attach_name": self._attach_name,
            "hand_over": self._hand_over,
            "free_claim": self._free_claim,
            "keep": self._keep,
            "unlink": self._unlink,
            "names": self._names,
            "stats": lambda _client, _request: self.stats(),
        }
        # For an operator, also when no client record is free.
        self._open: dict[str, Callable[[Client | None, Request], dict[str, Any]]] = {
            "quota": self._quota,
            "areas": lambda _client, _request: {
                "areas": self.allocations.describe(),
                "spare": self.allocations.areas.spare * arena.geometry.page_size,
            },
            "area_drain": self._area_drain,
            "area_resume": self._area_resume,
            "area_resize": self._area_resize,
        }
        self._jobs: dict[str, Callable[[dict[str, Any], Request], Results]] = {
            "swap_init": self._swap_init,
            "invalidate_area": self._invalidate_area,
            "count": lambda p, _r: ({"count": len(registry.find(p["type"], p["life"]))}, []),
            "contains": lambda p, _r: ({"contains": p["offset"] in registry.find(p["type"], p["life"])}, []),
            "store": self._store,
            "load": self._load,
            "store_many": self._store_many,
            "load_many": self._load_many,
            "invalidate_page": self._invalidate_page,
        }
        # Without a worker; None: it needs one.
        self._at_hand: dict[str, Callable[[dict[str, Any], Request], Results | None]] = {
            "contains": self._jobs["contains"],
            "invalidate_page": self._invalidate_page,
        }
        if arena.geometry.page_size <= AT_HAND_BYTES:
            self._at_hand |= {"store": self._store_at_hand, "load": self._load_at_hand}
        assert {*self._control, *self._open, *self._jobs, "hello", "sync"} == set(messages.OPERATIONS)

    def request(self, peer: bytes, frames: list[Frame], sender: Sender = NOBODY) -> Reply | None:
        """Serves one message: the reply; None when it comes later from a worker, or to nobody (not even a number could
        be read).
        """
        try:
            request = messages.decode_request(frames, self._arena.geometry.page_size)
        except messages.Malformed as error:
            refusal = self._refuse(error.number or 0, error)
            return None if error.number is None else refusal
        try:
            if gone := self.sessions.adopt_forked():
                self._bury(gone)
            self._requests[request.operation] += 1
            return self._serve(peer, sender, request)
        except Exception as error:  # one request must not end the broker
            return self._refuse(request.number, error)
        finally:
            if self.busy or self._dropped:
                self.advance()

    def _serve(self, peer: bytes, sender: Sender, request: Request) -> Reply | None:
        if sender.remote:  # a process of our own user may do everything
            rights = self._remote_rights(sender)
            if rights is None:
                raise Forbidden("this key is not authorized, or is not any more")
            rights.check(request.operation, request.parameters)
        client = self.sessions.find(peer, sender)
        if client is None or request.operation in self._open or request.operation == "hello":
            return self._serve_anybody(peer, client, sender, request)
        decide = self._control.get(request.operation)
        if decide is not None:
            return Reply(request.number, "ok", decide(client, request))
        if not client.window.paged and (at_hand := self._at_hand.get(request.operation)):
            # What is in memory is served at once: two switches between threads cost more than all the rest of a request. It comes in
            # order, for no request of this session's is with a worker, and takes no longer than the copy of one page.
            served = at_hand(request.parameters, request)
            if served is not None:
                return Reply(request.number, "ok", *served)
        self._submit(peer, client, request)
        return None

    def _serve_anybody(self, peer: bytes, client: Client | None, sender: Sender, request: Request) -> Reply:
        """What may come from a peer without a session, or say which arena it means."""
        if request.parameters.get("arena_id", self._arena.arena_id) != self._arena.arena_id:
            raise Closed("the arena that this client knows has ended with its broker; connect again")
        of_nobody = client is None and request.operation == "quota" and "client" not in request.parameters
        if request.operation in self._open and not of_nobody:
            return Reply(request.number, "ok", self._open[request.operation](client, request))
        if request.operation == "hello":
            return Reply(request.number, "ok", self._hello(peer, sender, request.parameters))
        return Reply(request.number, HELLO_NEEDED, {"message": "no session: say hello first"})

    def client_ended(self, pidfd: int) -> None:
        """A process has ended: all that it held is given back. Should that fail, it is tried again at the next turn of the loop."""
        try:
            self._bury(self.sessions.adopt_forked())
            client = self.sessions.by_pidfd.get(pidfd)
            if client is not None:
                log.info("client %d (process %d) has ended", client.number, client.pid)
                self._bury([client])
        except Exception:
            log.exception("the end of a client was not served; trying again")
        self.advance()

    def peer_gone(self, peer: bytes) -> None:
        """A connection has ended: so does the session of a client that sends its pages in messages; see `Sessions.gone`."""
        try:
            gone = self.sessions.gone(peer)
            for client in gone:
                log.info("client %d is gone: its connection has ended", client.number)
            self._bury(gone)
        except Exception:
            log.exception("the end of a connection was not served; its session ends when it has been silent for long")

    def tick(self) -> None:
        """Once a second or so: whatever no message and no pidfd tells."""
        try:
            self._bury(self.sessions.adopt_forked(look_anyway=True))
            self._bury(self.sessions.silent())
            self._bury([c for c in self.sessions.remote() if self._remote_rights(c.sender) is None])
            self.allocations.expire()
            self.line.expire()
        except Exception:
            log.exception("looking for forked clients, and for what has waited too long, failed; trying again")
        self.advance()

    def advance(self) -> None:
        """A turn's share of the work that is left."""
        try:
            self._take_back()
            self._bury_dropped()
            self.line.advance()
        except Exception:
            log.exception(
                "serving the line, or freeing what a client left, failed; the line is tried again when more is freed"
            )
            self.line.rest()

    def recover(self) -> None:
        """Takes over what a broker that was killed left in the arena, before any request. Raises ArenaError."""
        found = recover(self.plane, self._registry, self.allocations, self.sessions)
        self._leaving.extend(found.burying)
        self._bury(found.gone)

    def stop(self, timeout_s: float, for_good: bool = True) -> None:
        """Ends all types, so that nobody goes on alone, the sessions and the workers. `for_good` False: the workers alone, since
        another broker is to take over.
        """
        if for_good:
            self._type_worker.submit(self._registry.end_all, whatever_the_queue=True)
        for worker in (*self._page_workers, self._sync_worker, self._type_worker):
            if not worker.stop(timeout_s):
                log.warning("a worker is still busy after %g s; leaving it", timeout_s)
        if for_good:
            self.sessions.close()

    def stats(self) -> dict[str, Any]:
        """Counters and gauges; docs/protocol.md lists the keys."""
        clients = self.sessions.counters()
        geometry = self._arena.geometry
        pids = {client.number: client.pid for client in self.sessions.clients.values()} | {layout.NOBODY: 0}
        pids[layout.BROKER] = os.getpid()
        by_client = {
            str(number): counted | {"pid": pids[number]} for number, counted in clients.items() if number in pids
        }
        nursery_free = self.plane.read(layout.HAND_AT) + geometry.nursery_pages - self.plane.read(layout.HEAD_AT)
        # The hand passes pages by that no file takes: they are not to be granted.
        nursery_free = min(nursery_free, geometry.nursery_pages - self.health.state.pages)
        return {
            "arena": {
                "name": self._arena.name,
                "epoch": self._epoch,
                "size": geometry.size,
                "page_size": geometry.page_size,
                "policy": layout.POLICIES[geometry.policy],
                "spill_io": layout.SPILL_IO[geometry.spill_io],
                "slots": geometry.slots,
                "nursery": geometry.nursery_pages * geometry.page_size,
                "nursery_free": max(nursery_free, 0) * geometry.page_size,
            },
            "areas": {str(info.pop("name")): info for info in self.allocations.describe()},
            "types": {str(type_): described for type_, described in self._registry.describe().items()},
            "counters": {name: sum(counters[name] for counters in clients.values()) for name in clients[layout.NOBODY]},
            "clients": by_client,
            "broker": {
                "requests": dict(self._requests),
                "refusals": dict(self._refusals),
                "clients": len(self.sessions.clients),
                "in_line": len(self.line),
                "health": self.health.describe(),
            },
        }

    # --- on the control thread

    def _inherit(self, parent: int, child: int) -> None:
        self.allocations.inherit(parent, child, but_for=self.line.uncollected(parent))

    def _hello(self, peer: bytes, sender: Sender, p: dict[str, Any]) -> dict[str, Any]:
        pidns = p.get("pidns", 0)
        if pidns in (0, pid_namespace()) and sender.pid not in (0, p["pid"]):
            raise ProtocolError(f"hello in the name of process {p['pid']} from process {sender.pid}")
        if sender.remote and (p["mapped"] or "client" in p):
            raise ArenaError(
                "over TCP nobody maps the arena, or takes up a session: say hello with mapped false and no number, or use the ipc endpoint"
            )
        client = self.sessions.hello(
            peer, p["pid"], p["start"], p["mapped"], p.get("client"), sender, pidns, p.get("generation")
        )
        if "buffers" in p:  # whatever it does not know of was allocated for a reply that it never got
            known = [*p["buffers"], *self.line.uncollected(client.number)]
            self.allocations.reconcile(client.number, known, p.get("claims", ()), p.get("made", 0))
        whence = "comes over TCP" if sender.remote else f"is process {client.pid}"
        log.info("client %d %s%s", client.number, whence, "" if client.mapped else ", by messages")
        here = {} if sender.remote else {"arena": self._arena.name, "spill_dir": self._spill_dir}
        return here | {
            "client": client.number,
            "generation": self.sessions.generation(client),
            "arena_id": self._arena.arena_id,
            "epoch": self._epoch,
            "page_size": self._arena.geometry.page_size,
            "window": self.window,
            "batch": messages.batch_max(self._arena.geometry.page_size),
        }

    def _bye(self, client: Client, _request: Request) -> dict[str, Any]:
        log.info("client %d (process %d) says bye", client.number, client.pid)
        self._bury([client])
        return {}

    def _bury(self, clients: list[Client]) -> None:
        for client in clients:
            self.line.drop(client.number)
            self.sessions.forget(client)
            self._leaving.append(client.number)
        self._take_back()
        self._bury_dropped()

    @property
    def busy(self) -> bool:
        """Whether there is work left for the next turn of the loop, whatever comes."""
        return bool(self._leaving) or self.line.pending

    def _take_back(self) -> None:
        """Of the clients that have left, some of what they held: the others are not to wait until all of it is freed."""
        if not self._leaving:
            return
        # Off the list meanwhile: should this fail, it is logged once, and does not keep the loop busy.
        number = self._leaving.popleft()
        if self.allocations.drop(number, DROPS_MAX):
            self._leaving.appendleft(number)
            return
        self.allocations.holders.forget(number)
        self._dropped.append(number)

    def _bury_dropped(self) -> None:
        """Once nobody is left that holds something: one pass over the tables for all."""
        if self._leaving or not self._dropped:
            return
        dead, self._dropped = self._dropped, []

        def take_back() -> None:
            self.plane.bury(dead)
            for one in dead:
                self.sessions.buried(one)

        self._type_worker.submit(take_back, whatever_the_queue=True)

    def _ask(self, client: Client, request: Request, kind: int) -> dict[str, Any]:
        _refuse_unmapped(client)
        p = request.parameters
        wanted = self.allocations.wanted(p["nbytes"], p.get("area"), p.get("offset"), p.get("align"))
        timeout_s = p.get("timeout_ms", 0) / 1000
        got = self.line.ask(client.number, request.number, wanted, kind, p.get("name"), timeout_s)
        return self.allocations.place(got) if isinstance(got, Allocation) else {"ticket": got}

    def _collect(self, client: Client, request: Request) -> dict[str, Any]:
        ticket = request.parameters["ticket"]
        got = self.line.collect(client.number, ticket, request.parameters.get("give_up", False))
        return self.allocations.place(got) if got is not None else {"ticket": ticket}

    def _free_contig(self, client: Client, request: Request) -> dict[str, Any]:
        self.allocations.free(client.number, request.parameters["buffer"])
        return {}

    def _attach(self, client: Client, request: Request) -> dict[str, Any]:
        _refuse_unmapped(client)
        p = request.parameters
        claim = p.get("claim", 0)
        place = self.allocations.place(self.allocations.attach(client.number, p["buffer"], claim, p.get("token", 0)))
        return place | ({"claim": claim} if claim else {})

    def _attach_name(self, client: Client, request: Request) -> dict[str, Any]:
        _refuse_unmapped(client)
        return self.allocations.place(self.allocations.attach_name(client.number, request.parameters["name"]))

    def _hand_over(self, client: Client, request: Request) -> dict[str, Any]:
        p = request.parameters
        after_end_s = p["after_end_ms"] / 1000 if "after_end_ms" in p else math.inf
        token = self.allocations.hand_over(
            client.number, p["buffer"], p["timeout_ms"] / 1000, p.get("claim", 0), after_end_s
        )
        return {"token": token}

    def _free_claim(self, client: Client, request: Request) -> dict[str, Any]:
        self.allocations.free_claim(client.number, request.parameters["buffer"], request.parameters["claim"])
        return {}

    def _keep(self, client: Client, request: Request) -> dict[str, Any]:
        _refuse_unmapped(client)
        p = request.parameters
        if ("pid" in p) != ("start" in p):
            raise ProtocolError("keep: expected both pid and start, of a process, or neither")

        def keeper() -> int:
            return self.sessions.keeper(client, p["pid"], p["start"]).number if "pid" in p else layout.BROKER

        return {"keeper": self.allocations.keep(client.number, p["buffer"], p["name"], keeper)}

    def _unlink(self, client: Client, request: Request) -> dict[str, Any]:
        _refuse_unmapped(client)
        p = request.parameters
        self.allocations.unlink(p["name"], self.sessions.keepers(), p.get("buffer"))
        return {}

    def _names(self, _client: Client, request: Request) -> dict[str, Any]:
        names, more = self.allocations.names(request.parameters.get("after", ""), self.sessions.keepers())
        return {"names": names, "more": more}

    def _quota(self, client: Client | None, request: Request) -> dict[str, Any]:
        p = request.parameters
        number = p.get("client", client.number if client is not None else 0)
        if number not in self.sessions.clients:
            raise ValueError(f"there is no client {number}")
        if "nbytes" in p:
            self.allocations.set_quota(number, p["nbytes"] or None)
            log.info("client %d may hold %s", number, p["nbytes"] or "any number of bytes")
        quota = self.allocations.holders.quota_of(number)
        return {"client": number, "held": self.allocations.holders.held_bytes(number), "quota": quota or 0}

    def _area_drain(self, _client: Client | None, request: Request) -> dict[str, Any]:
        self.allocations.drain(request.parameters["area"])
        return self._area_told(request)

    def _area_resume(self, _client: Client | None, request: Request) -> dict[str, Any]:
        self.allocations.resume(request.parameters["area"])
        return self._area_told(request)

    def _area_resize(self, _client: Client | None, request: Request) -> dict[str, Any]:
        p, page_size = request.parameters, self._arena.geometry.page_size
        if ("nbytes" in p) == ("by" in p):
            raise ProtocolError("area_resize: expected either nbytes, the new size, or by, the difference")
        if "by" in p:
            (area,) = self.allocations.areas.of(p["area"])
            by = -(-abs(p["by"]) // page_size)
            pages = area.pages + (by if p["by"] > 0 else -by)
        else:
            pages = -(-p["nbytes"] // page_size)
        self.allocations.resize(p["area"], pages)
        self.line.reconsider()
        return self._area_told(request)

    def _area_told(self, request: Request) -> dict[str, Any]:
        name = request.parameters["area"]
        log.info("area %s: %s", name, request.operation)
        return next(info for info in self.allocations.describe() if info["name"] == name)

    def _submit(self, address: bytes, client: Client, request: Request) -> None:
        paged = request.operation in PAGED
        peer = Peer(address, client, client.window.enter(request, self.window, paged=paged))
        party = 0  # in the order in which they came, whoever sent them
        if request.operation == "sync":
            worker, job = self._sync_worker, self._sync(peer, request)
        else:
            worker = self._type_worker
            if paged:
                worker, party = self._page_workers[client.number % PAGE_WORKERS], client.number

            def job() -> None:
                self._work(peer, request)

        if not worker.submit(job, party):
            client.window.leave(peer.entry)
            raise ProtocolError("the broker's queue is full; try again later")

    def _refuse(self, number: int, error: Exception) -> Reply:
        reply = self._as_reply(number, error)
        self._refusals[reply.status] += 1
        return reply

    def answered(self, peer: Peer, reply: Reply) -> None:
        """For each reply that a worker gave: one request less under way."""
        # To an address that the session has left: nobody reads it there.
        has_reader = peer.address == peer.client.peer
        peer.client.window.leave(peer.entry, has_pages=bool(reply.pages) and has_reader)
        if reply.status != "ok":
            self._refusals[reply.status] += 1

    @staticmethod
    def lost(peer: Peer) -> None:
        """After `answered`, for a reply that reaches nobody."""
        peer.client.window.lost(peer.entry)

    # --- on any thread

    @staticmethod
    def _as_reply(number: int, error: Exception) -> Reply:
        if not isinstance(error, GcmaError | IndexError | ValueError):
            log.error("a request failed", exc_info=error)
            error = GcmaError("the broker failed on this request; its log says why")
        return messages.error_reply(number, error)

    # --- on the control thread, without a file or a wait

    def _store_at_hand(self, p: dict[str, Any], request: Request) -> Results | None:
        slots = self._registry.find(p["type"], p["life"])
        return ({}, []) if slots.store_at_hand(p["offset"], request.pages[0]) else None

    def _load_at_hand(self, p: dict[str, Any], _request: Request) -> Results | None:
        page = self._registry.find(p["type"], p["life"]).load_at_hand(p["offset"])
        if page is False:
            return None
        return {"hit": page is not None}, [] if page is None else [page]

    # --- on worker threads

    def _work(self, peer: Peer, request: Request) -> None:
        try:
            results, pages = self._jobs[request.operation](request.parameters, request)
            if pages and peer.entry.receipt:
                results["receipt"] = peer.entry.receipt
            reply = Reply(request.number, "ok", results, pages)
        except Exception as error:  # one request must not end the worker
            reply = self._as_reply(request.number, error)
        self._answer(peer, reply)

    def _sync(self, peer: Peer, request: Request) -> Job:
        """A sync in slices: what waits for somebody's write goes to the end of the queue, and nobody behind it
        waits.
        """
        p = request.parameters
        deadline = time.monotonic() + min(p.get("timeout_ms", SYNC_MAX_MS), SYNC_MAX_MS) / 1000

        def job() -> None:
            try:
                self._registry.find(p["type"], p["life"]).sync(SYNC_SLICE_S)
                reply = Reply(request.number, "ok", {})
            except SlotBusy as error:
                if time.monotonic() < deadline and self._sync_worker.submit(job):
                    return
                reply = self._as_reply(request.number, error)
            except Exception as error:  # one request must not end the worker
                reply = self._as_reply(request.number, error)
            self._answer(peer, reply)

        return job

    def _swap_init(self, p: dict[str, Any], _request: Request) -> Results:
        slots = self._registry.declare(p["type"], p["slots"], p["write"], p.get("share", layout.SHARE_WHOLE))
        return {
            "type": p["type"],
            "life": slots.life,
            "slots": slots.slots,
            "write": p["write"],
            "share": slots.share,
        }, []

    def _invalidate_area(self, p: dict[str, Any], _request: Request) -> Results:
        self._registry.end(p["type"], p["life"])
        return {}, []

    def _store(self, p: dict[str, Any], request: Request) -> Results:
        self._registry.find(p["type"], p["life"]).store(p["offset"], request.pages[0])
        return {}, []

    def _load(self, p: dict[str, Any], _request: Request) -> Results:
        page = self._registry.find(p["type"], p["life"]).load(p["offset"])
        return {"hit": page is not None}, [] if page is None else [page]

    def _store_many(self, p: dict[str, Any], request: Request) -> Results:
        slots = self._registry.find(p["type"], p["life"])
        slots.store_many(messages.unpack_offsets(p["offsets"]), request.pages[0])
        return {}, []

    def _load_many(self, p: dict[str, Any], _request: Request) -> Results:
        slots = self._registry.find(p["type"], p["life"])
        hits, pages = slots.load_batch(messages.unpack_offsets(p["offsets"]))
        return {"hits": hits}, [pages] if pages else []

    def _invalidate_page(self, p: dict[str, Any], _request: Request) -> Results:
        self._registry.find(p["type"], p["life"]).invalidate_page(p["offset"])
        return {}, []
