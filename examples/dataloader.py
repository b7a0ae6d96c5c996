"""A PyTorch DataLoader whose workers hand their batches over through the arena.

A worker stacks its samples in a buffer; the main process has a tensor on that very memory, which is free again when the tensor
is gone. No batch is copied on its way, and none is left in /dev/shm when a worker is killed.

    python examples/dataloader.py        needs torch and numpy
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

import gcma_shm
from gcma_shm.clients import reducer

Array = npt.NDArray[Any]

WAIT_S = 60  # of a worker, for room in the arena


class Pictures:
    """A dataset: 200 pictures with a label each."""

    def __len__(self) -> int:
        return 200

    def __getitem__(self, number: int) -> tuple[Array, int]:
        return np.full((3, 64, 64), number, np.float32), number % 10


@functools.cache
def arena(endpoint: str) -> gcma_shm.Client:
    """A worker's client, connected with its first batch."""
    # From now on arrays on Buffers go through torch's queues as handles. A batch that a loop which ended early left in one is held for no
    # more than ten seconds after its worker.
    reducer.register(after_end=10)
    return gcma_shm.connect(endpoint)


class Collate:
    """Stacks samples in the arena: what a DataLoader wants as its `collate_fn`."""

    def __init__(self, client: gcma_shm.Client) -> None:
        self.endpoint = client.endpoint

    def __call__(self, samples: Sequence[tuple[Array, int]]) -> tuple[Array, Array]:
        """In a worker: one buffer for all pictures; it is freed with the last array on it, here or there."""
        pictures, labels = zip(*samples, strict=True)
        nbytes = sum(picture.nbytes for picture in pictures)
        buffer = arena(self.endpoint).alloc_contig(nbytes, timeout=WAIT_S)
        batch = buffer.numpy((len(pictures), *pictures[0].shape), pictures[0].dtype)
        return np.stack(pictures, out=batch), np.array(labels)


def tensors(loader: DataLoader[Any]) -> Iterator[list[torch.Tensor]]:
    """In the main process: each batch as tensors on the same memory."""
    for batch in loader:
        yield [torch.from_numpy(array) for array in batch]


def train(client: gcma_shm.Client, method: str, persistent: bool) -> None:
    """Three epochs with two workers, each batch checked against the plain computation."""
    data = Pictures()
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_size=16,
        num_workers=2,
        collate_fn=Collate(client),
        multiprocessing_context=method,
        persistent_workers=persistent,
    )
    for epoch in range(3):
        first = 0
        for pictures, labels in tensors(loader):
            assert torch.equal(pictures[:, 0, 0, 0], torch.arange(first, first + len(labels), dtype=torch.float32))
            assert torch.equal(labels, pictures[:, 2, 63, 63].long() % 10)
            first += len(labels)
        assert first == len(data)
        held = sum(area.held for area in client.areas())
        print(f"{method}, epoch {epoch}: {first} pictures; the last batch and nothing else is held: {held >> 10} KiB")


def main(*methods: str) -> None:
    """Trains with workers of each start method."""
    with gcma_shm.embedded("32M") as client:
        for method in methods or ("fork", "spawn"):
            train(client, method, persistent=method == "spawn")
        held = sum(area.held for area in client.areas())
        print(f"held at the end: {held} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
