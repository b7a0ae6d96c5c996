"""Verify the models of the protocol, and show that each planted fault is caught.

Every model runs once as written, in each of its scenes: no error, a complete search, and each step that is marked in it
(`/* @store.swing */`) reached. Then once per planted fault, which must end in an error: a fault that no model catches
means that the model is too weak. docs/model.md says what the models show.

    python3 tests/model/run.py [--only NAME] [--jobs N]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
DEPTH_MAX = 10_000
MEMORY_MAX_MIB = 1_000
VERIFIER_TIMEOUT_S = 300
JOBS_MAX = 2

ROW = "{:13} {:13} {:26} {:9} {:19} {:>9} {:>7}"
STEP = re.compile(r"@([a-z]+\.[a-z_]+)")
ERRORS = ("assertion violated", "invalid end state", "acceptance cycle")  # what a planted fault may end in
LIVENESS = "PROGRESS"  # the scene of this name is checked against the model's formula, under weak fairness


@dataclass(frozen=True, eq=False)
class Model:
    """A file, its scenes (preprocessor switches; "" is none), and its faults with the scenes that must catch them."""

    name: str
    faults: dict[str, str]
    scenes: tuple[str, ...] = ("",)


MODELS = (
    Model(
        "store_clean",
        faults={
            "PUBLISH_BEFORE_SWING": "",
            "CLEAN_WITHOUT_CLAIM": "",
            "CRC_AFTER_DIRTY_OFF": "",
            "DIRTY_OFF_ANY_WORD": "",
            "DEATH_FREES_ALL_GRANTS": "",
            "DEATH_KEEPS_CLAIM": "",
            "DEATH_TAKES_ANY_CLAIM": "",
            "PATTERN_NAMES_A_PAGE": "",
        },
    ),
    Model(
        "load",
        scenes=("SCENE_STORE", "SCENE_TAKE", "SCENE_STOP"),
        faults={
            "LOAD_WITHOUT_AGAIN": "SCENE_STORE",
            "LOAD_WITHOUT_RECHECK": "SCENE_TAKE",
            "LOAD_WITHOUT_FILE_AGAIN": "SCENE_STORE",
            "LOAD_REFUSES_GRANTED": "SCENE_STORE",
            "LOAD_ANY_STATE": "SCENE_TAKE",
            "LOAD_ANY_KEY": "SCENE_TAKE",
            "REFAULT_ANY_WORD": "SCENE_STORE",
            "PROMOTE_ANY_VERSION": "SCENE_STORE",
            "PROMOTE_IGNORES_TAKING": "SCENE_TAKE",
            "TAKE_IGNORES_FILLING": "SCENE_TAKE",
            "READERS_PIN": "SCENE_TAKE",
        },
    ),
    Model(
        "reclaim",
        faults={
            "PUBLISH_BEFORE_SWING": "",
            "RECLAIM_GRANTED": "",
            "FREE_BEFORE_WORD": "",
            "EVICT_ANY_VERSION": "",
            "FREE_ANY_LIFE": "",
            "INVALIDATE_FREES_ONLY": "",
        },
    ),
    Model(
        "type_life",
        faults={
            "CLOSE_BEFORE_END": "",
            "BEGIN_BEFORE_RESET": "",
            "VERSION_STARTS_ANEW": "",
            "ONE_FILE_FOR_ALL_LIVES": "",
            "STORE_WITHOUT_LIFE": "",
            "LIFE_BEFORE_WORD": "",
            "STORE_NEVER_ABANDONS": "",
            "CLEAN_WITHOUT_LIFE_AGAIN": "",
            "LIFE_AFTER_CLAIM": "",
            "RELEASE_WITHOUT_TAG": "",
            "LOAD_WITHOUT_LIFE": "",
        },
    ),
    Model(
        "claim",
        scenes=("", LIVENESS),
        faults={
            "CLAIM_WITHOUT_FENCE": "",
            "ANNOUNCE_WITHOUT_FENCE": "",
            "TAKE_WITHOUT_FENCE": "",
            "CLAIM_IGNORES_FILLING": "",
            "TAKE_IGNORES_FILLING": "",
            "TAKE_OVER_BEFORE_END": "",
            "PROMOTE_IGNORES_CLAIM": "",
            "PROMOTE_IGNORES_TAKING": "",
            "PROMOTE_LIFE_BEFORE_FENCE": "",
            "PROMOTE_LIFE_BEFORE_TAKING": "",
            "ANNOUNCE_WITHOUT_LOOKING": LIVENESS,
        },
    ),
    Model(
        "reserve",
        scenes=("SCENE_LEND", "SCENE_TURNS", "SCENE_DEATH", "SCENE_RELEASE", "SCENE_STALE"),
        faults={
            "LOAD_WITHOUT_CLAIM": "SCENE_LEND",
            "LOAD_WITHOUT_CLAIM_AGAIN": "SCENE_LEND",
            "CLAIM_KEEPS_GENERATION": "SCENE_LEND",
            "CLAIM_IGNORES_FILLING": "SCENE_TURNS",
            "CLAIM_TAKES_OVER_LIVING": "SCENE_TURNS",
            "GIVE_UP_SWEEPS": "SCENE_TURNS",
            "CLAIM_WITHOUT_STATE": "SCENE_STALE",
            "CLAIM_STARTS_ANEW": "SCENE_STALE",
            "LEND_WITHOUT_LIFE": "SCENE_LEND",
            "LEND_WORD_BEFORE_LIFE": "SCENE_DEATH",
            "PROMOTE_IGNORES_CLAIM": "SCENE_TURNS",
            "PROMOTE_DROPS_OWNER": "SCENE_LEND",
            "GRANT_ANY_LIFE": "SCENE_STALE",
            "TAKE_KEEPS_SEQUENCE": "SCENE_RELEASE",
            "RELEASE_WITHOUT_CLAIM": "SCENE_STALE",
            "RELEASE_IGNORES_FILLING": "SCENE_STALE",
            "DEATH_KEEPS_CLAIM": "SCENE_TURNS",
            "DEATH_IGNORES_FILLING": "SCENE_TURNS",
            "DEATH_WITHOUT_LIFE": "SCENE_DEATH",
        },
    ),
    Model(
        "recover",
        scenes=("SCENE_CLEAN", "SCENE_ASK", "SCENE_PROMOTE", LIVENESS),
        faults={
            "RECOVER_DROPS_CRC": "SCENE_ASK",
            "RECOVER_FREES_ALL_GRANTS": "SCENE_ASK",
            "RECOVER_KEEPS_AREA_GRANT": "SCENE_PROMOTE",
            "RECOVER_KEEPS_GRANTS": "SCENE_ASK",
            "RECOVER_KEEPS_WRITER": LIVENESS,
            "RECOVER_TAKES_ANY_WRITER": "SCENE_ASK",
        },
    ),
    Model(
        "recover_type",
        faults={
            "RECOVER_CLOSES_LIVING": "",
            "RECOVER_EMPTIES_LIVING": "",
            "RECOVER_FILE_FIRST": "",
            "RECOVER_KEEPS_EMPTY": "",
            "RECOVER_KEEPS_WORDS": "",
        },
    ),
    Model(
        "recover_range",
        scenes=("SCENE_LOAD", "SCENE_TURNS", "SCENE_RELEASE", "SCENE_ALLOC", "SCENE_STOP"),
        faults={
            "HOLDER_BEFORE_LIFE": "SCENE_ALLOC",
            "RECOVER_ANY_OWNER": "SCENE_RELEASE",
            "RECOVER_KEEPS_CLAIM": "SCENE_TURNS",
            "RECOVER_KEEPS_ENTRY": "SCENE_ALLOC",
            "RECOVER_KEEPS_FILLING": "SCENE_STOP",
            "RECOVER_KEEPS_GRANT": "SCENE_STOP",
            "RECOVER_KEEPS_TAKING": "SCENE_RELEASE",
            "RECOVER_LENDS_AS_IS": "SCENE_RELEASE",
            "RECOVER_PASSES_CLAIMED": "SCENE_RELEASE",
            "RECOVER_SEIZES_LENT": "SCENE_STOP",
            "RECOVER_SIGNS_FIRST": "SCENE_STOP",
            "RECOVER_WITHOUT_SEIZE": "SCENE_RELEASE",
            "RELEASE_BEFORE_HOLDER": "SCENE_RELEASE",
            "RELEASE_STATE_LAST": "SCENE_RELEASE",
            "SEIZED_YIELDS": "SCENE_TURNS",
            "SEIZE_WITHOUT_STATE": "SCENE_RELEASE",
        },
    ),
    Model(
        "share",
        faults={"BITS_BEFORE_SEIZE": "", "LEND_KEEPS_BITS": "", "SEIZED_KEEPS_BITS": ""},
    ),
    Model(
        "unwritable",
        scenes=("SCENE_FULL", "SCENE_LOAD", "SCENE_STOP", LIVENESS),
        faults={
            "ERROR_KEEPS_CLAIM": LIVENESS,
            "ERROR_TAKES_DIRTY_OFF": "SCENE_STOP",
            "EVICT_UNWRITTEN": "SCENE_STOP",
            "FULL_WAITS": LIVENESS,
            "NEVER_AGAIN": LIVENESS,
            "TELLS_NOTHING": "SCENE_STOP",
            "WAITS_FOR_WRITER": LIVENESS,
            "WORD_BEFORE_PAGE": "SCENE_FULL",
        },
    ),
    Model(
        "punch",
        scenes=("SCENE_LOAD", "SCENE_AGAIN", "SCENE_DEATH"),
        faults={
            "LOAD_WITHOUT_FILE_AGAIN": "SCENE_LOAD",
            "MARK_ANY_WORD": "SCENE_AGAIN",
            "MARK_BEFORE_PUNCH": "SCENE_DEATH",
            "PUNCH_DROPS_PATTERN": "SCENE_AGAIN",
            "PUNCH_WITHOUT_AGAIN": "SCENE_LOAD",
            "PUNCH_WITHOUT_CLAIM": "SCENE_AGAIN",
            "SWING_FORGETS": "SCENE_DEATH",
        },
    ),
)


class ModelError(Exception):
    """A model that could not be verified at all; not the same as one that fails."""


@dataclass(frozen=True)
class Tools:
    spin: str
    cc: str


@dataclass(frozen=True)
class Run:
    model: Model
    scene: str
    fault: str | None

    @property
    def expected(self) -> str:
        return "error" if self.fault else "no error"


@dataclass
class Outcome:
    run: Run
    found: str  # "no error", or the kind of error
    states: int = 0
    seconds: float = 0.0
    steps: set[str] = field(default_factory=set)  # reached; only collected where no fault is planted

    @property
    def ok(self) -> bool:
        if self.run.fault is None:
            return self.found == "no error"
        return self.found in ERRORS


def find_tools() -> Tools:
    spin, cc = shutil.which("spin"), shutil.which("cc") or shutil.which("gcc")
    if spin is None:
        raise ModelError("spin is not installed; on Debian: apt-get install spin")
    if cc is None:
        raise ModelError("no C compiler found; on Debian: apt-get install gcc")
    return Tools(spin, cc)


def call(command: list[str], directory: Path) -> str:
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=VERIFIER_TIMEOUT_S, check=False
    )
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise ModelError(f"{' '.join(command)}\n{output}")
    return output


def verify(run: Run, tools: Tools) -> Outcome:
    started_s = time.monotonic()
    defines = [f"-D{switch}" for switch in (run.scene, run.fault and f"FAULT_{run.fault}") if switch]
    liveness = run.scene == LIVENESS
    with tempfile.TemporaryDirectory(prefix="gcma-model-") as name:
        directory = Path(name)
        for source in HERE.glob("*.pml"):
            shutil.copy(source, directory)
        call([tools.spin, *defines, "-a", f"{run.model.name}.pml"], directory)
        modes = ["-DNFAIR=4"] if liveness else ["-DSAFETY"]
        level = "-O0" if run.fault else "-O1"  # a fault shows within a second; there the compiler is what takes time
        call([tools.cc, level, "-w", *modes, f"-DMEMLIM={MEMORY_MAX_MIB}", "-o", "pan", "pan.c"], directory)
        report = call(["./pan", f"-m{DEPTH_MAX}", *(["-a", "-f"] if liveness else [])], directory)
        steps = set[str]()
        if run.fault is None:
            steps = reached_steps(run.model, report, call(["./pan", "-d"], directory))
    states = re.search(r"(\d+) states, stored", report)
    return Outcome(run, classify(report), int(states[1]) if states else 0, time.monotonic() - started_s, steps)


def classify(report: str) -> str:
    errors = re.search(r"errors: (\d+)", report)
    if errors is None:
        raise ModelError(f"the verifier's report has no result:\n{report}")
    if int(errors[1]):
        return next((kind for kind in ERRORS if f"pan:1: {kind}" in report), "unknown error")
    truncated = "Search not completed" in report or "max search depth too small" in report
    return "search truncated" if truncated else "no error"


def marked_steps(path: Path) -> Iterator[tuple[int, str]]:
    """The line and name of each step mark of a file."""
    for line, text in enumerate(path.read_text().splitlines(), 1):
        for step in STEP.findall(text):
            yield line, step


def reached_steps(model: Model, report: str, table: str) -> set[str]:
    """The marked steps that some process took.

    `pan -d` lists the states of each process with their lines, the report those that were never reached. The lines
    inside a d_step are not listed: they belong to the line on which it begins.
    """
    unreached = set[tuple[str, str]]()
    process = ""
    for line in report.splitlines():
        if begins := re.match(r"unreached in (?:proctype |)(\S+)", line):
            process = begins[1]
        elif state := re.match(r"\s+\S+\.pml:\d+, state (\d+),", line):
            unreached.add((process, state[1]))
    reached: dict[int, bool] = {}  # of each line that is listed
    for line in table.splitlines():
        if begins := re.match(r"(?:proctype |)(\S+)$", line):
            process = begins[1]
        elif state := re.match(rf"\s+state\s+(\d+) .*\b{model.name}\.pml:(\d+) => ", line):
            number = int(state[2])
            reached[number] = reached.get(number, False) or (process, state[1]) not in unreached
    marked = marked_steps(HERE / f"{model.name}.pml")
    return {step for number, step in marked if reached[max(listed for listed in reached if listed <= number)]}


def planned_runs(only: str | None) -> list[Run]:
    runs = list[Run]()
    for model in MODELS:
        if only in (None, model.name):
            runs += [Run(model, scene, None) for scene in model.scenes]
            runs += [Run(model, scene, fault) for fault, scene in model.faults.items()]
    return runs


def undeclared_faults(model: Model) -> set[str]:
    """Faults that the file can plant and this list does not, or the other way round."""
    return set(re.findall(r"FAULT_([A-Z_]+)", (HERE / f"{model.name}.pml").read_text())) ^ set(model.faults)


def failures_of(outcomes: list[Outcome]) -> list[str]:
    failures = [
        f"{outcome.run.model.name} {outcome.run.scene} {outcome.run.fault or ''}: {outcome.found}"
        for outcome in outcomes
        if not outcome.ok
    ]
    for model in dict.fromkeys(outcome.run.model for outcome in outcomes):
        marked = {step for _, step in marked_steps(HERE / f"{model.name}.pml")}
        reached = set[str]().union(*(outcome.steps for outcome in outcomes if outcome.run.model == model))
        failures += [f"{model.name}: step {step} is never reached" for step in sorted(marked - reached)]
        failures += [f"{model.name}: fault {fault} is not in both lists" for fault in sorted(undeclared_faults(model))]
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description="Verify the models of the protocol.")
    parser.add_argument("--only", choices=[model.name for model in MODELS], help="one model instead of all")
    parser.add_argument("--jobs", type=int, default=JOBS_MAX, choices=range(1, JOBS_MAX + 1), help="at a time")
    options = parser.parse_args()
    outcomes = list[Outcome]()
    try:
        tools = find_tools()
        print(ROW.format("model", "scene", "fault", "expected", "outcome", "states", "seconds"))
        with ThreadPoolExecutor(options.jobs) as pool:
            for outcome in pool.map(lambda run: verify(run, tools), planned_runs(options.only)):
                run = outcome.run
                seconds = f"{outcome.seconds:.1f}"
                names = (run.model.name, run.scene or "-", run.fault or "-")
                print(ROW.format(*names, run.expected, outcome.found, outcome.states, seconds), flush=True)
                outcomes.append(outcome)
    except (ModelError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr)
        return 2
    failures = failures_of(outcomes)
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{sum(outcome.ok for outcome in outcomes)} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
