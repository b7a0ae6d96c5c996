"""Group-bys of one pandas DataFrame over a pool of processes.

The frame goes to six tasks, but into shared memory only once: each worker's DataFrame lies on the same memory, read-only.
With `concurrent.futures.ProcessPoolExecutor` in place of `ArenaExecutor` it is pickled through a pipe six times.

    python examples/pandas_groupby.py        needs pandas
"""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd

import gcma_shm
from gcma_shm.clients.executor import ArenaExecutor

ROWS = 500_000
KEYS = ["shop", "product", "weekday"]
QUESTIONS = [(key, how) for key in KEYS for how in ("sum", "median")]


def sales() -> pd.DataFrame:
    """A table of sales."""
    chance = np.random.default_rng(seed=6)
    return pd.DataFrame(
        {
            "shop": chance.integers(0, 50, ROWS),
            "product": chance.integers(0, 2000, ROWS),
            "weekday": chance.integers(0, 7, ROWS),
            "price": chance.gamma(2.0, 10.0, ROWS),
        }
    )


def grouped(frame: pd.DataFrame, key: str, how: str) -> pd.Series:
    """In a worker: prices by `key`."""
    prices: pd.Series = frame.groupby(key)["price"].agg(how)
    return prices


def main() -> None:
    """Asks all questions of the pool, and checks the answers against the plain computation."""
    frame = sales()
    with gcma_shm.embedded("64M") as client, ArenaExecutor(max_workers=2, client=client) as pool:
        tasks = {question: pool.submit(grouped, frame, *question) for question in QUESTIONS}
        for (key, how), task in tasks.items():
            answer = task.result()
            pd.testing.assert_series_equal(answer, grouped(frame, key, how))
            print(f"{how} of price by {key}: {len(answer)} groups, the largest {answer.max():,.2f}")
        pickled = len(pickle.dumps(frame)) * len(tasks)
        print(f"copied into shared memory: {pool.copied >> 20} MiB; by pipe it were {pickled >> 20} MiB")


if __name__ == "__main__":
    main()
