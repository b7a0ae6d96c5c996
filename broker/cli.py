"""The command `gcma`.

A command's modules are imported when it is asked for: whoever starts a broker waits for it to serve, and half of that is imports.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gcma_shm import layout
from gcma_shm.areas import AreaSpec, parse_area
from gcma_shm.broker.ask import ask
from gcma_shm.broker.keys import keygen
from gcma_shm.broker.log import logging_to_standard_error
from gcma_shm.curve import credentials_of
from gcma_shm.endpoint import default_endpoint
from gcma_shm.errors import GcmaError, in_words
from gcma_shm.sizes import format_size, parse_size

if TYPE_CHECKING:
    from gcma_shm.broker.process import Settings

AREA_COLUMNS = ("size", "held", "reserved", "lent", "free", "largest_free")


def main(arguments: list[str] | None = None) -> int:
    """Runs `gcma` with these arguments, by default the process's own; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["stress"]:  # another program: what it does is a client's work
        os.execv(sys.executable, [sys.executable, "-P", "-m", "gcma_shm.clients.stress", *given[1:]])  # noqa: S606 - our own module
    parser = _parser(given[:1] == ["broker"])
    parsed = parser.parse_args(given)
    try:
        return int(parsed.run(parser, parsed))
    except (GcmaError, OSError, ValueError) as error:
        print(f"gcma {parsed.command}: {in_words(error)}", file=sys.stderr)
        return 1


# --- gcma broker


def _broker(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    from gcma_shm.broker.process import run

    try:
        settings = _settings(parsed)
    except ValueError as error:
        parser.error(str(error))

    asked = [parsed.ready_fd] if parsed.ready_fd >= 0 else []  # who started us wants to know, once

    def ready(description: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(1, f"{description}\n".encode())
        if asked:
            with contextlib.suppress(OSError):  # its owner's end is told by other means
                _tell(asked.pop(), "ready")

    try:
        with logging_to_standard_error(parsed.log_level):
            run(settings, ready)
    except (GcmaError, OSError, ValueError) as error:
        if not asked:
            raise
        _tell(asked.pop(), in_words(error))
        return 1
    return 0


def _tell(fd: int, words: str) -> None:
    """To the owner of an embedded broker: "ready", or why not."""
    os.write(fd, words.replace("\n", " ").encode() + b"\n")
    os.close(fd)


def _settings(parsed: argparse.Namespace) -> Settings:
    from gcma_shm.broker.door import Doorway
    from gcma_shm.broker.process import Settings

    areas: dict[str, AreaSpec] = {}
    for text in parsed.area:
        name, separator, spec = text.partition("=")
        if not separator or name in areas:
            raise ValueError(f"--area {text}: expected NAME=SIZE, each name once, such as frames=512M")
        areas[name] = parse_area(spec)
    doorway = Doorway(tuple(parsed.listen), parsed.curve_key, parsed.authorized, parsed.insecure)
    doorway.check(parsed.endpoint)
    return Settings(
        endpoint=parsed.endpoint,
        size=parse_size(parsed.size),
        areas=areas,
        page_size=parse_size(parsed.page_size),
        slots=parsed.slots,
        clients_max=parsed.clients,
        quota=parse_size(parsed.quota) if parsed.quota else None,
        spill_dir=parsed.spill_dir,
        spill_io=parsed.spill_io,
        policy=parsed.policy,
        owner_pidfd=parsed.owner_pidfd,
        doorway=doorway,
    )


# --- gcma keygen


def _keygen(_parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    made = keygen(parsed.directory, [parsed.name] if parsed.name else ["server", "client"])
    for name, public in made.items():
        print(f"{name} {public}")  # a line for the file of authorized keys
    return 0


# --- gcma area, gcma quota


def _ask(parsed: argparse.Namespace, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return ask(
        parsed.endpoint, operation, parameters, credentials_of(parsed.endpoint, parsed.curve_key, parsed.server_key)
    )


def _area_list(_parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    results = _ask(parsed, "areas", {})
    _print_areas(results["areas"], results if parsed.json else None)
    if not parsed.json and results["spare"]:
        print(f"\nin no area: {format_size(results['spare'])}")
    return 0


def _area_change(_parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    parameters: dict[str, Any] = {"area": parsed.name}
    operation = f"area_{parsed.action}"
    if parsed.action in ("grow", "shrink"):
        parameters["by"] = parse_size(parsed.size) * (1 if parsed.action == "grow" else -1)
        operation = "area_resize"
    info = _ask(parsed, operation, parameters)
    _print_areas([info], info if parsed.json else None)
    return 0


def _print_areas(infos: list[dict[str, Any]], figures: dict[str, Any] | None) -> None:
    if figures is not None:
        print(json.dumps(figures))
        return
    rows = [["area", *AREA_COLUMNS, ""]]
    for info in infos:
        notes = ["drained"] if info["drained"] else []
        notes += [] if info["cache"] else ["not lent"]
        notes += [f"{info['share']} % for buffers"] if info["share"] != 100 else []
        rows.append([info["name"], *(format_size(info[column]) for column in AREA_COLUMNS), ", ".join(notes)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _quota(_parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    parameters = {"client": parsed.client}
    if parsed.size is not None:
        parameters["nbytes"] = 0 if parsed.size == "none" else parse_size(parsed.size)
    told = _ask(parsed, "quota", parameters)
    if parsed.json:
        print(json.dumps(told))
    else:
        bound = f"of {format_size(told['quota'])}" if told["quota"] else "without bound"
        print(f"client {told['client']} holds {format_size(told['held'])} {bound}")
    return 0


# --- arguments


def _parser(broker_only: bool) -> argparse.ArgumentParser:
    """Of all commands, or of the one."""
    parser = argparse.ArgumentParser(
        prog="gcma", description="Guaranteed contiguous shared memory, lent out as a page cache."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_broker(commands)
    if not broker_only:
        _add_others(commands)
    return parser


def _add_broker(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    broker = commands.add_parser("broker", help="own an arena and serve it until SIGTERM or SIGINT")
    broker.set_defaults(run=lambda _, parsed: _broker(broker, parsed))  # an error shows the usage of this command
    broker.add_argument("--size", required=True, help="of the arena, tables included: 256M, 4G, or bytes")
    broker.add_argument(
        "--area",
        action="append",
        default=[],
        metavar="NAME=SIZE[,cache=on|off][,align=SIZE][,share=PERCENT]",
        help="may be repeated; without, one called `default`. cache=off: never lent; align: of every buffer in it; "
        "share: what buffers may have of it at once",
    )
    broker.add_argument("--page-size", default="4K", help="a power of two from 4K to 2M (default %(default)s)")
    broker.add_argument("--slots", type=int, help="of all swap types together, 16 bytes each (default: four per page)")
    broker.add_argument(
        "--clients", type=int, help="at once, the broker included (default: by the arena's size, at most 256)"
    )
    broker.add_argument("--quota", help="what each client may hold in buffers and reservations (default: no bound)")
    broker.add_argument("--spill-dir", type=Path, help="a directory on a disk (default: in the user's cache directory)")
    broker.add_argument(
        "--spill-io",
        default=layout.SPILL_IO[0],
        choices=layout.SPILL_IO,
        help="buffered: spill files through the kernel's page cache; uncached: dropped from it behind the write; direct: past it "
        "(default %(default)s)",
    )
    broker.add_argument(
        "--policy",
        default=layout.POLICIES[0],
        choices=layout.POLICIES,
        help="what stays in memory (default %(default)s)",
    )
    broker.add_argument("--endpoint", default=default_endpoint(), help="where to listen (default %(default)s)")
    broker.add_argument(
        "--listen",
        action="append",
        default=[],
        metavar="tcp://ADDRESS:PORT",
        help="listen there, too; may be repeated; port 0: any. Needs keys",
    )
    broker.add_argument("--curve-key", type=Path, metavar="FILE", help="the broker's secret key, made by `gcma keygen`")
    broker.add_argument(
        "--authorized",
        type=Path,
        metavar="FILE",
        help="who may come over TCP: lines of NAME KEY [types=3,7-9] [alloc=no] [admin=yes]",
    )
    broker.add_argument("--insecure", action="store_true", help="over TCP on a loopback address, without keys")
    broker.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    broker.add_argument("--owner-pidfd", type=int, default=-1, help=argparse.SUPPRESS)
    broker.add_argument("--ready-fd", type=int, default=-1, help=argparse.SUPPRESS)


def _add_others(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from gcma_shm.broker.checking import add_check
    from gcma_shm.broker.mapping import add_map
    from gcma_shm.broker.reap import add_reap
    from gcma_shm.broker.showing import add_showing
    from gcma_shm.broker.top import add_top

    asking = argparse.ArgumentParser(add_help=False)
    asking.add_argument("--endpoint", default=default_endpoint(), help="of the broker (default %(default)s)")
    asking.add_argument("--curve-key", metavar="FILE", help="over TCP: our secret key (default $GCMA_CURVE_KEY)")
    asking.add_argument(
        "--server-key", metavar="KEY", help="over TCP: the broker's public key (default $GCMA_SERVER_KEY)"
    )
    asking.add_argument("--json", action="store_true", help="figures in bytes, for programs")
    area = commands.add_parser("area", help="the areas of a running broker: list, drain, resume, grow, shrink")
    actions = area.add_subparsers(dest="action", required=True)
    actions.add_parser("list", parents=[asking], help="what each holds and lends").set_defaults(run=_area_list)
    for action, words in (
        ("drain", "take an area out of service: no new buffers, no cache; who holds one there keeps it"),
        ("resume", "put a drained area back into service"),
        ("grow", "give an area memory that is in no area"),
        ("shrink", "take memory from the end of an area, where no buffer is"),
    ):
        change = actions.add_parser(action, parents=[asking], help=words)
        change.set_defaults(run=_area_change)
        change.add_argument("name", metavar="NAME")
        if action in ("grow", "shrink"):
            change.add_argument("size", metavar="BY", help="64M, 1G, or bytes; rounded up to pages")
    commands.add_parser(
        "stress", help="whether an arena keeps its promises while everything goes wrong; on an arena of its own"
    )
    quota = commands.add_parser("quota", parents=[asking], help="what a client holds and may hold")
    quota.set_defaults(run=_quota)
    quota.add_argument("client", type=int, metavar="CLIENT", help="its number, as errors and statistics tell it")
    quota.add_argument("size", nargs="?", metavar="SIZE", help="its new quota; `none`: no bound")
    keys = commands.add_parser("keygen", help="make keys for connections over TCP; never writes over a file")
    keys.set_defaults(run=_keygen)
    keys.add_argument("directory", type=Path, metavar="DIRECTORY")
    keys.add_argument("name", nargs="?", metavar="NAME", help="of the one pair to be made (default: server and client)")
    add_check(commands)
    add_reap(commands)
    add_showing(commands)
    add_map(commands)
    add_top(commands)


if __name__ == "__main__":
    sys.exit(main())
