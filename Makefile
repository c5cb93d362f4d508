# Every target sets up .venv by itself: `make demo` and `make test` work on a fresh machine with Python >= 3.11 and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
SHELL := /bin/bash

# One torch thread in each of two test processes is quicker than two processes that compete for the same cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
EDGE := .venv-edge
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile --durations=30
SOURCES := vlmopt passes tests examples

.PHONY: help setup demo test test-slow test-edge lint format bench clean

help:
	@echo "make demo       compile the example models for their tasks and print before/after"
	@echo "make test       quick tests"
	@echo "make test-slow  the tests that take longer"
	@echo "make test-edge  tests of files for ExecuTorch, in an environment of their own ($(EDGE))"
	@echo "make lint       format check, lint and types"
	@echo "make format     apply the format and the safe lint fixes"
	@echo "make bench      measure, and write tests/benchmarks/results/"
	@echo "make setup      create $(VENV) with the tested versions (the other targets do this when it is needed)"
	@echo "make clean      remove $(VENV), caches and build outputs"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is `$(PYTHON) --version 2>&1`; vlmopt needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "setting up $(VENV) with `$(PYTHON) --version` (once; downloads the packages that are missing)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "error: $(PYTHON) cannot create a virtual environment; install its venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e '.[dev,examples]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(PYTEST) -m "not slow" tests

test-slow: $(STAMP)
	$(PYTEST) -m slow tests

# ExecuTorch brings torchao, which transformers and peft treat otherwise once it is there: everything else is tested without.
$(EDGE)/.set-up: $(STAMP) constraints-edge.txt
	test -x $(EDGE)/bin/python || $(BIN)/python -m venv $(EDGE)
	echo "import site; site.addsitedir('`$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`')" \
	  > "`$(EDGE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/beside.pth"
	$(EDGE)/bin/python -m pip install --progress-bar on -c constraints.txt -c constraints-edge.txt executorch torchao
	@touch $@

test-edge: $(EDGE)/.set-up
	$(TEST_ENV) $(EDGE)/bin/python -m pytest -q --durations=5 -k "executorch or xnnpack or kernel" tests/emit/test_edge_files.py

lint: $(STAMP)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf $(VENV) $(EDGE) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find vlmopt passes tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
