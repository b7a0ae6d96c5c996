"""The command `gcma`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from gcma_shm.broker.process import Settings, run
from gcma_shm.endpoint import default_endpoint
from gcma_shm.errors import GcmaError
from gcma_shm.sizes import parse_size


def main(arguments: list[str] | None = None) -> int:
    """Runs `gcma` with these arguments, by default the process's own; returns the exit status."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=parsed.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = _settings(parsed)
    except ValueError as error:
        parser.error(str(error))

    asked = [parsed.ready_fd] if parsed.ready_fd >= 0 else []  # who started us wants to know, once

    def ready(description: str) -> None:
        print(description, flush=True)
        if asked:
            _tell(asked.pop(), "ready")

    try:
        run(settings, ready)
    except (GcmaError, OSError, ValueError) as error:
        if asked:
            _tell(asked.pop(), str(error))
        else:
            print(f"gcma broker: {error}", file=sys.stderr)
        return 1
    return 0


def _tell(fd: int, words: str) -> None:
    """To the owner of an embedded broker: "ready", or why not."""
    os.write(fd, words.replace("\n", " ").encode() + b"\n")
    os.close(fd)


def _settings(parsed: argparse.Namespace) -> Settings:
    areas: dict[str, int] = {}
    for spec in parsed.area:
        name, separator, size = spec.partition("=")
        if not separator or name in areas:
            raise ValueError(f"--area {spec}: expected NAME=SIZE, each name once, such as frames=512M")
        areas[name] = parse_size(size)
    return Settings(
        endpoint=parsed.endpoint,
        size=parse_size(parsed.size),
        areas=areas,
        page_size=parse_size(parsed.page_size),
        slots=parsed.slots,
        clients_max=parsed.clients,
        spill_dir=parsed.spill_dir,
        owner_pidfd=parsed.owner_pidfd,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gcma", description="Guaranteed contiguous shared memory, lent out as a page cache."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    broker = commands.add_parser("broker", help="own an arena and serve it until SIGTERM or SIGINT")
    broker.add_argument("--size", required=True, help="of the arena, tables included: 256M, 4G, or bytes")
    broker.add_argument(
        "--area",
        action="append",
        default=[],
        metavar="NAME=SIZE",
        help="may be repeated; without, one called `default`",
    )
    broker.add_argument("--page-size", default="4K", help="a power of two from 4K to 2M (default %(default)s)")
    broker.add_argument("--slots", type=int, help="of all swap types together, 16 bytes each (default: four per page)")
    broker.add_argument(
        "--clients", type=int, help="at once, the broker included (default: by the arena's size, at most 256)"
    )
    broker.add_argument("--spill-dir", type=Path, help="a directory on a disk (default: in the user's cache directory)")
    broker.add_argument("--endpoint", default=default_endpoint(), help="where to listen (default %(default)s)")
    broker.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    broker.add_argument("--owner-pidfd", type=int, default=-1, help=argparse.SUPPRESS)
    broker.add_argument("--ready-fd", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
