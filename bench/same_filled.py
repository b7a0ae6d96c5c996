"""Is it worth it to store pages nowhere that repeat one word other than zero?

How often pages of real data repeat a pattern of one, two, four or eight bytes: files of this machine as they are on its disk, what Python,
and numpy have in memory (read through /proc/PID/mem), raw pictures and frames, databases, a disk image in a sparse file. And what the
test costs a store that finds nothing: for zeros alone, and for any pattern of four bytes, which is what a slot's word has room for. Then what
a store and a load of such pages save. All times are of the thread's processor.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from _common import OUT, Ratio, Section, address_of, compile_c, describe_machine, machine, scratch, tell, write_json
from real_pages import PAGE, files, sources

import gcma_shm

QUESTION = "Is it worth it to store pages nowhere that repeat one word other than zero?"
WIDTHS = (1, 2, 4, 8)
BATCH = 1 << 14  # pages, for what the test costs
STORED = 64  # pages that are stored at once in the real arena

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


# --- what the test costs


def costs(directory: Path, rounds: int) -> dict[str, Any]:
    """Nanoseconds of this thread a page, of each test and the copy, by what the pages are like: all of them differ at the first word, or only at the end."""
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
                start = time.thread_time_ns()
                library.store(TESTS[name], address_of(to), address_of(pages), which.ctypes.data, BATCH, PAGE)
                times[name].append((time.thread_time_ns() - start) / BATCH)
        told[kind] = {
            name: {
                "ns": float(np.median(many)),
                "over no test": Ratio.of(many, times["no test"]),
                "over zero": Ratio.of(many, times["zero"]),
            }
            for name, many in times.items()
        }
    return told


def savings(directory: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Nanoseconds of this thread a page through the real data plane, in batches of 64, written behind, by what the page is."""
    rng = np.random.default_rng(1)
    pages = {"noise": rng.integers(1, 256, STORED * PAGE, np.uint8), "zeros": np.zeros(STORED * PAGE, np.uint8)}
    pages["repeats of 7"] = np.full(STORED * PAGE, 7, np.uint8)
    found: dict[str, dict[str, list[float]]] = {name: {"store": [], "load": []} for name in pages}
    out = np.zeros(STORED * PAGE, np.uint8)
    with gcma_shm.embedded("64M", slots=len(pages) * STORED, spill_dir=directory, prefault=True) as client:
        swap = client.swap(0, len(pages) * STORED, write="behind")
        for _ in range(rounds):
            for n in rng.permutation(len(pages)):
                name, data = list(pages.items())[n]
                where = range(n * STORED, (n + 1) * STORED)
                start = time.thread_time_ns()
                swap.store_many(where, data)
                stored = time.thread_time_ns()
                hits = swap.load_many(where, out)
                loaded = time.thread_time_ns()
                found[name]["store"].append((stored - start) / STORED)
                found[name]["load"].append((loaded - stored) / STORED)
                if not all(hits) or not np.array_equal(out, data):
                    raise RuntimeError(f"pages of {name} came back as something else")
    return found


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
        saved = savings(directory, 10 * options.rounds)
    parts = [
        counts_section(counted),
        *(cost_section(kind, by_test) for kind, by_test in timed.items()),
        saved_section(saved),
    ]
    for part in parts:
        tell(part)
    write_json(options.out, QUESTION, about, vars(options), {"pages": counted, "costs": timed, "savings": saved}, parts)
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


def saved_section(saved: dict[str, dict[str, list[float]]]) -> Section:
    """What a pattern saves."""
    rows = [
        [name, *(cell for what in ("store", "load") for cell in (float(np.median(of[what])), Ratio.of(of[what], saved["noise"][what])))]
        for name, of in saved.items()
    ]  # fmt: skip
    return Section(
        "store and load, 64 a batch, written behind", ("pages", "store, ns", "/ noise", "load, ns", "/ noise"), rows
    )


def percent(part: int, whole: int) -> str:
    """With three digits."""
    return f"{100 * part / max(whole, 1):.3f} %"


if __name__ == "__main__":
    sys.exit(main())
