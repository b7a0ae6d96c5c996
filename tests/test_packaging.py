"""What users get: a wheel and an sdist that install into an empty environment and work from anywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD_S = 600.0
DEPENDENCIES = ("posix_ipc", "msgpack", "zmq", "pyzmq", "sortedcontainers")


def run(
    *command: str | Path, cwd: Path | str = "/", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=BUILD_S, check=False
    )


def run_well(*command: str | Path, cwd: Path | str = "/") -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def copy_of_the_tree(to: Path) -> Path:
    """What a fresh clone has: no build products."""
    ignore = shutil.ignore_patterns(
        "*.so", "_core.c", "build", "dist", "*.egg-info", ".git", ".venv", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, to, symlinks=True, ignore=ignore)
    return to


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Sdist, and the wheel that is built from it, not from the tree."""
    place = tmp_path_factory.mktemp("built")
    tree = copy_of_the_tree(place / "tree")
    run_well(sys.executable, "-m", "build", "--no-isolation", "--outdir", place / "dist", tree)
    (sdist,) = (place / "dist").glob("*.tar.gz")
    (wheel,) = (place / "dist").glob("*.whl")
    return sdist, wheel


def empty_environment(place: Path) -> Path:
    """An environment with the dependencies alone, taken from this one without the network; returns its interpreter."""
    venv.create(place, with_pip=True, symlinks=True)
    python = place / "bin" / "python"
    ours = Path(
        run_well(sys.executable, "-c", "import zmq, pathlib; print(pathlib.Path(zmq.__file__).parent.parent)").strip()
    )
    theirs = Path(run_well(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for path in ours.iterdir():
        if path.name.lower().startswith(DEPENDENCIES):
            (theirs / path.name).symlink_to(path)
    assert run(python, "-c", "import gcma_shm").returncode != 0, "the environment is not empty"
    return python


WORKS = (
    "import gcma_shm, pathlib, sys\n"
    "assert 'site-packages' in gcma_shm.__file__, gcma_shm.__file__\n"
    "with gcma_shm.embedded('8M') as client:\n"
    "    swap = client.swap(0, 100)\n"
    "    swap.store(7, b'x-gcma--' * (client.page_size // 8))\n"
    "    with client.alloc_contig(1 << 20) as frame: frame.view[:5] = b'hello'\n"
    "    assert swap.load(7) == b'x-gcma--' * (client.page_size // 8)\n"
    "print('works', gcma_shm.__version__)\n"
)
# The adapters need none of the extras, but for what says so.
ADAPTERS = """
import asyncio, multiprocessing, os, sys
import gcma_shm, gcma_shm.aio
from gcma_shm.clients import executor, mapping, reducer, shared_memory

with gcma_shm.embedded("16M") as client:
    os.environ["GCMA_ENDPOINT"] = client.endpoint
    with executor.ArenaExecutor(1, multiprocessing.get_context("spawn"), client=client) as pool:
        assert pool.submit(bytes.upper, b"x" * (1 << 20)).result() == b"X" * (1 << 20)
        assert pool.fallbacks == 0
    cache = mapping.SwapMapping(client, type=1, slots=100)
    cache["a"] = b"b" * 10_000
    assert cache["a"] == b"b" * 10_000
    reducer.register()
    queue = multiprocessing.SimpleQueue()
    queue.put(client.alloc_contig(4096))
    queue.get().free()
    segment = shared_memory.SharedMemory(create=True, size=4096)
    segment.close(), segment.unlink()

    async def ask():
        async with gcma_shm.aio.connect() as asking:
            assert await asking.areas()

    asyncio.run(ask())
    try:
        client.alloc_contig(4096).numpy(4096)
    except ImportError as error:
        assert "pip install 'gcma-shm[numpy]'" in str(error)
try:
    import gcma_shm.clients.joblib
except ImportError as error:
    assert "pip install 'gcma-shm[joblib]'" in str(error), error
assert not {"numpy", "joblib"} & set(sys.modules)
print("works")
"""


def check_installed(python: Path) -> None:
    assert run_well(python, "-c", WORKS).startswith("works")
    assert run_well(python, "-c", ADAPTERS) == "works\n"
    site = Path(run_well(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    assert not [path for path in site.iterdir() if path.name.startswith(("broker", "clients", "tests", "bench"))]
    assert (site / "gcma_shm" / "py.typed").exists()
    assert (site / "gcma_shm" / "_core.pyi").exists()
    for name in ("broker", "clients"):
        assert run(python, "-c", f"import {name}").returncode != 0
    command = python.parent / "gcma"
    assert "gcma" in run_well(command, "--help")
    assert "--size" in run_well(command, "broker", "--help")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_works_in_an_empty_environment(built: tuple[Path, Path], tmp_path: Path) -> None:
    python = empty_environment(tmp_path / "env")
    run_well(python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", built[1])
    check_installed(python)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_sdist_builds_and_works_in_an_empty_environment(built: tuple[Path, Path], tmp_path: Path) -> None:
    python = empty_environment(tmp_path / "env")
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    run_well(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "dist", source)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run_well(python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel)
    check_installed(python)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_in_them(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    assert {
        "gcma_shm/__init__.py",
        "gcma_shm/py.typed",
        "gcma_shm/_core.pyi",
        "gcma_shm/broker/cli.py",
        "gcma_shm/clients/swap.py",
    } <= names
    for part in ("broker", "clients"):
        assert {f"gcma_shm/{part}/{path.name}" for path in (ROOT / part).glob("*.py")} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"gcma_shm"}
    assert [name for name in names if name.startswith("gcma_shm/_core.") and name.endswith(".so")]
    assert [name for name in names if name.endswith("LICENSE")]
    assert [name for name in names if name.endswith("entry_points.txt")]
    with tarfile.open(built[0]) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "ARCHITECTURE.md",
        "setup.py",
        "pyproject.toml",
        "gcma_shm/_core.pyx",
        "gcma_shm/_atomics.h",
        "gcma_shm/_crc32c.h",
        "gcma_shm/_races.h",
        "gcma_shm/_copy.h",
    }
    assert wanted <= inside
    assert {
        f"gcma_shm/{path.name}"
        for path in (ROOT / "gcma_shm").glob("*.p[yx]*")
        if path.suffix in (".pxi", ".pxd", ".pyi")
    } <= inside
    assert not [name for name in inside if name.endswith((".so", "_core.c"))]


@pytest.mark.parametrize("name", ["broker", "clients"])
def test_a_bare_import_from_the_checkout_says_the_right_name(name: str) -> None:
    done = run(sys.executable, "-c", f"import {name}", cwd=ROOT)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert f"gcma_shm.{name}" in done.stderr


def test_where_the_extension_is_not_built_the_error_says_what_to_do(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path / "tree")
    done = run(sys.executable, "-S", "-c", "import gcma_shm", cwd=tree)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert "make" in last
    assert "pip install gcma-shm" in last
