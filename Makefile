# Everything a person starts. `make train` and `make test` need only python3 (>= 3.10), pip, venv and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test exact-demo lint help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

train: $(READY)  ## train configs/quickstart.yaml on every GPU of this machine (one process on a CPU)
	$(BIN)/python -m launch run -- --config configs/quickstart.yaml

test: $(READY)  ## run the test suite
	$(BIN)/python -m pytest -q

exact-demo: $(READY)  ## the same bits on 1, 2 and 4 processes, one of them killed (under 2 minutes)
	$(BIN)/python -m launch demo

lint: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python {sys.version.split()[0]} is too old. Use 3.10 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[report,bench,export,dev]'
	touch $@
