"""What do others take to load and to store a page? Ours beside LMDB, Redis, memcached, diskcache, a file and a mapped file, in one run.

Each peer at its best settings; the servers are started on Unix sockets in a directory of this script's own, without persistence, and ended by it.
Pages of random numbers, a working set that is in memory everywhere, page by page and in batches, one worker process and two. Every way to load and to
store is proved on stamped pages before it is timed. Contenders take turns within rounds. What is not installed is left out and told.

Loads give new bytes, but for those that say otherwise. Our stores are written behind and sustained: a block laps the nursery many times, and what
is still to be written when it ends is told beside, as a row of its own. What a server or our broker takes of the processors is a column.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import peers_tell
from _common import OUT, Crew, crew, describe_machine, machine, scratch, tell, write_json
from peers_blackboard import board
from peers_servers import KINDS, Server, resident_bytes, serving
from peers_tell import Found
from peers_ways import OPERATIONS, STORE, STORE_MANY, NotHere, Place
from peers_work import OPTIONAL, SERVER_OF, STORES, Block, make_worker

import gcma_shm
from gcma_shm.sizes import format_size, parse_size

BATCH = 64  # pages
BATCH_BYTES_MAX = 8 << 20  # ... but no more than this
BATCHES_MIN = 4  # in a block
SINGLES_NS = 2e8  # what timing single calls may take
SINGLES = (64, 4000)


class Measurement:
    """One page size with one number of workers."""

    def __init__(
        self, options: argparse.Namespace, place: Place, team: Crew, pids: dict[str, int], nursery: int
    ) -> None:
        self._options = options
        self._place = place
        self._team = team
        self._first = Crew(team.connections[:1])
        self._pids = pids
        self._nursery_pages = nursery
        self._workers = len(team.connections)
        answers = team.ask("contenders")
        self.missing: dict[str, str] = answers[0][1]
        # What every worker can do: a blackboard, for one, has a single writer.
        self._ways: dict[str, list[tuple[str, str]]] = {
            operation: [way for way in ways if all(way in other[operation] for other, _ in answers)]
            for operation, ways in answers[0][0].items()
        }

    def run(self) -> dict[str, dict[str, Found]]:
        """Every operation's contenders, proved before."""
        self._first.ask("fill")
        self._first.ask("settle")
        proved = sum(self._team.ask("prove_loads")) + sum(self._first.ask("prove_stores"))
        found = {operation: self._operation(operation) for operation in self._options.operation}
        whole = sum(self._first.ask("prove_whole"))
        print(
            f"{format_size(self._place.page_size)}, {self._workers} worker(s): {proved} pages proved before the timing, {whole} whole after it",
            flush=True,
        )
        return found

    def _operation(self, operation: str) -> dict[str, Found]:
        self._first.ask("settle")
        store_of = dict(self._ways[operation])
        pages = {name: self._pages(operation, name) for name in store_of}
        found = {name: Found() for name in store_of}
        names = list(store_of)
        for turn in range(self._options.rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                self._block(operation, name, store_of[name], pages[name], found)
        for name in names:
            calls = int(np.clip(SINGLES_NS / found[name].call_ns(self._calls_of(operation)), *SINGLES))
            for times in self._team.ask("singles", operation, name, calls):
                found[name].singles += times
            if "behind" in name:
                self._first.ask("sync")
        return found

    def _calls_of(self, operation: str) -> int:
        return 1 if operation in ("load", "store") else self._place.batch

    def _pages(self, operation: str, name: str) -> int:
        """Of a block: what takes as long as was asked for, and of a store behind at least so many laps of the nursery."""
        for _ in range(2):  # once to warm up
            blocks: list[Block] = self._team.ask("block", operation, name, BATCHES_MIN * self._place.batch)
        each = max(block.wall_ns / block.pages for block in blocks)
        pages = max(int(self._options.block_s * 1e9 / each), BATCHES_MIN * self._place.batch)
        if operation in (STORE, STORE_MANY) and "behind" in name:
            pages = max(pages, self._options.wraps * self._nursery_pages // self._workers)
        return pages

    def _block(self, operation: str, name: str, store: str, pages: int, found: dict[str, Found]) -> None:
        pid = self._pids.get(SERVER_OF.get(store, ""))
        before = peers_tell.cpu_ns(pid)
        blocks: list[Block] = self._team.ask("block", operation, name, pages)
        one = found[name]
        if operation in (STORE, STORE_MANY) and store in ("ours", "messages"):
            # Before the next one's turn, or our writing would be at its cost; the broker's time for it is ours.
            one.sync_ns.append(max(self._first.ask("sync")))
        one.add(blocks, peers_tell.cpu_ns(pid) - before, sustained=operation in (STORE, STORE_MANY))


def start(stores: list[str], directory: Path, stack: ExitStack) -> tuple[dict[str, Server], dict[str, str]]:
    """The servers that these stores need; and the stores whose server is not here, with the reason."""
    servers: dict[str, Server] = {}
    missing: dict[str, str] = {}
    for name in KINDS:
        clients = [store for store in stores if SERVER_OF.get(store) == name]
        try:
            if clients:
                servers[name] = stack.enter_context(serving(name, directory))
        except NotHere as reason:
            missing |= dict.fromkeys(clients, str(reason))
    return servers, missing


def measure(
    options: argparse.Namespace, page_size: int, directory: Path, servers: dict[str, Server], stores: list[str]
) -> dict[str, Any]:
    """One page size: a broker and files of its own, and the servers."""
    pages = options.working_set // page_size
    home = directory / f"pages-{page_size}"
    home.mkdir()
    with ExitStack() as stack:
        client = stack.enter_context(
            gcma_shm.embedded(options.arena, page_size=page_size, slots=4 * pages, spill_dir=home, prefault=True)
        )
        sockets = {name: server.socket for name, server in servers.items()}
        batch = max(min(BATCH, BATCH_BYTES_MAX // page_size), 1)
        place = Place(page_size, pages, batch, options.seed, home, client.endpoint, sockets)
        missing: dict[str, str] = {}
        if "iceoryx2" in stores:
            try:
                sockets["iceoryx2"] = stack.enter_context(board(home, page_size, pages))
            except NotHere as reason:
                missing["iceoryx2"] = str(reason)
        wanted = [store for store in stores if store not in missing]
        pids = {name: server.pid for name, server in servers.items()} | {"broker": client.broker_pid}
        nursery = client.stats()["arena"]["nursery"] // page_size
        by_workers = {}
        for workers in options.workers:
            with crew(workers, make_worker, place, wanted) as team:
                measurement = Measurement(options, place, team, pids, nursery)
                by_workers[workers] = measurement.run()
                missing |= measurement.missing
        memory = {name: resident_bytes(server.pid) for name, server in servers.items()}
        disk = {
            "ours" if path.name.startswith("gcma-") else path.name: peers_tell.disk_bytes(path)
            for path in sorted(home.iterdir())
        }
    return {
        "page_size": page_size, "pages": pages, "batch": batch, "nursery_pages": nursery, "missing": missing,
        "workers": by_workers, "resident_bytes": memory, "disk_bytes": disk,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    options = parse(argv)
    found = machine()
    print(describe_machine(found))
    missing: dict[str, str] = {}
    results = []
    with scratch() as directory:
        for page_size in options.page_size:
            with ExitStack() as stack:  # new servers for each size, so that their memory is of this one
                servers, not_here = start(options.stores, directory, stack)
                stores = [store for store in options.stores if store not in not_here]
                results.append(measure(options, page_size, directory, servers, stores))
                missing |= not_here | results[-1]["missing"]
    sections = peers_tell.sections(results, missing, options)
    for section in sections:
        tell(section)
    question = str(__doc__).splitlines()[0]
    write_json(options.out, question, found, vars(options), peers_tell.plain(results), sections)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--page-size", type=parse_size, nargs="+", default=[4 << 10, 64 << 10, 1 << 20], metavar="SIZE")
    add("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="processes at once (default: 1 2)")
    add("--operation", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), metavar="OPERATION", help=f"of: {', '.join(OPERATIONS)}")  # fmt: skip
    add("--stores", nargs="+", choices=list(STORES), default=[name for name in STORES if name not in OPTIONAL], metavar="STORE", help=f"of: {', '.join(STORES)}; ours is always there; default: all but {', '.join(OPTIONAL)}, which installs pyarrow 11 in ~/.cache/gcma-bench")  # fmt: skip
    add("--rounds", type=int, default=9, metavar="N")
    add("--block-s", type=float, default=0.1, metavar="SECONDS", help="of each contender in its turn")
    add("--wraps", type=int, default=12, metavar="N", help="of the nursery, in a block of stores behind (default: 12)")
    add("--working-set", type=parse_size, default=80 << 20, metavar="SIZE")
    add("--arena", type=parse_size, default=384 << 20, metavar="SIZE", help="must hold the working set twice")
    add("--seed", type=int, default=1, metavar="N")
    add("--out", type=Path, default=OUT / "peers.json", metavar="FILE")
    options = parser.parse_args(argv)
    if options.rounds < 1 or min(options.workers) < 1 or options.block_s <= 0 or options.wraps < 1:
        parser.error("workers, rounds and wraps must be at least 1, the block's time more than 0")
    if "ours" not in options.stores:
        options.stores.insert(0, "ours")
    return options


if __name__ == "__main__":
    sys.exit(main())
