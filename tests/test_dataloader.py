"""PyTorch's DataLoader with the collate function of examples/dataloader.py: batches are the arena's memory, and none is held for nothing."""

from __future__ import annotations

import gc
import os
import runpy
import signal
from pathlib import Path
from typing import Any

import pytest

import gcma_shm
from gcma_shm.clients.embedded import EmbeddedClient

from .client import held
from .processes import eventually

torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
example = runpy.run_path(str(Path(__file__).resolve().parent.parent / "examples" / "dataloader.py"))
data, collate = example["Pictures"](), example["Collate"]

BATCH_BYTES = 16 * 3 * 64 * 64 * 4


def loader(client: gcma_shm.Client, workers: int, **options: Any) -> Any:
    context = "fork" if workers else None  # spawn: in the example itself
    return torch.utils.data.DataLoader(
        data, 16, num_workers=workers, collate_fn=collate(client), multiprocessing_context=context, **options
    )


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_batch_is_the_arenas_memory_and_goes_with_its_tensor(client: EmbeddedClient, workers: int) -> None:
    kept: list[Any] = []
    for pictures, labels in loader(client, workers):
        tensor = torch.from_numpy(pictures)
        if workers:
            assert client.locate(tensor.data_ptr(), tensor.nbytes) is not None, "a copy"
        if len(kept) < 3:
            kept.append(tensor[1:])
        assert tensor[0, 0, 0, 0] % 10 == labels[0]
    del pictures, tensor
    gc.collect()
    assert eventually(lambda: held(client) == 3 * BATCH_BYTES)
    assert [int(part[0, 0, 0, 0]) for part in kept] == [1, 17, 33]
    kept[0].zero_()
    assert not kept[0].any()
    del kept[0]
    assert eventually(lambda: held(client) == 2 * BATCH_BYTES)
    kept.clear()
    assert eventually(lambda: held(client) == 0)


def test_workers_that_live_through_epochs_keep_nothing(client: EmbeddedClient) -> None:
    batches = loader(client, 2, persistent_workers=True)
    for _ in range(4):
        assert sum(len(labels) for _, labels in batches) == len(data)
        gc.collect()
        assert eventually(lambda: held(client) == 0)


def failure_of(batches: Any) -> Exception:
    """What iterating raises, without its traceback, which would keep the loader, its workers, and with them what they hold."""
    try:
        list(batches)
    except Exception as error:
        return error.with_traceback(None)
    raise AssertionError("nothing is raised")


def test_no_room_is_told_in_the_main_process(client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(example["Collate"].__call__.__globals__, "WAIT_S", 0.0)
    with client.alloc_contig(client.areas()[0].size):
        error = failure_of(loader(client, 1))
    assert isinstance(error, gcma_shm.ArenaExhausted)
    assert "in DataLoader worker" in str(error)
    gc.collect()
    assert eventually(lambda: held(client) == 0)


def test_what_a_killed_worker_has_sent_stays_good(client: EmbeddedClient) -> None:
    coming = iter(loader(client, 1))
    pictures, _ = next(coming)
    os.kill(coming._workers[0].pid, signal.SIGKILL)
    error = failure_of(coming)
    assert isinstance(error, RuntimeError)
    assert "DataLoader worker" in str(error)
    assert int(pictures[3, 0, 0, 0]) == 3
    del pictures, coming, error
    gc.collect()


def test_a_loop_that_ends_early(client: EmbeddedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sent and not taken goes with its handles' time."""
    hand_over = gcma_shm.Client.hand_over
    monkeypatch.setattr(gcma_shm.Client, "hand_over", lambda self, reference, *_: hand_over(self, reference, 0.5))
    for pictures, _ in loader(client, 2):
        assert int(pictures[0, 0, 0, 0]) == 0
        break
    del pictures
    gc.collect()
    assert eventually(lambda: held(client) == 0)
