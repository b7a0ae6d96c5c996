"""The request traces that `policy.py` replays: which page each request asks for, and how pages are numbered.

They come from the source distribution of libcachesim on PyPI (the traces in it are published for research: a virtual machine's disk of
CloudPhysics, and Twitter's cache cluster 52). The archive, 81 MB, is fetched once with pip; the two traces are kept as numbers under the user's
cache directory. Nothing else of libcachesim is used.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

PACKAGE = "libcachesim==0.3.5"
PAGE = 4096
BLOCK = 512  # of the virtual disk
Trace = npt.NDArray[np.uint32]

_SUMS = {
    "cloudPhysicsIO.csv": "987ff2213050e47d24e8ba6e010d4b3127e51aafef6a76a8a6d43d13b9156fa1",
    "twitter_cluster52.csv": "cf4d37d041569bb30c3bc32b7b54dd40b40438c53ee72e4919acf810063d189a",
}


def traces() -> dict[str, Trace]:
    """Both, numbered from 0 by key."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gcma-bench"
    kept = {"vm": home / "vm-blocks.npy", "twitter": home / "twitter-52.npy"}
    if not all(path.exists() for path in kept.values()):
        home.mkdir(parents=True, exist_ok=True)
        _fetch(kept)
    return {name: np.load(path) for name, path in kept.items()}


def _fetch(kept: dict[str, Path]) -> None:
    print(f"fetching the traces once: pip download {PACKAGE} (81 MB); they stay in {kept['vm'].parent}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", PACKAGE]
        subprocess.run([*command, "--dest", directory], check=True)
        (archive,) = Path(directory).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            files = {name: _member(tar, name) for name in _SUMS}
    _keep(kept["vm"], _pages(files["cloudPhysicsIO.csv"]))
    _keep(kept["twitter"], _objects(files["twitter_cluster52.csv"]))


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    (member,) = (found for found in tar.getmembers() if found.name.endswith(f"/data/{name}"))
    file = tar.extractfile(member)
    assert file is not None
    content = file.read()
    if hashlib.sha256(content).hexdigest() != _SUMS[name]:
        raise ValueError(f"{name} in {PACKAGE} is not the trace that the reference figures were taken with")
    return content


def _pages(content: bytes) -> list[int]:
    """Requests of a disk (version, time, operation, bytes, block), as the pages of PAGE bytes that each touches, in order."""
    found: list[int] = []
    for line in content.splitlines()[1:]:
        _version, _time, _operation, size, block = line.split(b",")
        first = int(block) * BLOCK
        found += range(first // PAGE, (first + int(size) - 1) // PAGE + 1)
    return found


def _objects(content: bytes) -> list[int]:
    """Requests of a key-value cache (time, object, size, next access); an object is a page here, whatever its size."""
    return [int(line.split(b",")[1]) for line in content.splitlines() if not line.startswith(b"#")]


def _keep(path: Path, keys: list[int]) -> None:
    _, numbers = np.unique(np.array(keys, np.uint64), return_inverse=True)
    draft = path.with_suffix(".tmp.npy")
    np.save(draft, numbers.astype(np.uint32))
    draft.replace(path)
