# Two commands do everything on a fresh machine: `make run` and `make test`. Both set up .venv first.

PYTHON ?= python3
BIN := .venv/bin
CORE := $(wildcard gcma_shm/*.pyx gcma_shm/*.pxd gcma_shm/*.pxi gcma_shm/*.h)

# Images for containers like to set it. Then each broker, worker and program that a test starts compiles all modules again, half of what its
# start takes.
unexport PYTHONDONTWRITEBYTECODE

all: .venv/ready

# One installation, built again when the extension's sources or the dependencies change.
.venv/ready: pyproject.toml setup.py MANIFEST.in $(CORE)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev,bench]'
	touch $@

run: all
	$(BIN)/python bench/main_job.py

# Many tests wait for processes, so one more at a time than there are processors. Each worker has a part of the list, the long tests first
# (tests/conftest.py), and when it is through some of another's.
test: all
	$(BIN)/python -m pytest --numprocesses $$(($$(nproc) + 1)) --dist worksteal

lint: all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/model/steps.py --check

types: all
	$(BIN)/mypy -p gcma_shm
	$(BIN)/mypy tests bench examples

check: lint types test

# The Promela models of the data plane, sound and with planted faults. Needs spin (Debian: apt-get install spin).
model: all
	$(BIN)/python tests/model/run.py
	$(BIN)/python tests/model/steps.py --check

# The broker killed at every change that it makes; then everything goes wrong for an hour, or as long as GCMA_SOAK_S says, with figures
# every minute. SOAK has more options: `gcma stress --help`.
soak: all
	GCMA_CRASH_DENSE=0 $(BIN)/python -m pytest --timeout=0 -s tests/faults/test_crashes.py
	$(BIN)/gcma stress --seconds $${GCMA_SOAK_S:-3600} $(SOAK)

# CPython's and joblib's own tests of what we stand in for, also the long ones, and the variants that come to the same for us.
others: all
	GCMA_OTHERS=all $(BIN)/python -m pytest tests/test_cpython_pools.py tests/test_joblib_own.py tests/test_shared_memory.py

# The concurrency tests, each one for that long, and guests of a cache at full speed for a hundred thousand allocations.
storms: all
	GCMA_SOAK_S=$${GCMA_SOAK_S:-600} GCMA_GUEST_ALLOCATIONS=$${GCMA_GUEST_ALLOCATIONS:-100000} \
		$(BIN)/python -m pytest --timeout=0 -s tests/test_concurrency.py tests/test_torn.py tests/test_guests.py

# The core under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer: each run for a minute, or as long as GCMA_SANITIZE_S
# says, and other tests of the core under the second and third.
sanitize: all
	GCMA_SANITIZE_S=$${GCMA_SANITIZE_S:-60} $(BIN)/python -m pytest tests/sanitize

# Coverage-guided fuzzing of the codec and the broker's service for a minute, or as long as GCMA_FUZZ_S says.
fuzz: all
	$(BIN)/pip install --quiet --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz.target

# The whole set of benchmarks, one after another (each tells its time); then docs/benchmarks.md and its plots from what they found. Alone on the machine, or the
# figures are its load's. On two cores lent took 9 minutes, peers 4, scaling 2, policy 100 s, pages 60, spill_io 48, requests 25; adversity 32; the others have not been timed.
# Some of them only: `make bench NAMES='peers checksum'`. The peers' servers: apt-get install redis-server memcached.
bench: all
	$(BIN)/python bench/suite.py $(NAMES)

# docs/benchmarks.md again, from the published records in docs/benchmarks/ alone.
bench-docs: all
	$(BIN)/python bench/publish.py

clean:
	rm -rf .venv build dist *.egg-info gcma_shm/_core.c gcma_shm/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/out

.PHONY: all run test lint types check model soak others storms sanitize fuzz bench bench-docs clean
