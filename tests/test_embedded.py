"""A broker that belongs to one process: it ends with its owner however that ends, and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import gcma_shm
from gcma_shm import ArenaError, Closed
from gcma_shm import arena as arenas
from gcma_shm.clients import embedded
from gcma_shm.clients.embedded import EmbeddedClient
from gcma_shm.endpoint import arena_name, socket_path
from tests.processes import WAIT_S, Said, eventually, forked, in_fork, run_python, runs, start_python

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def spilled() -> list[Path]:
    return list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.*"))


def is_gone(endpoint: str, pid: int) -> bool:
    return not (
        runs(pid)
        or (arenas.SHM_DIR / arena_name(endpoint)[1:]).exists()
        or socket_path(endpoint).parent.exists()
        or spilled()
    )


def test_it_starts_serves_and_is_gone() -> None:
    with gcma_shm.embedded("8M", areas={"frames": "2M"}, page_size="64K", slots=100, clients=5) as client:
        assert client.mapped
        assert client.page_size == 64 << 10
        assert [(area.name, area.size) for area in client.areas()] == [("frames", 2 << 20)]
        assert client.stats()["arena"]["slots"] == 100
        endpoint, pid = client.endpoint, client.broker_pid
        assert runs(pid)
    assert is_gone(endpoint, pid)
    client.close()


def test_sizes_as_numbers_and_words() -> None:
    for size in (4 << 20, "4M", "4 MiB"):
        with gcma_shm.embedded(size) as client:
            assert client.stats()["arena"]["size"] == 4 << 20


@pytest.mark.parametrize("options", [{"size": "much"}, {"size": 0}, {"page_size": "none"}, {"areas": {"a": "b"}}])
def test_what_is_no_size(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="size"):
        gcma_shm.embedded(**options)  # type: ignore[arg-type] # on purpose


def test_what_cannot_be_is_an_arena_error_with_the_brokers_words() -> None:
    for options, words in (
        ({"size": "16T"}, "too little shared memory"),
        ({"size": "64K"}, "too small"),
        ({"size": "4M", "areas": {"a": "8M"}}, "make it about"),
        ({"size": "4M", "page_size": 5000}, "power of two"),
        ({"size": "4M", "spill_dir": "/proc/nowhere"}, "/proc/nowhere"),
        ({"size": "4M", "spill_dir": "/dev/shm/x"}, "shared memory"),
    ):
        with pytest.raises((ArenaError, ValueError), match=words):
            gcma_shm.embedded(**options)


def test_an_option_that_argparse_refuses_is_an_error_and_no_hang() -> None:
    with pytest.raises((ArenaError, ValueError, TypeError)):
        gcma_shm.embedded("4M", slots="many")  # type: ignore[arg-type] # on purpose


def test_a_relative_spill_dir_is_the_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with gcma_shm.embedded("4M", spill_dir="pages") as client:
        client.swap(0, 10).store(1, b"x-gcma--" * 512)
        assert list((tmp_path / "pages").rglob("000.1")), "the broker runs elsewhere, the path is the caller's"


def test_closing_ends_the_types_and_requests_of_all() -> None:
    with gcma_shm.embedded("4M") as owner:
        other = gcma_shm.connect(owner.endpoint)
        swap = other.swap(0, 10)
        swap.store(1, b"x-gcma--" * 512)
    with pytest.raises(Closed):
        swap.load(1)
    with pytest.raises(Closed):
        swap.store(1, b"y-gcma--" * 512)
    other._channel.timeout = 0.3  # nobody answers any more
    with pytest.raises(gcma_shm.BrokerUnavailable):
        other.areas()
    other.close()


def test_close_is_refused_with_a_view_and_the_broker_lives_on() -> None:
    with gcma_shm.embedded("4M") as owner:
        buffer = owner.alloc_contig(4096)
        view = buffer.view
        with pytest.raises(BufferError):
            owner.close()
        assert runs(owner.broker_pid)
        assert owner.areas()
        view.release()


def test_several_at_once() -> None:
    with gcma_shm.embedded("4M") as a, gcma_shm.embedded("4M") as b:
        a.swap(0, 10).store(1, b"a-gcma--" * 512)
        assert b.swap(0, 10).load(1) is None


def test_a_childs_close_leaves_the_parents_broker() -> None:
    with gcma_shm.embedded("4M") as client:
        swap = client.swap(0, 10)

        def child(_: Said) -> bool:
            swap.store(1, b"x-gcma--" * 512)
            client.close()
            return client.closed

        assert in_fork(child)
        assert swap.load(1) == b"x-gcma--" * 512
        assert client.areas()


OWNER = (
    "import gcma_shm, os, sys\n"
    "client = gcma_shm.embedded('8M')\n"
    "swap = client.swap(0, 100)\n"
    "for n in range(100): swap.store(n, b'x-gcma--' * 512)\n"
    "buffer = client.alloc_contig(1 << 20)\n"
    "print(client.endpoint, client.broker_pid, flush=True)\n"
)


def start_owner(more: str) -> tuple[subprocess.Popen[str], str, int]:
    process = start_python(OWNER + more)
    assert process.stdout is not None
    endpoint, pid = process.stdout.readline().split()
    return process, endpoint, int(pid)


def finish(process: subprocess.Popen[str]) -> int:
    process.communicate()
    return process.wait()


@pytest.mark.parametrize(
    ("last_words", "status"),
    [
        ("client.close()", 0),
        ("pass", 0),
        ("del client, swap, buffer", 0),
        ("sys.exit(3)", 3),
        ("os._exit(4)", 4),
        ("os.kill(os.getpid(), 9)", -9),
        ("os.kill(os.getpid(), 15)", -15),
        ("os.abort()", -signal.SIGABRT),
    ],
)
def test_it_ends_with_its_owner(last_words: str, status: int) -> None:
    process, endpoint, pid = start_owner(last_words + "\n")
    assert finish(process) == status
    assert eventually(lambda: is_gone(endpoint, pid)), "the broker or something of it is left"


def test_its_owner_is_killed_while_everything_is_in_use() -> None:
    process, endpoint, pid = start_owner("sys.stdin.read()\n")
    with gcma_shm.connect(endpoint) as other:
        swap = other.swap(0, 100)
        assert swap.load(5) == b"x-gcma--" * 512
        view = other.alloc_contig(4096).view
        process.kill()
        finish(process)
        assert eventually(lambda: is_gone(endpoint, pid))
        with pytest.raises(Closed):
            swap.load(5)
        view[:5] = b"still"
        assert bytes(view[:5]) == b"still", "no SIGBUS: what is mapped stays"
        view.release()


def test_a_forked_worker_that_outlives_the_owner_does_not_keep_the_broker() -> None:
    def owner(said: Said) -> None:
        client = gcma_shm.embedded("4M")

        def child(heard: Said) -> None:
            heard.say()
            with contextlib.suppress(EOFError):
                heard.hear()
            said.hear()

        with forked(child) as own:
            own.receive()
            said.say((client.endpoint, client.broker_pid))
            os.kill(os.getpid(), signal.SIGKILL)

    with forked(owner) as running:
        endpoint, pid = running.receive()
        assert running.wait() == -signal.SIGKILL
        assert eventually(lambda: is_gone(endpoint, pid))
        running.tell()


def test_ctrl_c_is_the_owners_to_act_on() -> None:
    """The terminal sends SIGINT to the whole foreground group; the broker is in none of it."""
    process, endpoint, pid = start_owner(
        "import signal; signal.signal(2, signal.SIG_IGN); sys.stdin.readline(); print(len(swap), flush=True)\n"
    )
    assert os.getpgid(pid) != os.getpgid(process.pid)
    assert os.getsid(pid) == pid
    out, _ = process.communicate("go on\n")
    assert out.split() == ["100"]
    assert eventually(lambda: is_gone(endpoint, pid))


def test_no_descriptor_of_the_owner_leaks_into_the_broker(client: EmbeddedClient, tmp_path: Path) -> None:
    links = set()
    for path in Path(f"/proc/{client.broker_pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it opens and closes some as it goes
            links.add(str(path.readlink()))
    assert not any(str(tmp_path) in link and "cache" not in link for link in links)
    assert sum("gcma-" in link and "/dev/shm" in link for link in links) >= 1


def test_it_works_from_anywhere_and_warns_of_nothing() -> None:
    code = (
        "import gcma_shm\n"
        "with gcma_shm.embedded('4M') as client:\n"
        "    swap = client.swap(0, 10)\n"
        "    swap.store(7, b'x-gcma--' * (client.page_size // 8))\n"
        "    with client.alloc_contig(1 << 20) as frame: frame.view[:5] = b'hello'\n"
        "    print(swap.load(7) == b'x-gcma--' * (client.page_size // 8))\n"
    )
    assert run_python(code, cwd="/").strip() == "True"


LEAVES_FIRST = """
import atexit, multiprocessing, sys
import gcma_shm

def work(endpoint, left):
    left.recv()  # None: the main program has come to its end
    with gcma_shm.connect(endpoint) as client, client.attach("x") as buffer:
        print(buffer.view[0], flush=True)

def last():
    with client.alloc_contig(1) as buffer:
        print("last", buffer.nbytes, flush=True)
    for _, ours, _ in children:
        ours.send(None)

if __name__ == "__main__":
    atexit.register(last)
    client = gcma_shm.embedded("4M")
    children = []
    buffer = client.alloc_contig(1, name="x")
    buffer.view[0] = 7
    for method in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        child = context.Process(target=work, args=(client.endpoint, theirs))
        child.start()
        children.append((child, ours, theirs))
"""


def test_it_serves_children_that_its_owner_waits_for_at_the_end(tmp_path: Path) -> None:
    """And what the owner has left to do at its exit. multiprocessing joins children there that nobody has joined."""
    program = tmp_path / "program.py"
    program.write_text(LEAVES_FIRST)
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", program],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "last 4096\n7\n7\n7\n", "")


def test_the_example_in_the_packages_docstring() -> None:
    example = re.sub(
        r"^(>>>|\.\.\.) ?",
        "",
        "\n".join(line for line in (gcma_shm.__doc__ or "").splitlines() if line[:3] in (">>>", "...")),
        flags=re.M,
    )
    example = example.replace("    swap.load(7) ==", "    assert swap.load(7) ==").replace("64M", "40M")
    assert "assert" in example
    assert run_python(example) == ""


def test_without_the_interpreters_own_path(tmp_path: Path) -> None:
    """`python -I` and an odd working directory: the broker is started with the path that its owner found the package by."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", "import gcma_shm; gcma_shm.embedded('4M').close(); print('fine')"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "fine", done.stderr


def test_an_owner_without_standard_streams() -> None:
    """A daemon has closed them, so the numbers 0 to 2 are given to whatever it opens next."""
    code = (
        "import os\n"
        "out = os.dup(1)\n"
        "for fd in (0, 1, 2): os.close(fd)\n"
        "import gcma_shm\n"
        "with gcma_shm.embedded('4M') as client: os.write(out, str(len(client.areas())).encode())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "1"


def test_a_broker_of_another_owner_and_at_a_known_place() -> None:
    endpoint = f"ipc://{tempfile.gettempdir()}/known/broker"
    with forked(lambda said: said.hear()) as owner:
        client = gcma_shm.embedded("16M", endpoint=endpoint, owner=owner.pid)
        with pytest.raises(ArenaError, match="another broker"):
            gcma_shm.embedded("16M", endpoint=endpoint)
        assert client.endpoint == endpoint
        with gcma_shm.connect(endpoint) as other:
            assert other.alloc_contig(1).nbytes == 4096, "whoever comes second removes nothing of the first one's"
        client.close()
        gcma_shm.connect(endpoint).close()
        owner.kill()
        assert eventually(lambda: not (arenas.SHM_DIR / arena_name(endpoint)[1:]).exists())
    os.waitpid(client.broker_pid, 0)
    assert not Path(endpoint.removeprefix("ipc://")).parent.exists()


def test_a_brokers_number_may_be_anybodys_once_it_has_ended() -> None:
    """The interpreter's end looks after brokers that were closed long before."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    ended.pid = os.getpid()  # who goes on
    begun = time.monotonic()
    embedded._wait(ended, WAIT_S)
    assert time.monotonic() - begun < WAIT_S
