"""A pytest plugin under which "loky", joblib's default backend, is ours: for joblib's and scikit-learn's own tests.

Some of joblib's ask for the very class by its name, so that name is put over ours as well, before their modules are imported.
"""

from __future__ import annotations

import joblib._parallel_backends
import joblib.parallel

from gcma_shm.clients.joblib import ArenaBackend

ArenaBackend.__name__ = "LokyBackend"
for module in (joblib.parallel, joblib._parallel_backends):
    module.LokyBackend = ArenaBackend
joblib.parallel.BACKENDS["loky"] = ArenaBackend
