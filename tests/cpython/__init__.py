"""CPython's own tests of `multiprocessing.shared_memory`, pointed at ours."""
