"""`gcma stress`: a short round of everything at once, and proof that what it is to find it finds.

GCMA_SEED repeats the seed that a round printed. `make soak` is the long way round.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import gcma_shm
from gcma_shm.clients import chaos as chaos_module
from gcma_shm.clients import stress
from gcma_shm.clients.chaos import KINDS, Chaos
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.clients.history import Kind, Log, Operation, gather
from gcma_shm.clients.linearizable import check
from gcma_shm.clients.proof import UNIQUE, ZEROS, TornPage, make_page, value_id
from gcma_shm.clients.stress_broker import BrokerProcess
from gcma_shm.clients.stress_children import WORDS_MAX, Shared, fork
from gcma_shm.clients.stress_guest import Guest
from gcma_shm.clients.stress_plan import Plan
from gcma_shm.clients.stress_rest import Rest
from gcma_shm.clients.stress_round import Rage, Result, Round
from gcma_shm.clients.stress_work import Worker, read_all
from gcma_shm.process import start_time
from tests.faults.builds import ROOT
from tests.invariants import check_at_rest
from tests.processes import WAIT_S, Said, eventually, forked, stands_still

SEED = int(os.environ.get("GCMA_SEED", time.time_ns() & 0xFFFFFFFF))
SECONDS = 4.0  # of one round
OCCURRED = ("kills", "stops", "restarts", "allocations", "claims", "drains", "ends", "full")
PLAN = Plan(nursery_pages=20, area_pages=(24,), wide=16, types=1)
pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("page_size", [4096, 65536])
def test_everything_at_once(page_size: int, tmp_path: Path) -> None:
    rage = Rage(page_size, kinds=frozenset(KINDS), seed=SEED)
    print(f"seed {SEED}")
    with Round(rage, tmp_path) as running:
        for _ in range(10):
            running.rage(SECONDS)
            refused = running.broker.pid and running.owner.stats()["counters"]["spill_failures"]
            if refused and all(running.counts()[what] for what in OCCURRED):
                break
        result = running.judge(check_at_rest)
    assert not result.lost, f"seed {SEED}: {result.lost}"
    assert result.operations > 1000
    assert not [what for what in (*OCCURRED, "spill_failures") if not result.counts[what]], f"{result.counts}"


def rage_until(running: Round, more: int) -> None:
    """Again and again, as long as it takes to do so many more operations."""
    goal, deadline = running.operations + more, time.monotonic() + WAIT_S
    while running.operations < goal:
        assert time.monotonic() < deadline, f"{goal - running.operations} operations of {more} are missing"
        running.rage(1.0)
        assert not running.result.losses, f"seed {SEED}: {running.result.lost}"  # it would not go on


def test_rages_follow_one_another_with_as_many_processes(tmp_path: Path) -> None:
    seen: set[int] = set()
    with Round(Rage(kinds=frozenset({"alloc"}), seed=SEED), tmp_path) as running:
        running.meanwhile = lambda: seen.add(len(running.children))
        for _ in range(2):
            rage_until(running, 1000)
            assert seen == {8}
            assert running.children == []
        assert running.judge().lost == []


def test_a_recorded_history_that_is_altered_is_found(tmp_path: Path) -> None:
    with Round(Rage(kinds=frozenset(), seed=SEED), tmp_path) as running:
        rage_until(running, 5000)
        assert running.judge().losses == 0
        history = gather(running.logs)
    history = [operation for operation in history if operation.slot == 0]
    assert check(history) == []
    rng = random.Random(SEED)
    stores = [o for o in history if o.kind is Kind.STORE]
    old = min((o for o in stores if o.value >= UNIQUE), key=lambda o: o.end_ns)
    gone_ns = min(o.end_ns for o in stores if o.start_ns > old.end_ns)  # from then on it is never seen again
    places = [n for n, o in enumerate(history) if o.kind is Kind.LOAD and o.value > ZEROS and o.start_ns > gone_ns]
    for place in rng.sample(places, 10):
        load = history[place]
        altered = Operation(Kind.LOAD, 0, old.value, load.start_ns, load.end_ns, load.writer)
        wrong = check([*history[:place], altered, *history[place + 1 :]])
        assert wrong, f"seed {SEED}: not found: {altered} instead of {load}"
        assert all("slot 0" in words for words in wrong)


@contextlib.contextmanager
def command(*options: str) -> Iterator[subprocess.Popen[str]]:
    """`gcma stress` as users run it; its temporary files where this test's are."""
    process = subprocess.Popen(
        [Path(sys.executable).parent / "gcma", "stress", *options],
        env=os.environ | {"TMPDIR": tempfile.gettempdir()}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        assert process.stdout is not None
        process.stdout.close()
        process.wait()


def test_the_command_tells_its_seed_its_figures_and_the_end() -> None:
    with command("--seconds", "2", "--tell-every", "1", "--seed", str(SEED), "--chaos", "kill,alloc") as process:
        said, _ = process.communicate(timeout=4 * WAIT_S)
    lines = said.splitlines()
    assert process.returncode == 0, said
    assert lines[0].startswith(f"seed {SEED}; chaos: kill, alloc;")
    assert len(lines) >= 3
    for line in lines[1:]:
        assert line.endswith("losses 0")
        assert all(f"{what} " in line for what in ("operations", *stress.COUNTS))
    assert not list(Path(tempfile.gettempdir()).iterdir()), "the logs of a round without losses are left"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_command_leaves_nothing_however_it_ends(number: int) -> None:
    """Broker and arena are looked for by conftest; here its workers are. Without restarts: killed while there is no broker, nobody
    is left to remove the arena, but `gcma reap`.
    """
    kinds = ",".join(kind for kind in KINDS if kind != "restart")
    with command("--seconds", "60", "--tell-every", "0.2", "--page-size", "4K", "--chaos", kinds) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert " operations " in process.stdout.readline()
        children = _descendants(process.pid)
        assert len(children) > 3
        process.send_signal(number)
        assert process.wait(WAIT_S) == (-number if number == signal.SIGKILL else 128 + number)
    assert eventually(lambda: not any(_alive(*child) for child in children))


def _descendants(pid: int) -> list[tuple[int, int | None]]:
    """Each by its number and its start: numbers are used again."""
    found: list[tuple[int, int | None]] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            for word in path.read_text().split():
                found += [(int(word), start_time(int(word))), *_descendants(int(word))]
    return found


def _alive(pid: int, start: int | None) -> bool:
    return start is not None and start_time(pid) == start


def test_a_loss_is_told_and_ends_it_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Worker._store

    def forget(self: Worker, swap: object, offset: int) -> None:
        """A store that is acknowledged and lost, now and then."""
        if self._rng.random() < 0.01:
            self._sequence += 1
            slot = swap.swap.type * (1 << 32) + offset  # type: ignore[attr-defined]
            self._log.end(self._log.begin(Kind.STORE, slot, value_id(self._log.writer, self._sequence)))
        else:
            real(self, swap, offset)  # type: ignore[arg-type]

    monkeypatch.setattr(Worker, "_store", forget)
    monkeypatch.setattr(stress, "ROUND_S", 1.0)
    assert stress.main(["--seconds", "120", "--chaos", "none", "--seed", str(SEED), "--page-size", "4K"]) == 1
    said = capsys.readouterr().out
    assert "the logs of that round are in" in said
    assert re.search(rf"^seed {SEED}, pages of 4 KiB: (LOAD|STORE) slot ", said, re.MULTILINE), said
    (kept,) = Path(tempfile.gettempdir()).glob("gcma-stress-*")
    assert list(kept.glob("log.*"))


def test_figures_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert stress.main(["--seconds", "0.5", "--chaos", "alloc", "--page-size", "4K", "--workers", "2", "--json"]) == 0
    said = capsys.readouterr()
    figures = json.loads(said.out)
    assert set(figures) == {"seconds", "operations", *stress.COUNTS, "losses"}
    assert figures["operations"] > 0
    assert figures["losses"] == 0
    assert said.err.startswith("seed ")


def test_what_it_cannot_do_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert stress.main(["--page-size", "3K"]) == 1
    assert "gcma stress: page size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        stress.main(["--page-size", "no size"])
    with pytest.raises(SystemExit):
        stress.main(["--workers", "0"])


def test_chaos_is_told_by_its_kinds() -> None:
    assert stress.parse_chaos("kill,stop") == {"kill", "stop"}
    assert stress.parse_chaos("all") == set(KINDS)
    assert not stress.parse_chaos("none")
    with pytest.raises(ValueError):
        stress.parse_chaos("kill,sotp")


# --- its parts


class Targets:
    """Nobody who could be hurt: children that only note what is done to them."""

    class Broker:
        pid = 0
        refuses = False

        def __init__(self, done: list[tuple[int, str]]) -> None:
            self.done = done

        def kill(self) -> None:
            self.done.append((0, "broker killed"))

        def start(self) -> None:
            self.done.append((0, "broker started"))
            if self.refuses:
                raise gcma_shm.ArenaError("planted")

    class Fake:
        role, how, alive, stopped = "worker", "mapped", True, False
        pid = 1 << 22  # nobody's

        def __init__(self, name: int, done: list[tuple[int, str]]) -> None:
            self.name, self.done, self.log = name, done, self
            self.speed = 1
            self.done_before = 1

        @property
        def progress(self) -> int:
            self.done_before += self.speed
            return self.done_before

        def where(self) -> None:
            self.done.append((self.name, "asked where"))

        def kill(self) -> None:
            self.done.append((self.name, "killed"))

        def send(self, number: int) -> bool:
            if number == signal.SIGSTOP:
                self.done.append((self.name, "stopped"))
            return True

    def __init__(self) -> None:
        self.done: list[tuple[int, str]] = []
        self.broker = Targets.Broker(self.done)
        self.lost: list[str] = []
        self.meanwhile = lambda: None
        self.children = [Targets.Fake(n, self.done) for n in range(6)]

    def replace(self, child: object) -> None:
        pass

    def wrong(self, words: str) -> None:
        self.lost.append(words)


def act_of(targets: Targets, kind: str) -> Chaos:
    counts = Counter[str]()
    chaos = Chaos(targets, frozenset({kind}), "1", counts)  # type: ignore[arg-type]
    chaos.go_on()
    assert counts.total() == 1
    return chaos


def test_a_broker_is_started_again_once_mapped_workers_have_gone_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = Targets()
    act_of(targets, "restart")
    assert targets.done == [(0, "broker killed"), (0, "broker started")]
    assert not targets.lost
    monkeypatch.setattr(chaos_module, "PROGRESS_S", 0.05)
    for child in targets.children:  # at the first look: however long that takes, the next is not blamed for it
        child.speed = chaos_module.PROGRESS
    targets.children[3].speed = 0
    targets.children[4].speed, targets.children[4].how = 0, "messages"
    act_of(targets, "restart")
    assert targets.lost == ["a worker (mapped) stands still while there is no broker"]
    assert (3, "asked where") in targets.done


def test_a_broker_that_does_not_start_again_is_a_loss() -> None:
    targets = Targets()
    targets.broker.refuses = True
    act_of(targets, "restart")
    assert targets.lost == ["planted"]


def test_a_broker_that_ends_by_itself_is_a_loss(tmp_path: Path) -> None:
    with Round(Rage(kinds=frozenset(), seed=SEED), tmp_path) as running:
        running.meanwhile = running.broker.kill
        running.rage(30.0)
        running.meanwhile = lambda: None
        result = running.judge()
    assert any("the broker has ended by itself" in words for words in result.lost), result.lost


def test_a_child_that_ends_by_itself_is_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal, say, of which it cannot tell."""
    real = Worker.run

    def die_once(self: Worker, operations: int, stop: Callable[[], bool]) -> object:
        with contextlib.suppress(FileExistsError):
            (tmp_path / "dead").touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, operations, stop)

    monkeypatch.setattr(Worker, "run", die_once)
    with Round(Rage(kinds=frozenset(), seed=SEED), tmp_path) as running:
        running.rage(WAIT_S)
        result = running.judge()
    assert any(f"ended with status {-signal.SIGKILL}" in words for words in result.lost), result.lost


def test_the_disk_is_full_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with forked(lambda said: said.hear()) as child:
        before = resource.prlimit(child.pid, resource.RLIMIT_FSIZE)
        monkeypatch.setattr(Targets.Fake, "pid", child.pid)
        chaos = act_of(Targets(), "full")
        assert resource.prlimit(child.pid, resource.RLIMIT_FSIZE) == (0, before[1])
        chaos.calm()
        assert resource.prlimit(child.pid, resource.RLIMIT_FSIZE) == before


def acts(seed: str) -> list[tuple[int, str]]:
    targets, counts = Targets(), Counter[str]()
    chaos = Chaos(targets, frozenset({"kill", "stop"}), seed, counts)  # type: ignore[arg-type]
    while sum(counts.values()) < 20:
        time.sleep(min(chaos.go_on(), 0.01))
    chaos.calm()
    return targets.done


def test_a_seed_chooses_the_acts() -> None:
    assert acts("1") == acts("1") != acts("2")


def test_what_a_child_says_is_heard_when_it_is_killed_and_what_it_raises(tmp_path: Path) -> None:
    shared = Shared()

    def fail() -> None:
        raise ValueError("planted")

    def speak() -> None:
        shared.count("claims")
        shared.tell("x" * 2 * WORDS_MAX)
        os.kill(os.getpid(), signal.SIGKILL)

    for work in (speak, fail):
        child = fork("worker", "mapped", shared, work)
        child.process.join(WAIT_S)
        assert not child.alive
    first, second = shared.heard()
    assert first == "x" * WORDS_MAX
    assert second.startswith("a worker (mapped) failed:")
    assert "ValueError: planted" in second
    assert shared.counted()["claims"] == 1
    assert shared.heard() == []
    child.process.close()
    shared.close()


def test_a_child_is_stopped_only_when_it_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Shared()
    read_end, write_end = os.pipe()
    bind = Shared.end_with_parent

    def late(shared: Shared) -> None:
        os.read(read_end, 1)
        bind(shared)

    monkeypatch.setattr(Shared, "end_with_parent", late)
    child = fork("worker", "mapped", shared, signal.pause)
    try:
        assert not child.send(signal.SIGSTOP)
        os.write(write_end, b"!")
        assert eventually(lambda: child.send(signal.SIGSTOP))
        assert eventually(lambda: stands_still(child.pid))
        assert child.stopped
    finally:
        child.kill()
    assert not child.send(signal.SIGCONT)
    child.process.close()
    shared.close()
    os.close(read_end)
    os.close(write_end)


def test_rest_tells_what_is_left(client: EmbeddedClient) -> None:
    plan = Plan(wide=16, types=1)
    client.swap(0, 16)
    assert Rest(client, plan, WAIT_S).wrong() == []
    with gcma_shm.connect(client.endpoint) as other:
        reservation, buffer = other.reserve(4096), other.alloc_contig(8192)
        wrong = Rest(client, plan, 0.05).wrong()
        assert [words.split(" left")[0] for words in wrong] == ["clients", "memory held or promised"]
        buffer.free()
        reservation.release()
    assert Rest(client, plan, WAIT_S).wrong() == []


def test_a_guest_sees_that_its_bytes_have_changed_and_that_it_was_refused(client: EmbeddedClient) -> None:
    area = client.areas()[0]
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    plan = Plan(area_pages=(area.size // 4096,))
    with gcma_shm.embedded("8M", areas={"a0": "96K"}) as owner:
        plan = Plan(area_pages=(24,))
        guest = Guest(owner, plan, 1, tell=wrong.append, count=lambda what: counts.update([what]))
        guest._come(0, 2)
        assert owner._plane is not None
        with guest._held[0][0].view as view:
            view[5000] ^= 1
        guest._come_to_whole(0)  # somebody has a part of it
        assert len(wrong) == 1
        assert "refused" in wrong[0]
        guest._leave_all()
        assert len(wrong) == 2
        assert "have changed" in wrong[1]
        assert guest.run(50) > 10
    assert len(wrong) == 2
    assert counts["claims"] > 0
    assert counts["allocations"] > 0


def test_a_worker_tells_a_page_that_is_not_whole_at_once(client: EmbeddedClient, tmp_path: Path) -> None:
    told: list[str] = []
    log = Log(tmp_path / "log", 1, 1000)
    swap = client.swap(0, PLAN.wide)
    for offset in range(PLAN.wide):
        swap.store(offset, make_page(offset, value_id(9, 1), 2048) + make_page(offset, value_id(9, 2), 2048))
    report = Worker(client, PLAN, log, 1, told.append).run(1000)
    assert len(report.torn) == len(told) == 1
    assert "not whole" in told[0]
    wrong = read_all(client, PLAN, Log(tmp_path / "log.2", 2, PLAN.wide))
    assert TornPage.__name__ in wrong[0]
    log.close()


def test_a_broker_that_is_killed_is_started_again_on_its_endpoint(tmp_path: Path) -> None:
    broker = BrokerProcess(PLAN, tmp_path / "words")
    try:
        first = broker.pid
        broker.kill()
        assert broker.pid == 0
        broker.start()
        assert broker.pid not in (0, first)
        gcma_shm.connect(broker.endpoint).close()
        assert broker.stop() == 0
    finally:
        broker.close()
    assert not broker.spill_dir.exists()


def test_a_broker_that_was_stopped_ends_with_who_started_it(tmp_path: Path) -> None:
    def start(said: Said) -> None:
        broker = BrokerProcess(PLAN, tmp_path / "words")
        os.kill(broker.pid, signal.SIGSTOP)
        said.say(broker.pid)
        said.hear()

    with forked(start) as child:
        pid = child.receive()
        begun = start_time(pid)
        assert eventually(lambda: stands_still(pid))
        child.kill()
        assert eventually(lambda: not _alive(pid, begun))


def test_results_add_up() -> None:
    total = Result()
    for n in range(3):
        one = Result(operations=10, counts=Counter(kills=2))
        one.wrong(f"lost {n}")
        total.merge(one)
    assert (total.operations, total.counts["kills"], total.losses, len(total.lost)) == (30, 6, 3, 3)


def test_the_benchmark_records_and_checks_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "bench/stress.py", "--record", "--duration", "1", "--slots", "300", "--arena", "8M", "--out", tmp_path / "out.json"],
        cwd=ROOT, capture_output=True, text=True, timeout=4 * WAIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert "checking the history of" in done.stdout
    assert "wrong pages and bytes: 0" in done.stdout
