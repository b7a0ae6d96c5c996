"""What the documents show in Python runs as it stands there, and what they name is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.processes import run_python

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT) for pattern in ("*.md", "[!.]*/*.md", "tests/*/*.md") for path in ROOT.glob(pattern)
)

SAMPLES_S = 300.0  # a bound for all of a document's

BEFORE = """
import asyncio, inspect, multiprocessing, os, sys, warnings
import numpy, numpy as np, gcma_shm, gcma_shm.aio
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # Python 3.12, of any fork
owner = client = gcma_shm.embedded("256M")
os.environ["GCMA_ENDPOINT"] = client.endpoint
"""
# What each has and uses without saying so; what is to be seen afterwards; which samples are not run, by a word of theirs.
RUNS = {
    "README.md": ("", "assert frame.nbytes == 64 << 20", []),
    "docs/usage.md": (
        "page = bytes(client.page_size)",
        "worker(owner.endpoint); assert array.shape == (1024, 1024) and buf.nbytes == 64 << 20; del array",
        ["tcp://", "torch"],  # another host; large, and tests/test_buffer_exports.py has each line
    ),
    "docs/adapters.md": (
        """
import joblib
class Grid:  # scikit-learn's takes seconds to be imported by each worker; tests/test_joblib.py and examples/grid_search.py have it
    def fit(self, X, y):
        self.backend = joblib.parallel.get_active_backend()[0]
        self.found = joblib.Parallel()(joblib.delayed(numpy.dot)(X.T, y) for _ in range(4))
grid = Grid()
def average(buffer):
    return float(buffer.numpy(buffer.nbytes).mean())
from gcma_shm.clients.executor import ArenaExecutor
workers = ArenaExecutor(1, client=client)
array, numpy_array, queue = numpy.ones(1 << 18), numpy.arange(5000), multiprocessing.SimpleQueue()
X, y = numpy.ones((200_000, 3)), numpy.ones(200_000)
""",
        """
assert means == [1.0] * 100 and 0 <= mean < 256
workers.shutdown()
assert all((one == 200_000).all() for one in grid.found) and grid.backend.copied >= X.nbytes
assert isinstance(queue.get(), gcma_shm.Buffer)
assert bytes(segment.buf) == bytes(1 << 20) and list(numbers) == [1, 2.5, "three"]
assert cache["features/42"] == numpy_array.tobytes()
for each in (segment, numbers.shm):
    each.close(); each.unlink()
import gcma_shm.clients.joblib; gcma_shm.clients.joblib.end_workers()
""",
        [],
    ),
}  # fmt: skip
# `await` is allowed outside of functions, as in the documents.
RUN = """
code = compile(sys.argv[2], sys.argv[1], "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
if code.co_flags & inspect.CO_COROUTINE:
    asyncio.run(eval(code))
else:
    exec(code)
"""


def samples(document: str | Path) -> list[tuple[int, str]]:
    """Each sample in Python, with the number of lines before it."""
    text = (ROOT / document).read_text()
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in blocks]


@pytest.mark.timeout(2 * SAMPLES_S)
@pytest.mark.parametrize("document", RUNS)
def test_the_samples_run(document: str) -> None:
    """One after the other in one process, as one program whose lines have the document's numbers."""
    before, after, left_out = RUNS[document]
    chosen = [(line, code) for line, code in samples(document) if not any(word in code for word in left_out)]
    assert len(samples(document)) == len(chosen) + len(left_out)
    program = ""
    for line, code in chosen:
        program += "\n" * (line - program.count("\n")) + code
    run_python(f"import ast\n{BEFORE}\n{before}\n{RUN}\n{after}\nowner.close()", document, program, wait_s=SAMPLES_S)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_what_is_named_is_there(document: Path) -> None:
    """Samples can be parsed; files that are linked to, and files of the tree that are named, exist."""
    for line, code in samples(document):
        compile(code, f"{document}, line {line}", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    text = (ROOT / document).read_text()
    linked = {target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target}
    assert not [target for target in linked if not (ROOT / document.parent / target).exists()]
    named = set(
        re.findall(r"`((?:gcma_shm|broker|clients|tests|bench|examples|docs)/[\w/.-]+?\.(?:py|pyx|h|md|svg))`", text)
    )
    assert not [name for name in named if not (ROOT / name).exists() and "NAME" not in name]


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_headings_that_are_linked_to_are_there(document: Path) -> None:
    place = ROOT / document
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", place.read_text()):
        if "://" not in target:
            assert anchor in anchors(place.parent / target if target else place), f"{target}#{anchor}"


def test_the_benchmarks_are_all_told_of() -> None:
    """Each file of bench/, in its table."""
    readme = (ROOT / "bench" / "README.md").read_text()
    assert not [path.name for path in (ROOT / "bench").glob("*.py") if f"`{path.name}`" not in readme]


def test_the_map_of_the_code_has_every_file() -> None:
    """By its name, or that of a family: `stress_*.py`."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for part in ("gcma_shm", "broker", "clients"):
        for path in (ROOT / part).glob("[!_]*.py"):
            family = f"`{path.stem.partition('_')[0]}_*.py`"
            assert f"`{path.name}`" in text or f"/{path.name}`" in text or family in text, path
