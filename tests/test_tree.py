"""The tree itself: who imports whom, which names are public, and that every file says what it is."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import gcma_shm
from tests.processes import run_python

ROOT = Path(__file__).resolve().parent.parent
DOORS = ("__init__.py", "aio.py")  # of the package: what users import from the clients' folder
PARTS = ("gcma_shm", "broker", "clients")
FILES = sorted(
    path.relative_to(ROOT)
    for part in (*PARTS, "tests", "bench")
    for path in (ROOT / part).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)
)


def imports(path: Path) -> set[str]:
    """Every module that the file imports, `from a import b` as both `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its direction"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def modules(part: str) -> list[Path]:
    return [ROOT / path for path in FILES if path.parts[0] == part]


def reaches(path: Path, part: str) -> set[str]:
    return {name for name in imports(path) if name == part or name.startswith((f"{part}.", f"gcma_shm.{part}"))}


def test_there_is_something_to_look_at() -> None:
    assert {path.parts[0] for path in FILES} >= {*PARTS, "tests"}
    assert all(len(modules(part)) > 4 for part in PARTS)


@pytest.mark.parametrize("path", modules("gcma_shm"), ids=lambda path: path.name)
def test_the_common_ground_imports_neither_side(path: Path) -> None:
    if path.name not in DOORS:
        assert not reaches(path, "broker")
        assert not reaches(path, "clients")


@pytest.mark.parametrize("name", DOORS)
def test_a_door_only_re_exports(name: str) -> None:
    """(`__getattr__` is how a module exports another one that is only imported where it is used.)"""
    assert not reaches(ROOT / f"gcma_shm/{name}", "broker")
    tree = ast.parse((ROOT / f"gcma_shm/{name}").read_text())
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert set(defined) <= {"__getattr__"}


def test_asyncio_is_imported_where_it_is_used() -> None:
    run_python(
        "import sys, gcma_shm\n"
        "assert not {'asyncio', 'zmq.asyncio', 'gcma_shm.aio'} & set(sys.modules)\n"
        "assert gcma_shm.aio.connect.__module__ == 'gcma_shm.clients.aio_client'\n"
        "assert 'zmq.asyncio' in sys.modules\n"
        "import gcma_shm.aio as door\n"
        "assert door is gcma_shm.aio\n"
    )
    with pytest.raises(AttributeError, match="no attribute 'aoi'"):
        _ = gcma_shm.aoi


def test_a_broker_starts_without_what_it_does_not_need() -> None:
    """Imports are most of what its start takes."""
    running = (
        "import sys\n"
        "from gcma_shm.broker import cli, process\n"
        "def run(settings, ready):\n"
        "    unused = 'asyncio ssl zmq.auth gcma_shm.check gcma_shm.broker.top gcma_shm.broker.reap gcma_shm.broker.showing'\n"
        "    print(set(unused.split()) & set(sys.modules))\n"
        "process.run = run\n"
        "sys.exit(cli.main(['broker', '--size', '8M']))\n"
    )
    assert run_python(running) == "set()\n"


@pytest.mark.parametrize("path", modules("broker"), ids=lambda path: path.name)
def test_the_broker_imports_no_client(path: Path) -> None:
    assert not reaches(path, "clients")


@pytest.mark.parametrize("path", modules("clients"), ids=lambda path: path.name)
def test_clients_import_no_broker(path: Path) -> None:
    assert not reaches(path, "broker")


@pytest.mark.parametrize(
    "name",
    [
        "extents", "areas", "table", "holders", "claims", "allocations", "line", "sessions", "rights", "connections", "registry", "service",
        "messages",
        "layout", "records", "correspondence", "holds", "steps",
    ],
)  # fmt: skip
def test_what_decides_touches_no_socket(name: str) -> None:
    paths = [ROOT / path for path in FILES if path.name == f"{name}.py" and path.parts[0] in PARTS]
    assert paths
    for path in paths:
        assert not imports(path) & {"zmq", "socket", "selectors", "select"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text()))
    assert docstring, "a module without a docstring"


PUBLIC = {
    "": [
        "ArenaError", "ArenaExhausted", "BrokerUnavailable", "Closed", "Forbidden", "GcmaError", "NoSuchArea", "NoSuchBuffer", "NoSuchType",
        "NurseryFull", "ProtocolError", "QuotaExceeded", "SlotBusy", "SpillCorrupt", "SpillError", "StaleHandle", "connect", "embedded", "errors",
    ],
    "Client": ["endpoint", "page_size", "areas", "stats", "close", "swap", "alloc_contig", "__enter__", "__exit__"],
    "Swap": [
        "store", "sync", "load", "load_into", "invalidate_page", "invalidate_area", "store_many", "load_many", "__contains__", "__len__",
    ],
    "Buffer": ["nbytes", "area", "offset", "view", "numpy", "free", "__enter__", "__exit__"],
    "AreaInfo": ["name", "size", "held", "lent", "free", "largest_free"],
}  # fmt: skip


@pytest.mark.parametrize("owner", PUBLIC)
def test_the_public_interface_is_there(owner: str) -> None:
    where = getattr(gcma_shm, owner) if owner else gcma_shm
    classes = (
        [kind for kind in getattr(where, "__mro__", [where]) if kind.__module__.startswith("gcma_shm.clients.")]
        if owner
        else [where]
    )
    source = "".join(map(inspect.getsource, classes))
    for name in PUBLIC[owner]:
        assert hasattr(where, name) or f"self.{name}" in source or f"{name}:" in source, f"{owner}.{name} is missing"


def test_what_is_public_is_documented() -> None:
    assert sorted(gcma_shm.__all__) == list(gcma_shm.__all__)
    for name in gcma_shm.__all__:
        thing = getattr(gcma_shm, name)
        assert thing.__doc__, f"{name} has no docstring"
        if inspect.isclass(thing):
            for method, value in vars(thing).items():
                if not method.startswith("_") and callable(value):
                    assert value.__doc__, f"{name}.{method} has no docstring"


@pytest.mark.parametrize(
    ("call", "names"),
    [
        ("connect", ["endpoint", "mapped", "prefault", "timeout", "wait_for_broker", "curve_key", "server_key"]),
        ("embedded", ["size", "areas", "page_size", "slots", "spill_dir"]),
        ("Client.swap", ["self", "type", "slots", "write"]),
        ("Client.alloc_contig", ["self", "nbytes", "area", "offset", "align", "zero"]),
        ("Buffer.numpy", ["self", "shape", "dtype"]),
        ("Swap.sync", ["self", "timeout"]),
    ],
)
def test_arguments_are_called_as_promised(call: str, names: list[str]) -> None:
    thing: object = gcma_shm
    for part in call.split("."):
        thing = getattr(thing, part)
    assert callable(thing)
    assert set(names) <= set(inspect.signature(thing).parameters)


@pytest.mark.parametrize(
    ("door", "name", "arguments"),
    [
        ("aio", "connect", ["endpoint", "mapped", "prefault", "timeout", "wait_for_broker"]),
        ("clients.executor", "ArenaExecutor", ["max_workers", "mp_context", "initializer", "initargs", "client"]),
        ("clients.joblib", "register", []),
        ("clients.mapping", "SwapMapping", ["client", "type", "slots"]),
        ("clients.reducer", "register", []),
        ("clients.shared_memory", "SharedMemory", ["name", "create", "size", "track"]),
        ("clients.shared_memory", "ShareableList", ["sequence", "name"]),
        ("clients.shared_memory", "SharedMemoryManager", []),
        ("clients.default", "default_client", []),
    ],
)
def test_the_other_doors_are_there(door: str, name: str, arguments: list[str]) -> None:
    thing = getattr(importlib.import_module(f"gcma_shm.{door}"), name)
    assert thing.__doc__
    assert set(arguments) <= set(inspect.signature(thing).parameters)


def test_the_three_parts_are_one_package() -> None:
    for name in ("broker.cli", "clients.client"):
        module = importlib.import_module(f"gcma_shm.{name}")
        assert module.__name__ == f"gcma_shm.{name}"
    for part in ("broker", "clients"):
        link = ROOT / "gcma_shm" / part
        assert link.is_symlink()
        assert link.resolve() == ROOT / part


# --- what comes over a socket is never run

RUNS_CODE = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml", "jsonpickle", "dbm"}
SOCKET_CODE = [path for part in PARTS for path in modules(part) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", SOCKET_CODE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    """Neither by name, nor by pyzmq's shortcuts for it. (Handles are pickled by whoever has pickled them, between processes of one
    user. `parcels` loads what a process pool's own queues bring: the pool's processes pickled it for each other.)
    """
    allowed = {"pickle"} if path.name in ("parcels.py", "packers.py") else set()
    assert not {name.partition(".")[0] for name in imports(path)} & RUNS_CODE - allowed
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = node.func
            name = (
                called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
            )
            assert name not in {"recv_pyobj", "send_pyobj", "recv_serialized", "__import__", "import_module"}, (
                f"{path}: {name}"
            )
            assert not (isinstance(called, ast.Name) and name in {"eval", "exec", "compile"}), f"{path}: {name}"


def test_messages_have_no_extension_types() -> None:
    """msgpack makes objects only of what a hook makes of them: there is none, and one place that unpacks."""
    unpacking: list[ast.Call] = []
    for path in SOCKET_CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "msgpack":
                assert node.attr in {"packb", "unpackb", "UnpackException"}, f"{path}: msgpack.{node.attr}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "unpackb":
                unpacking.append(node)
    (call,) = unpacking
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert given == {"max_ext_len": 0, "strict_map_key": True}, "no ext_hook, object_hook, timestamps, or list_hook"
