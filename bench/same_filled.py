"""Is it worth it to store pages nowhere that repeat one word other than zero?

How often pages of real data repeat a pattern of one, two, four or eight bytes: files of this machine as they are on its disk, what Python,
numpy and pandas-like programs have in memory (read through /proc/self/mem), raw images and frames, a database, a sparse file. And what the
test costs a store that finds nothing: for zeros alone, and for any pattern of four bytes, which is what a slot's word has room for.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from _common import OUT, Ratio, Section, address_of, compile_c, describe_machine, machine, scratch, tell, write_json

QUESTION = "Is it worth it to store pages nowhere that repeat one word other than zero?"
PAGE = 4096
MIB = 1 << 20
WIDTHS = (1, 2, 4, 8)
FILES_BYTES = 768 * MIB  # of each root, at most
FILE_BYTES_MAX = 64 * MIB
CHUNK = 4 * MIB
BATCH = 1 << 14  # pages, for what the test costs
DISK_BYTES = 512 * MIB  # of the disk image, some 40 % of it used
ROOTS = ("/usr/bin", "/usr/lib", "/usr/share", "/var/lib")

_C_SOURCE = """
#include <stdint.h>
#include <string.h>

static int zero(const uint8_t *page, size_t size)
{
    return page[0] == 0 && memcmp(page, page + 1, size - 1) == 0;
}

static int repeats4(const uint8_t *page, size_t size)
{
    return memcmp(page, page + 4, size - 4) == 0;
}

static int repeats4_ends_first(const uint8_t *page, size_t size)
{
    uint32_t first, last;
    memcpy(&first, page, 4);
    memcpy(&last, page + size - 4, 4);
    return first == last && memcmp(page, page + 4, size - 4) == 0;
}

/* A store's part that matters here: the test, and the copy of a page that passes it. */
int64_t store(int test, uint8_t *to, const uint8_t *pages, const int64_t *which, int64_t n, size_t size)
{
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *page = pages + which[i] * size;
        if (test == 1 ? zero(page, size) : test == 2 ? repeats4(page, size) : test == 3 ? repeats4_ends_first(page, size) : 0)
            found++;
        else
            memcpy(to + i * size, page, size);
    }
    return found;
}
"""
TESTS = {"no test": 0, "zero": 1, "any four bytes": 2, "any four bytes, the ends first": 3}


class Pages:
    """How many pages were seen, how many repeat a pattern of each width and none that is narrower, and how many are zeros."""

    def __init__(self) -> None:
        self.pages = 0
        self.zero = 0
        self.repeats = dict.fromkeys(WIDTHS, 0)
        self.patterns: dict[str, int] = {}

    def add(self, data: bytes | memoryview | npt.NDArray[np.uint8]) -> None:
        """Whole pages of it; what is left over at the end is no page."""
        flat = np.frombuffer(data, np.uint8)
        flat = flat[: flat.size // PAGE * PAGE].reshape(-1, PAGE)
        self.pages += len(flat)
        left = flat[(flat[:, :8] == flat[:, -8:]).all(axis=1)]  # cheap, and true of all that repeat
        for width in WIDTHS:
            same = (left[:, :-width] == left[:, width:]).all(axis=1)
            zero = same & (left[:, 0] == 0) if width == 1 else np.zeros(len(left), bool)
            self.zero += int(zero.sum())
            self.repeats[width] += int((same & ~zero).sum())
            for pattern in left[same & ~zero][:, :width]:
                self.patterns[pattern.tobytes().hex()] = self.patterns.get(pattern.tobytes().hex(), 0) + 1
            left = left[~same]

    def figures(self) -> dict[str, Any]:
        """For the record; the five patterns that are seen most."""
        most = dict(sorted(self.patterns.items(), key=lambda item: -item[1])[:5])
        return {"pages": self.pages, "zero": self.zero, "repeats": self.repeats, "patterns": most}


# --- data


def files(root: Path) -> Iterator[bytes]:
    """All that lies below, each file from its beginning, up to FILES_BYTES in all; every file's last page filled up with zeros."""
    left = FILES_BYTES
    for directory, _, names in os.walk(root):
        for name in sorted(names):
            path = Path(directory, name)
            try:
                if path.is_symlink() or not path.is_file() or not 0 < path.stat().st_size <= FILE_BYTES_MAX:
                    continue
                data = path.read_bytes()
            except OSError:
                continue
            yield data + bytes(-len(data) % PAGE)
            left -= len(data)
            if left <= 0:
                return


def memory_of(program: str) -> Iterator[bytes]:
    """What a Python process that has run this has in memory that it may write: heaps, stacks, anonymous maps, as swap would get it."""
    code = f"{program}\nimport sys\nprint('ready', flush=True)\nsys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("the process whose memory was to be read has failed")
        yield from _resident(process.pid)
    finally:
        process.communicate()


def _resident(pid: int) -> Iterator[bytes]:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory, Path(f"/proc/{pid}/pagemap").open("rb") as pagemap:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights, _, _, inode, *_ = line.split()
            begin, end = (int(part, 16) for part in span.split("-"))
            if rights[:2] != "rw" or int(inode) or "[v" in line:
                continue
            pagemap.seek(begin // PAGE * 8)
            entries = np.frombuffer(pagemap.read((end - begin) // PAGE * 8), np.uint64)
            for page in np.flatnonzero(
                entries >> np.uint64(63)
            ):  # others were never touched, and are no page that is swapped
                memory.seek(begin + int(page) * PAGE)
                yield memory.read(PAGE)


PYTHON = """
import ast, json, pathlib, sysconfig
root = pathlib.Path(sysconfig.get_path("stdlib"))
kept = [ast.parse(path.read_bytes()) for path in sorted(root.glob("*.py"))[:60]]
words = {word: len(word) for path in sorted(root.glob("*.py")) for word in path.read_text(errors="replace").split()}
gone = [ast.parse(path.read_bytes()) for path in sorted(root.glob("*.py"))[60:90]]
del gone
"""
ARRAYS = """
import numpy as np
rng = np.random.default_rng(1)
ones, nans, full = np.ones(1 << 20), np.full(1 << 20, np.nan), np.full(1 << 20, -1, np.int32)
zeros = np.zeros(1 << 20); zeros[:] = 0
mask = rng.random(1 << 22) < 0.001
column = rng.integers(0, 1000, 1 << 20)
floats = rng.standard_normal(1 << 20)
counts = np.bincount(rng.zipf(1.5, 1 << 20).clip(0, 1 << 20))
table = rng.standard_normal((1 << 16, 16)); table[rng.random(1 << 16) < 0.2] = np.nan
codes = np.repeat(np.arange(64, dtype=np.int8), 1 << 14)
"""


def images() -> Iterator[bytes]:
    """Raw RGBA and 8-bit pictures: plots, a screen with windows, a camera's frames with noise."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rng = np.random.default_rng(1)
    for seed in range(4):
        drawn, ax = plt.subplots(figsize=(16, 9), dpi=100)
        ax.plot(np.random.default_rng(seed).standard_normal(500).cumsum())
        canvas = FigureCanvasAgg(drawn)
        canvas.draw()  # type: ignore[no-untyped-call] # matplotlib's own
        yield np.asarray(canvas.buffer_rgba()).tobytes()  # type: ignore[no-untyped-call] # as above
        plt.close(drawn)
    screen = np.full((1080, 1920, 4), (240, 240, 240, 255), np.uint8)
    for _ in range(6):
        y, x = rng.integers(0, 600), rng.integers(0, 1200)
        screen[y : y + 400, x : x + 640] = (*rng.integers(0, 256, 3), 255)
        screen[y + 30 : y + 390 : 14, x + 10 : x + 600 : 3] = (20, 20, 20, 255)
    yield screen.tobytes()
    y, x = np.mgrid[0:1080, 0:1920]
    for frame in range(4):
        light = 120 + 90 * np.sin(x / 300 + frame) * np.cos(y / 200)
        yield np.clip(light + rng.normal(0, 2, light.shape), 0, 255).astype(np.uint8).tobytes()
        yield np.clip(light + 200 * (x > 960), 0, 255).astype(np.uint8).tobytes()  # half of it burnt out, without noise


def databases(directory: Path) -> Iterator[bytes]:
    """An SQLite and an LMDB file after inserts and deletes."""
    import lmdb

    path = directory / "rows.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("create table rows (id integer primary key, name text, blob blob)")
        for number in range(40_000):
            db.execute("insert into rows values (?, ?, ?)", (number, f"name {number}", os.urandom(number % 700)))
        db.execute("delete from rows where id % 3 = 0")
    db.close()
    yield path.read_bytes()
    with lmdb.open(str(directory / "lmdb"), map_size=256 * MIB) as store:
        for start in range(0, 40_000, 1000):
            with store.begin(write=True) as change:
                for number in range(start, start + 1000):
                    change.put(str(number).encode(), os.urandom(number % 700))
    yield (directory / "lmdb" / "data.mdb").read_bytes()


def sparse(directory: Path) -> Iterator[bytes]:
    """A disk image: a file system made in a sparse file, as a virtual machine's."""
    path = directory / "disk.img"
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    held = directory / "held"
    shutil.copytree(sysconfig.get_path("stdlib"), held, ignore=shutil.ignore_patterns("site-packages", "__pycache__"))
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(held), str(path)], check=True)
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            yield data


def sources(directory: Path) -> dict[str, Callable[[], Iterator[bytes]]]:
    """What is looked at."""
    found: dict[str, Callable[[], Iterator[bytes]]] = {f"files in {root}": partial(files, Path(root)) for root in ROOTS}
    found["this Python's packages"] = lambda: files(Path(sysconfig.get_path("purelib")))
    found["memory: Python, syntax trees and dicts"] = lambda: memory_of(PYTHON)
    found["memory: numpy arrays"] = lambda: memory_of(ARRAYS)
    found["raw pictures and frames"] = images
    found["databases"] = lambda: databases(directory)
    found["disk image, ext4 in a sparse file"] = lambda: sparse(directory)
    return found


# --- what the test costs


def costs(directory: Path, rounds: int) -> dict[str, Any]:
    """Nanoseconds a page of each test and the copy, by what the pages are like: all of them differ at the first word, or only at the end."""
    library = ctypes.CDLL(str(compile_c(directory, "same_filled", _C_SOURCE)))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.store.argtypes = [ctypes.c_int, pointer, pointer, pointer, number, ctypes.c_size_t]
    rng = np.random.default_rng(1)
    which = rng.permutation(BATCH)
    to = np.zeros((BATCH, PAGE), np.uint8)
    told: dict[str, Any] = {}
    for kind, pages in kinds(rng).items():
        times: dict[str, list[float]] = {name: [] for name in TESTS}
        for _ in range(rounds):
            for name in rng.permutation(list(TESTS)):
                start = time.perf_counter_ns()
                library.store(TESTS[name], address_of(to), address_of(pages), which.ctypes.data, BATCH, PAGE)
                times[name].append((time.perf_counter_ns() - start) / BATCH)
        told[kind] = {
            name: {
                "ns": float(np.median(many)),
                "over no test": Ratio.of(many, times["no test"]),
                "over zero": Ratio.of(many, times["zero"]),
            }
            for name, many in times.items()
        }
    return told


def kinds(rng: np.random.Generator) -> dict[str, npt.NDArray[np.uint8]]:
    """Pages that no test finds, but for the last: what a test costs is what it reads before it knows."""
    noise = rng.integers(1, 256, (BATCH, PAGE), np.uint8)
    ends = np.zeros((BATCH, PAGE), np.uint8)
    ends[:, -1] = 1
    middle = np.full((BATCH, PAGE), 7, np.uint8)
    middle[:, PAGE // 2] = 8
    real = b"".join(data for data in files(Path(sysconfig.get_path("stdlib"))))[: BATCH * PAGE]
    text = np.frombuffer(real.ljust(BATCH * PAGE, b"\1"), np.uint8).reshape(BATCH, PAGE).copy()
    return {
        "noise": noise, "this Python's files": text, "ones but for a byte in the middle": middle, "zeros but for the last byte": ends,
        "repeats of 7": np.full((BATCH, PAGE), 7, np.uint8),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Counts, times and tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="of timing (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT / "same_filled.json", metavar="FILE")
    options = parser.parse_args(argv)
    about = machine()
    print(describe_machine(about))
    counted: dict[str, Any] = {}
    with scratch() as directory:
        for name, pieces in sources(directory).items():
            pages = Pages()
            pages.add(b"")
            for data in pieces():
                pages.add(data)
            counted[name] = pages.figures()
        timed = costs(directory, options.rounds)
    parts = [counts_section(counted), *(cost_section(kind, by_test) for kind, by_test in timed.items())]
    for part in parts:
        tell(part)
    write_json(options.out, QUESTION, about, vars(options), {"pages": counted, "costs": timed}, parts)
    return 0


def counts_section(counted: dict[str, Any]) -> Section:
    """How often."""
    rows = [
        [name, f"{of['pages']:,}", percent(of["zero"], of["pages"]), *(percent(of["repeats"][width], of["pages"]) for width in WIDTHS)]
        for name, of in counted.items()
    ]  # fmt: skip
    seen = {
        name: ", ".join(f"{pattern} ({count})" for pattern, count in of["patterns"].items())
        for name, of in counted.items()
    }
    return Section(
        "pages that repeat one pattern",
        ("pages of", "pages", "zeros", *(f"{width} byte{'s' * (width > 1)}" for width in WIDTHS)),
        rows,
        "Each page is counted at its narrowest pattern. Seen most, as bytes in memory: " + "; ".join(f"{name}: {most}" for name, most in seen.items() if most) + ".",
    )  # fmt: skip


def cost_section(kind: str, by_test: dict[str, Any]) -> Section:
    """What it costs."""
    rows = [[name, of["ns"], of["over no test"], of["over zero"]] for name, of in by_test.items()]
    return Section(f"the test and the copy, pages: {kind}", ("test", "ns a page", "/ no test", "/ zero"), rows)


def percent(part: int, whole: int) -> str:
    """With three digits."""
    return f"{100 * part / max(whole, 1):.3f} %"


if __name__ == "__main__":
    sys.exit(main())
