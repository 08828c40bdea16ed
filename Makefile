# The commands of a user. `make train` and `make test` need only python3 (>= 3.10), pip, venv and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -q -n 3 --dist loadgroup
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: train test test-all exact-demo faults gpu-check lint audit help

help:  ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

train: $(VENV)/.ready  ## train configs/quickstart.yaml on all GPUs of this machine, or on the CPU
	$(BIN)/python -m launch run -- --config configs/quickstart.yaml

test: $(VENV)/.ready-dev  ## test every law in its smallest form (20 minutes on 2 cores)
	$(PYTEST) -m 'not slow'

test-all: test  ## test the same, then everything else: larger worlds, longer runs, rehearsals (half an hour more)
	$(PYTEST) -m slow

exact-demo: $(VENV)/.ready  ## train on 1, 2 and 4 processes, kill one, compare the bits (under 2 minutes)
	$(BIN)/python -m launch demo

faults: $(VENV)/.ready-dev  ## run the fault campaigns: kills, restarts, crash points, a long run (an hour or two)
	$(BIN)/python tests/faults.py elastic kills crash-points long

gpu-check: $(VENV)/.ready-dev  ## check this machine's GPUs in nine minutes and write a receipt to send in (docs/gpu.md)
	PYTHON=$(BIN)/python bash tests/gpu/check.sh

lint: $(VENV)/.ready-dev  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

audit:  ## look for known vulnerabilities of the pinned packages (asks PyPI)
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(VENV)/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python {sys.version.split()[0]} is too old. Use 3.10 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[report]'
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(INSTALL) '.[report,bench,export,dev]'
	touch $@
