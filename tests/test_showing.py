"""`gcma status` and `gcma holders`: read from the arena, with and without a broker."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

import gcma_shm
from gcma_shm.arena import remove_dead
from gcma_shm.broker.cli import main
from gcma_shm.broker.reap import Reaper
from gcma_shm.endpoint import arena_name
from tests.processes import broker, eventually

PAGE = 4096
MIB = 1 << 20


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_with_and_without_a_broker(capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = f"ipc://{tempfile.gettempdir()}/b/broker"
    at = ("--endpoint", endpoint)
    try:
        with broker(endpoint, "--area", "a=4M", "--area", "b=1M,cache=off") as one:
            client = gcma_shm.connect(endpoint)
            client.swap(3, 100, "behind").store(1, b"x-gcma--" * (PAGE // 8))
            buffer = client.alloc_contig(3 * PAGE, area="b", name="frame")
            reservation = client.reserve(MIB, area="a")
            claimed = reservation.claim()
            client.drain_area("a")
            status = figures(capsys, "status", *at)
            assert (status["served"], status["stopped"], status["pid"], status["epoch"]) == (True, False, one.pid, 1)
            assert status["types"] == [{"type": 3, "slots": 100, "write": "behind", "share": 100}]
            assert status["clients"]["living"] == 1
            infos = {info.name: info for info in client.areas()}
            for area in status["areas"]:
                info = infos[area["area"]]
                found = [area[name] for name in ("size", "held", "reserved", "lent", "drained")]
                assert found == [info.size, info.held, info.reserved, info.lent, info.drained]
            os.kill(one.pid, signal.SIGSTOP)
            assert eventually(lambda: figures(capsys, "status", *at)["stopped"])
            os.kill(one.pid, signal.SIGCONT)
            holders = figures(capsys, "holders", *at)
            (mine,) = holders["clients"]
            assert (mine["pid"], mine["lives"], mine["buffers"], mine["reservations"]) == (os.getpid(), True, 1, 1)
            assert mine["held"] == 3 * PAGE + MIB
            frame, promised = sorted(holders["guests"], key=lambda guest: str(guest["kind"]))
            number = mine["client"]
            assert frame == {
                "name": "frame", "kind": "buffer", "area": "b", "offset": buffer.offset, "size": 3 * PAGE, "holders": [number],
                "claimed_by": 0, "kept": None,
            }  # fmt: skip
            assert (promised["kind"], promised["name"], promised["claimed_by"]) == ("reservation", None, number)
            assert main(["holders", *at]) == 0
            told = capsys.readouterr().out
            assert re.search(rf"^{number} +{os.getpid()} +1 +1 +1 MiB$", told, re.M)
            assert re.search(rf"^frame +buffer +b +0 B +12 KiB +{number}$", told, re.M)
            assert main(["status", *at]) == 0
            told = capsys.readouterr().out
            assert f"served by process {one.pid}\n" in told
            assert re.search(r"^a +4 MiB +1 MiB +1 MiB +0 B +drained$", told, re.M)
            one.stop(signal.SIGKILL)
            assert main(["status", *at]) == 0
            assert "without a broker: it has died" in capsys.readouterr().out
            assert figures(capsys, "holders", *at)["clients"] == holders["clients"]
            claimed.view[:1] = b"x"
            client.close()
    finally:
        Reaper(force=True).reap_endpoint(endpoint)
        remove_dead(arena_name(endpoint))
    assert not Path(endpoint.removeprefix("ipc://")).exists()
    assert main(["status", *at]) == 1
    assert capsys.readouterr().err.startswith("gcma status: there is no arena")
