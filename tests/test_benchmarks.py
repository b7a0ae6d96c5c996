"""The benchmarks' own machinery: what a run's record becomes in docs/benchmarks.md, the set, and the peers with their servers."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.processes import eventually

pytest.importorskip("numpy")
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))  # scripts import each other by their names alone

import publish  # noqa: E402
import suite  # noqa: E402
from report import Bar, Plot, Section, Verdict, write_json  # noqa: E402

MACHINE: dict[str, Any] = {
    "cpu": "A CPU", "cores": 2, "memory_mib": 100, "kernel": "6.1.2-flavour", "python": "3.11.2", "shmem_huge_pages": "",
    "versions": {"lmdb": "1", "gone": "-"}, "load_average_before": [0.5, 1.0, 2.0], "time": "2026-01-02T03:04:05Z",
}  # fmt: skip
SECTION = Section(
    "load, 4 KiB",
    ["", "µs", "against | it"],
    [["ours", 0.8912, "1 (1-1)"], ["them", 12345.6, "as they | say"]],
    "How to read it.",
    [
        Verdict("them / ours", 3, 2.5, at_least=True, why="2 to 3"),
        Verdict("ours / floor", 1.15, 1.1),
        Verdict("others / ours", 20, None, at_least=True, why="no others here"),
    ],
)


def run(out: Path, name: str, *sections: Section, time: str = MACHINE["time"]) -> None:
    write_json(out / f"{name}.json", "What is it?", MACHINE | {"time": time}, {}, {"much": [1] * 1000}, sections)


def published(tmp_path: Path, *names: str) -> str:
    """The document after those records were taken over."""
    assert (
        publish.main(["--out", str(tmp_path / "out"), "--docs", str(tmp_path), *(["--take", *names] if names else [])])
        == 0
    )
    return (tmp_path / "benchmarks.md").read_text()


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks").mkdir()
    return tmp_path / "benchmarks"


# --- the document


def test_a_record_becomes_tables_and_verdicts(tmp_path: Path, docs: Path) -> None:
    run(tmp_path / "out", "peers", SECTION)
    text = published(tmp_path, "peers")
    assert "| ours | 0.891 | 1 (1-1) |" in text
    assert "| them | 12346 | as they \\| say |" in text, "a stroke in a cell would end it"
    assert "|---|---:|---|" in text, "a column of words stands to the left"
    assert "| them / ours | ≥ 3 | 2.5 | **missed**: 2 to 3 |" in text
    assert "| ours / floor | ≤ 1.15 | 1.1 | met |" in text
    assert "| others / ours | ≥ 20 | – | not measured: no others here |" in text
    assert "| peers | 1 | 1 | 1 |" in text, "how many were met, missed, not measured"
    assert "| A | A CPU, 2 cores, 100 MiB, Linux 6.1.2, Python 3.11.2; lmdb 1 |" in text
    assert "Measured 2026-01-02T03:04:05Z on machine A, load before the run 0.5, 1.0, 2.0" in text
    assert "results" not in json.loads((docs / "peers.json").read_text()), "the samples are not kept in the repository"


def test_what_has_no_new_record_keeps_its_own(tmp_path: Path, docs: Path) -> None:
    run(tmp_path / "out", "alloc", SECTION)
    published(tmp_path, "alloc")
    (tmp_path / "out" / "alloc.json").unlink()
    run(tmp_path / "out", "peers", SECTION, time="2026-02-02")
    text = published(tmp_path, "all")
    assert text.index("`bench/peers.py`") < text.index("`bench/alloc.py`"), (
        "in the document's order, not the alphabet's"
    )
    assert "Measured 2026-01-02T03:04:05Z" in text
    assert "Measured 2026-02-02" in text
    assert published(tmp_path) == text, "rendering again changes nothing"


def test_an_unknown_benchmark_follows_the_known(tmp_path: Path, docs: Path) -> None:
    for name in ("aaa", "stress", "pages"):
        run(tmp_path / "out", name, SECTION)
    text = published(tmp_path, "all")
    assert text.index("## pages") < text.index("## stress") < text.index("## aaa")


def test_a_reading_stays_and_says_which_run_it_is_of(tmp_path: Path, docs: Path) -> None:
    (docs / "peers.md").write_text(f"# Ours beside others\nRun: {MACHINE['time']}\n\nWhy it is so.\n")
    run(tmp_path / "out", "peers", SECTION)
    text = published(tmp_path, "peers")
    assert "## Ours beside others (`bench/peers.py`)" in text
    assert "### Reading, of this run\n\nWhy it is so." in text
    run(tmp_path / "out", "peers", SECTION, time="2026-03-03")
    text = published(tmp_path, "peers")
    assert f"### Reading, of the run of {MACHINE['time']}" in text
    assert "That is another run than the one above" in text
    assert "Why it is so." in text


def test_a_record_without_sections_is_refused(tmp_path: Path, docs: Path) -> None:
    run(tmp_path / "out", "peers")
    with pytest.raises(ValueError, match="no sections"):
        publish.take("peers", tmp_path / "out" / "peers.json", tmp_path)
    assert not (docs / "peers.json").exists()
    assert "bench/peers.py" not in published(tmp_path, "all"), "all: what there is to publish"


def test_the_check_tells_an_edited_document(tmp_path: Path, docs: Path) -> None:
    run(tmp_path / "out", "peers", SECTION)
    published(tmp_path, "peers")
    arguments = ["--docs", str(tmp_path), "--check"]
    assert publish.main(arguments) == 0
    with (tmp_path / "benchmarks.md").open("a") as document:
        document.write("by hand\n")
    assert publish.main(arguments) == 1


def test_the_document_is_what_its_records_give() -> None:
    assert publish.main(["--check"]) == 0, "docs/benchmarks.md is generated: run bench/publish.py"


def anchors(document: Path) -> set[str]:
    """Where links into it may lead, as GitHub names its headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_into_the_documents_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    links = [
        (page, page.parent / file if file else page, anchor)
        for page in pages
        for file, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", page.read_text())
    ]
    assert any(target.name == "benchmarks.md" for _, target, _ in links)
    assert not [(str(page), anchor) for page, target, anchor in links if anchor not in anchors(target)]


def test_every_plot_of_the_document_is_there() -> None:
    records = [json.loads(path.read_text()) for path in (ROOT / "docs/benchmarks").glob("*.json")]
    plots = [plot["file"] for record in records for part in record["sections"] for plot in part["plots"]]
    assert plots
    assert not [file for file in plots if not (ROOT / "docs" / file).exists()]


def test_bars_are_drawn_from_the_record_alone(tmp_path: Path, docs: Path) -> None:
    pytest.importorskip("matplotlib")
    bars = [Bar("ours, load", 0.9, 0.8, 1.0, ours=True), Bar("them", 95.0)]
    plot = Plot("benchmarks/peers.svg", "load of a page", "µs", bars)
    run(tmp_path / "out", "peers", Section("load", ["", "µs"], [["ours", 1]], plots=[plot]))
    assert "![load of a page](benchmarks/peers.svg)" in published(tmp_path, "peers")
    drawn = (docs / "peers.svg").read_text()
    assert all(words in drawn for words in ("ours, load", "them", "load of a page", "µs"))
    published(tmp_path, "peers")
    assert (docs / "peers.svg").read_text() == drawn, "the same record gives the same picture"


@pytest.mark.parametrize(
    ("figure", "at_least", "word"),
    [(2.0, False, "met"), (2.1, False, "missed"), (2.0, True, "met"), (1.9, True, "missed"), (None, True, "not measured")],
)  # fmt: skip
def test_a_limit_is_at_most_or_at_least(figure: float | None, at_least: bool, word: str) -> None:
    assert Verdict("it", 2.0, figure, at_least).word == word


# --- what scripts say of their figures


def test_pages_are_judged_by_the_median_and_by_the_whole() -> None:
    import pages_tell

    phase = next(phase for phase in pages_tell.PHASES if phase.sustained)
    figures = {name: pages_tell.Figures([2000.0] * 3, filed=[2000.0] * 3, cpu=[1.0], batches=[2000.0]) for name in phase.contenders}  # fmt: skip
    figures["store behind"] = pages_tell.Figures([500.0] * 3, filed=[1000.0] * 3, cpu=[1.0], batches=[500.0])
    table = pages_tell.section(phase, 4096, {1: figures}, "")
    row = next(row for row in table.rows if row[0] == "store behind")
    assert row[:4] == ["store behind", 1, 1.0, 0.5], "sustained is told by the whole, until the file has it all"
    words = {one.what: (one.figure, one.word) for one in pages_tell.expected({(phase.name, 4096, 1): figures}).verdicts}
    assert words["LMDB put / store behind, sustained, 4 KiB"] == (4.0, "met")
    assert words["LMDB put / store behind, sustained, 4 KiB, until the file has it all"] == (2.0, "missed")
    assert words["store behind / C memcpy to a random page, sustained, 4 KiB"] == (0.25, "met")
    assert not [what for what in words if "load" in what or "64 KiB" in what], "of what was measured only"


def test_a_policy_is_judged_at_each_size() -> None:
    import policy

    ours = {str(share): {"hits": hits} for share, hits in zip(policy.SHARES, (11, 12.3, 18, 27, 45), strict=True)}
    results = {"vm": {"s3fifo": ours, "live": {"5": {"hits": 12.0}}, "reference": policy.REFERENCE["vm"]}}
    section = policy.section({"vm": "9 loads"}, results, plotted=True)
    rows = {row[0]: row[1:] for row in section.rows}
    assert rows["s3fifo"] == ["11.0", "12.3", "18.0", "27.0", "45.0"]
    assert rows["s3fifo, through a broker process"] == ["-", "12.0", "-", "-", "-"]
    assert rows["libcachesim, Belady"] == ["13.5", "23.0", "32.4", "45.3", "61.5"]
    words = {one.what: one.word for one in section.verdicts}
    assert words["points behind S3-FIFO, vm, 5 %"] == "missed", "13.4, and a point is allowed"
    assert words["points behind S3-FIFO, vm, 10 %"] == "met"
    assert words["points ahead of LRU, vm, 5 %"] == "met"
    assert [plot.file for plot in section.plots] == ["policy.svg"]


def test_scaling_is_judged_by_the_clock_and_by_processor_time() -> None:
    import scaling

    one, two = scaling.Contender(1), scaling.Contender(2)
    figures = {one: scaling.Figures([1e6], [1e6]), two: scaling.Figures([1.7e6], [0.95e6])}
    section = scaling.section("same slots", figures, {two: (one, 1.8)})
    assert [(one.limit, one.word) for one in section.verdicts] == [(1.8, "missed"), (0.9, "met")]


# --- the set


def test_one_that_fails_does_not_end_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.py").write_text("import pathlib, sys; pathlib.Path(sys.argv[1]).touch()")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(suite, "HERE", tmp_path)
    assert suite.run(["bad", "good"], {"good": [str(tmp_path / "ran")]}) == (["good"], ["bad"])
    assert (tmp_path / "ran").exists()


def test_the_set_writes_the_document(tmp_path: Path, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run(out, "peers", SECTION)
    (out / "peers.json").rename(tmp_path / "record")
    run(out, "alloc", SECTION, time="2025-05-05")
    published(tmp_path, "alloc")
    for name, value in (("HERE", tmp_path), ("OUT", out), ("SET", {"peers": [], "alloc": []})):
        monkeypatch.setattr(suite, name, value)
    monkeypatch.setattr(publish, "OUT", out)
    monkeypatch.setattr(publish, "DOCS", tmp_path)
    (tmp_path / "peers.py").write_text(
        f"import os; os.rename({str(tmp_path / 'record')!r}, {str(out / 'peers.json')!r})"
    )
    (tmp_path / "alloc.py").write_text("raise SystemExit(1)")
    assert suite.main([]) == 1, "one of them failed"
    text = (tmp_path / "benchmarks.md").read_text()
    assert MACHINE["time"] in text, "what ran is published"
    assert "2025-05-05" in text, "what failed keeps what it had"


def test_the_set_is_of_scripts_that_there_are() -> None:
    assert not [name for name in suite.SET if not (ROOT / "bench" / f"{name}.py").exists()]


# --- the peers

FAKE = f"""#!{sys.executable}
import socket, sys, time
with socket.socket(socket.AF_UNIX) as server:
    server.bind(sys.argv[sys.argv.index("--unixsocket") + 1])
    server.listen()
    while True:
        server.accept()[0].close()
"""


@pytest.fixture
def path_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory in which programs are found."""
    found = tmp_path / "bin"
    found.mkdir()
    monkeypatch.setenv("PATH", str(found))
    return found


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_server_is_started_and_ended(tmp_path: Path, path_of: Path) -> None:
    from peers_servers import serving

    program(path_of / "redis-server", FAKE)
    with serving("redis", tmp_path) as server:
        assert server.socket == str(tmp_path / "redis.sock")
        os.kill(server.pid, 0)
    assert not Path(f"/proc/{server.pid}").exists()


def test_a_server_that_heeds_no_request_to_end_is_killed(
    tmp_path: Path, path_of: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peers_servers

    monkeypatch.setattr(peers_servers, "STOP_S", 0.1)
    program(
        path_of / "redis-server",
        FAKE.replace("with socket", "import signal; signal.signal(15, signal.SIG_IGN)\nwith socket"),
    )
    with peers_servers.serving("redis", tmp_path) as server:
        pass
    assert eventually(lambda: not Path(f"/proc/{server.pid}").exists())


def test_a_server_that_is_not_installed_tells_its_package(tmp_path: Path, path_of: Path) -> None:
    from peers_servers import serving
    from peers_ways import NotHere

    with pytest.raises(NotHere, match=r"no memcached \(Debian: memcached\)"), serving("memcached", tmp_path):
        pass


def test_a_server_that_does_not_start_tells_its_last_words(tmp_path: Path, path_of: Path) -> None:
    from peers_servers import serving
    from peers_ways import NotHere

    program(path_of / "redis-server", "#!/bin/sh\necho something; echo cannot bind; exit 1\n")
    with pytest.raises(NotHere, match="redis does not start: cannot bind"), serving("redis", tmp_path):
        pass


def worker_of(monkeypatch: pytest.MonkeyPatch, directory: Path, load: int = 0, store: int = 0) -> Any:
    """A worker with one store, a dict; what it loads or stores is off by so much."""
    import peers_work
    from peers_ways import Place, Ways

    place = Place(64, 128, 4, 1, directory, "", {})
    add = Ways()
    pages: dict[int, bytes] = {}

    class Store:
        ways = add.found

        def put(self, n: int, page: bytes) -> None:
            pages[n] = page

        def get(self, n: int) -> bytes | None:
            return pages.get(n)

    add.load("load", lambda which: which.tolist(), lambda n: pages[n ^ load])
    add.store("store", lambda which: which.tolist(), lambda n: pages.__setitem__(n ^ store, place.page))
    monkeypatch.setattr(peers_work, "STORES", {"it": lambda place, stack: Store()})
    found = peers_work.Worker(0, ExitStack(), place, ["it"])
    found.fill()
    return found


def test_a_sound_store_is_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of(monkeypatch, tmp_path)
    assert worker.prove_loads() >= 32
    assert worker.prove_stores() >= 32
    assert worker.prove_whole() == 128


def test_wrong_bytes_end_the_run_before_the_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="load gives wrong bytes"):
        worker_of(monkeypatch, tmp_path, load=1).prove_loads()
    with pytest.raises(AssertionError, match="store did not store page"):
        worker_of(monkeypatch, tmp_path, store=1).prove_stores()


@pytest.mark.timeout(600)
def test_the_peers_are_compared_and_what_is_missing_is_told(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    environment = os.environ | {
        "PATH": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }  # no server is found there
    arguments = [
        "--page-size",
        "4K",
        "--workers",
        "1",
        "--rounds",
        "2",
        "--block-s",
        "0.002",
        "--wraps",
        "1",
        "--working-set",
        "1M",
        "--arena",
        "16M",
        "--stores",
        "ours",
        "lmdb",
        "file",
        "mmap",
        "redis",
        "pylibmc",
    ]
    done = subprocess.run(
        [sys.executable, "bench/peers.py", *arguments, "--out", tmp_path / "peers.json"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    record = json.loads((tmp_path / "peers.json").read_text())
    expected, *tables = record["sections"]
    assert "Not measured: redis (no redis-server (Debian: redis-server))." in expected["note"]
    assert "Not measured: pylibmc (no memcached (Debian: memcached))." in expected["note"]
    words = {one["what"]: one["verdict"] for one in expected["verdicts"]}
    assert words["Redis GET / ours, load, 4 KiB, one worker"] == "not measured"
    assert words["LMDB get / ours, load, 4 KiB, one worker"] in ("met", "missed")
    loads = {row[0]: float(row[1]) for row in tables[0]["rows"]}
    assert {"ours, load", "ours, load_into", "LMDB get", "file, os.pread", "mmap slice"} <= set(loads)
    assert all(figure > 0 for figure in loads.values())
    stores = {row[0] for row in tables[1]["rows"]}
    assert {"ours, store behind", "ours, store behind, and sync", "LMDB put", "file, os.pwrite"} <= stores
