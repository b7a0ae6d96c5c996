"""Pages of real data, for `same_filled.py`: files, the memory of processes, pictures, databases, a disk image. What is made is made anew each time,
from fixed seeds where there is chance in it.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

PAGE = 4096
MIB = 1 << 20
FILES_BYTES = 768 * MIB  # of each root, at most
FILE_BYTES_MAX = 64 * MIB
CHUNK = 4 * MIB
DISK_BYTES = 512 * MIB  # of the disk image, some 40 % of it used
ROOTS = ("/usr/bin", "/usr/lib", "/usr/share", "/var/lib")


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
