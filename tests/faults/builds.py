"""Builds of the extension with a fault, in a directory of their own; the product's build is not touched.

`build` compiles the C that Cython makes of the product's sources, with more flags, once in a run of the tests. `use` makes a process import the result as `gcma_shm._core`,
and `environment` every process that is started with it, brokers of `embedded()` included.
"""

from __future__ import annotations

import fcntl
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CORE = "gcma_shm._core"
CORE_ENVIRONMENT = "GCMA_TEST_CORE"


def build(factory: pytest.TempPathFactory, *flags: str) -> Path:
    """The path of an extension compiled with `flags`, by whichever test comes first in whichever of the run's processes: it takes ten
    seconds. Nobody writes there.
    """
    import tempfile  # not in the processes that `use` it

    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    directory = base / f"build-{zlib.crc32(shlex.join(flags).encode()):08x}"
    directory.mkdir(exist_ok=True)
    built = directory / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the test's own time limit bounds it
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=directory) as under_way:
                _customize(directory)
                _compile(Path(under_way), *flags).rename(built)
    return built


def _compile(directory: Path, *flags: str) -> Path:
    source = directory / "_core.c"
    target = directory / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    package = ROOT / "gcma_shm"
    sources = [path for pattern in ("*.pyx", "*.pxi", "*.pxd") for path in package.glob(pattern)]
    product = package / "_core.c"
    commands = []
    if product.exists() and product.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        shutil.copy(product, source)
    else:
        commands.append(
            [sys.executable, "-m", "cython", "-3", "-I", str(package), str(package / "_core.pyx"), "-o", str(source)]
        )
    compiler = shlex.split(sysconfig.get_config_var("CC")) + shlex.split(sysconfig.get_config_var("CCSHARED"))
    include = sysconfig.get_paths()["include"]
    compiler += [
        "-shared",
        "-O1",
        "-std=c11",
        "-w",
        f"-I{include}",
        f"-I{package}",
        *flags,
        str(source),
        "-o",
        str(target),
    ]
    for command in (*commands, compiler):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return target


class _Finder:
    """Finds the one module elsewhere."""

    def __init__(self, path: str) -> None:
        self._path = path

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """See importlib.abc.MetaPathFinder."""
        if name != CORE:
            return None
        loader = importlib.machinery.ExtensionFileLoader(name, self._path)
        return importlib.util.spec_from_file_location(name, self._path, loader=loader)


def use(path: str) -> None:
    """From now on this process imports that build as the extension. Before anything of gcma_shm is imported."""
    assert CORE not in sys.modules
    sys.meta_path.insert(0, _Finder(path))


def environment(path: Path) -> dict[str, str]:
    """The environment of Python processes that use that build, also of those that they start."""
    found = [str(path.parent), str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {CORE_ENVIRONMENT: str(path), "PYTHONPATH": os.pathsep.join(found)}


def _customize(directory: Path) -> None:
    """What Python runs as it starts, where that directory is on its path."""
    (directory / "sitecustomize.py").write_text(
        f"import os\nif os.environ.get({CORE_ENVIRONMENT!r}):\n"
        f"    from tests.faults.builds import use\n    use(os.environ[{CORE_ENVIRONMENT!r}])\n"
    )
