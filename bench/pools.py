"""What does a worker pool take to hand over large arrays, and small results? Ours beside ProcessPoolExecutor, loky, joblib, SharedMemory by hand, and Ray.

Three jobs, each pool at its best use of those that a user would write: a large array to a worker and an equally large result back; the same array to many
tasks; many small tasks. All contenders do the same computation and are warm; they take turns within rounds, in a new order each time, and what they give is
looked at each time, outside the time. Then the memory that N workers take over one array. What is not installed is left out and told.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pools_memory
import pools_ours
import pools_peers
import pools_ray
import pools_tell
from _common import OUT, describe_machine, machine, tell, write_json
from pools_job import CHUNKS, JOBS, SMALL, Contender, Given, NotHere, take_turns

from gcma_shm.sizes import parse_size

POOLS = ("standard", "loky", "joblib", "ray")
PEERS = ("loky", "joblib", "ray")  # what has a version of its own
SHM = Path("/dev/shm")  # where joblib puts its own files, too
SMALL_TIMES = 2  # rounds of small tasks, for each other one: their ratio is close to 1


def make(
    options: argparse.Namespace, given: Given, stack: ExitStack
) -> tuple[dict[str, list[Contender]], dict[str, str]]:
    """The contenders by job; and the peers that are not here, with the reason. Pools that fork come before what has threads."""
    context = multiprocessing.get_context(options.start)
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gcma-bench-", dir=SHM)))
    made: dict[str, Callable[[], dict[str, list[Contender]]]] = {
        "standard": lambda: pools_peers.standard(given, context, stack),
        "loky": lambda: pools_peers.loky(given, stack),
        "joblib": lambda: pools_peers.joblib(given, directory, stack),
        "ray": lambda: pools_ray.contenders(given, stack),
    }
    names = {"loky": pools_peers.LOKY, "joblib": pools_peers.JOBLIB, "ray": pools_ray.RAY}
    found = pools_ours.contenders(given, options.arena, context, stack)
    missing: dict[str, str] = {}
    for pool in options.pools:
        try:
            for job, contenders in made[pool]().items():
                found[job] += contenders
        except NotHere as reason:
            missing[names[pool]] = str(reason)
    return {job: found[job] for job in options.jobs}, missing


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    options = parse(argv)
    found = machine()
    found["versions"] |= {name: _version(name) for name in PEERS}
    print(describe_machine(found))
    array = np.random.default_rng(options.seed).random(options.size // 8)
    given = Given(array, options.tasks, options.small, options.workers)
    with ExitStack() as stack:
        contenders, missing = make(options, given, stack)
        for job, each in contenders.items():
            rounds = options.rounds * (SMALL_TIMES if job in (SMALL, CHUNKS) else 1)
            take_turns(each, lambda result, job=job: given.right(job, result), rounds)  # type: ignore[misc]
            print(f"{job}: {rounds} rounds, each result as it should be", flush=True)
    context = multiprocessing.get_context(options.start)
    grown = pools_memory.measure(given, options.memory, options.arena, context) if options.memory else {}
    sections = pools_tell.sections(contenders, grown, missing, given)
    for section in sections:
        tell(section)
    question = str(__doc__).splitlines()[0]
    write_json(options.out, question, found, vars(options), pools_tell.plain(contenders, grown), sections)
    return 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", type=parse_size, default=64 << 20, metavar="SIZE", help="of the array (default: 64M)")
    add("--tasks", type=int, default=100, metavar="N", help="that the same array goes to (default: 100)")
    add("--small", type=int, default=10_000, metavar="N", help="small tasks (default: 10,000)")
    add("--workers", type=int, default=2, metavar="N", help="of each pool (default: 2)")
    add("--rounds", type=int, default=12, metavar="N", help="default: 12; of small tasks twice as many")
    add("--jobs", nargs="+", choices=JOBS, default=list(JOBS), metavar="JOB", help=f"of: {', '.join(JOBS)}")
    add(
        "--pools",
        nargs="*",
        choices=POOLS,
        default=list(POOLS),
        metavar="POOL",
        help=f"beside ours, of: {', '.join(POOLS)}",
    )
    add(
        "--memory",
        type=int,
        nargs="*",
        default=[1, 2, 4, 8],
        metavar="N",
        help="workers over one array (default: 1 2 4 8)",
    )
    add("--start", choices=multiprocessing.get_all_start_methods(), default="fork", help="of ours and the standard library's workers (default: fork)")  # fmt: skip
    add(
        "--arena",
        type=parse_size,
        default=1 << 30,
        metavar="SIZE",
        help="must hold the array eight times (default: 1G)",
    )
    add("--seed", type=int, default=1, metavar="N")
    add("--out", type=Path, default=OUT / "pools.json", metavar="FILE")
    options = parser.parse_args(argv)
    if min(options.size // 8, options.tasks, options.small, options.workers, options.rounds, *options.memory) < 1:
        parser.error("sizes and counts must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
