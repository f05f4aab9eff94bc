# One word per chore; every target sets up what it needs, and a second run is quick.

PYTHON ?= python3
VENV ?= .venv
PRESET ?= tmaze
OVERRIDES ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
# More threads than workers make small networks slower, not faster.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup train test lint slow bench clean

help:
	@echo "make train   train an agent (PRESET=$(PRESET), OVERRIDES='a.b=value ...')"
	@echo "make test    lint, types and the quick tests"
	@echo "make lint    ruff and mypy alone"
	@echo "make slow    the slow tests"
	@echo "make bench   speed and learning benchmarks (about an hour)"
	@echo "make clean   remove what make created, runs/ excepted"

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard xlstm_rl/kernels/cpp/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install -c constraints.txt --no-deps xlstm
	touch $@

train: $(STAMP)
	$(BIN)/xlstm-rl train $(PRESET) $(OVERRIDES)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(ONE_THREAD) $(BIN)/pytest -q tests/test_layout.py
	$(ONE_THREAD) $(BIN)/pytest -q -n $(WORKERS) --ignore=tests/test_layout.py

slow: $(STAMP)
	$(ONE_THREAD) $(BIN)/pytest -q -m slow

bench: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.throughput
	$(ONE_THREAD) $(BIN)/python -m benchmarks.learning
	$(ONE_THREAD) $(BIN)/python -m benchmarks.collapse

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
