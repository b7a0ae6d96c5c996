"""A scikit-learn grid search whose workers share the training set.

Two lines make it so: `register()`, and `parallel_config(backend="gcma")` around the search. The data goes into shared memory
once, for all workers, in place of a memory-mapped file in a temporary folder.

    python examples/grid_search.py        needs scikit-learn
"""

from __future__ import annotations

import time

import numpy as np
from joblib import parallel_config
from sklearn.datasets import make_classification
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import GridSearchCV

import gcma_shm
from gcma_shm.clients.joblib import register

GRID = {"alpha": [1e-4, 1e-3, 1e-2], "loss": ["hinge", "log_loss"]}


def main() -> None:
    """Searches in parallel, and checks what was found against a search in this process alone."""
    samples, labels = make_classification(6000, 80, n_informative=20, random_state=6)  # 3.7 MiB
    search = GridSearchCV(SGDClassifier(max_iter=20, tol=None, random_state=6), GRID, cv=3)
    alone = search.fit(samples, labels).cv_results_["mean_test_score"]

    register()
    with gcma_shm.embedded("64M") as client, parallel_config(backend="gcma", n_jobs=2, client=client):
        begun = time.monotonic()
        search.fit(samples, labels)
        took = time.monotonic() - begun

    assert np.array_equal(search.cv_results_["mean_test_score"], alone)
    print(f"{len(alone)} settings, 3 folds each, by 2 workers: {took:.1f} s")
    print(f"best: {search.best_params_}, score {search.best_score_:.3f}, the same as in one process")


if __name__ == "__main__":
    main()
