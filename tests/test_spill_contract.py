"""The rules of frontswap once more (test_swap_contract.py), for spill files that are read and written in the other ways: by who reads and writes
them, a client that maps the arena. Whoever sends messages reaches a broker that does the same; what is written behind is, in test_spill_io.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import test_swap_contract
from tests.faults.disks import needs_direct
from tests.test_swap_contract import Place, Write, served

# The tests, and their fixtures; three of those are other ones here, each for all tests.
globals().update(
    {name: found for name, found in vars(test_swap_contract).items() if not name.startswith(("__", "pytest_"))}
)


@pytest.fixture(scope="module", params=[("4K", "direct"), ("64K", "uncached")], ids="-".join)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    page_size, spill_io = request.param
    options = ("--slots", "1000", "--clients", "12", "--spill-io", spill_io)
    directory = tmp_path_factory.mktemp("place")
    if spill_io == "direct":
        needs_direct(directory)
    with served(directory, "16M", page_size, *options) as place:
        yield place


@pytest.fixture(params=["through"])
def write(request: pytest.FixtureRequest) -> Write:
    return "behind" if request.param == "behind" else "through"


@pytest.fixture(params=["mapped"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)
