"""CPython's own tests of pools, queues and shared memory, pointed at ours."""
