# One word per chore; every target sets up what it needs, and a second run is quick.

PYTHON ?= python3
VENV ?= .venv
PRESET ?= tmaze
OVERRIDES ?=
WORKERS ?= 2

TRITON ?= 3.7.1
TRITON_VENV ?= .venv-triton-$(TRITON)

RAY ?= 2.60.0
RLLIB_VENV ?= .venv-rllib

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What training needs, and what tests, lint and documentation need besides.
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
# More threads than workers make small networks slower, not faster.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup train test test-triton test-triton-interpreter test-triton-compiler slow-triton test-rllib gpu-check lint slow bench docs clean

help:
	@echo "make train   train an agent (PRESET=$(PRESET), OVERRIDES='a.b=value ...')"
	@echo "make setup   everything for development, in $(VENV)"
	@echo "make test    lint, types and the quick tests"
	@echo "make lint    ruff and mypy alone"
	@echo "make slow    the slow tests"
	@echo "make docs    the documentation as web pages, in site/"
	@echo "make test-triton  the GPU kernels without a GPU, two jobs (TRITON=$(TRITON)):"
	@echo "make test-triton-interpreter  what they compute, run by Triton's interpreter"
	@echo "make test-triton-compiler     what they become, compiled ahead of time for several GPUs"
	@echo "make slow-triton  the compiler job for more kinds of GPU"
	@echo "make test-rllib   the module for RLlib (ray $(RAY)), and the package with the gymnasium that ray pins"
	@echo "make gpu-check    correctness and speed of the kernels on this machine's GPU"
	@echo "make bench   speed and learning benchmarks"
	@echo "make clean   remove what make created, runs/ excepted"

setup: $(DEV)

$(RUNTIME) $(DEV): pyproject.toml setup.py constraints.txt $(wildcard xlstm_rl/kernels/cpp/*)

# A torch that is already in the environment stays, so its smaller CPU build can be installed there first.
$(RUNTIME):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e .
	touch $@

$(DEV):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install -c constraints.txt --no-deps xlstm
	touch $(RUNTIME) $@

train: $(RUNTIME)
	$(BIN)/xlstm-rl train $(PRESET) $(OVERRIDES)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(ONE_THREAD) $(BIN)/pytest -q tests/test_layout.py
	$(ONE_THREAD) $(BIN)/pytest -q -n $(WORKERS) --ignore=tests/test_layout.py

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

slow: $(DEV)
	$(ONE_THREAD) $(BIN)/pytest -q -m slow

# Triton beside the packages of the first environment, every version in one of its own; torch for the CPU does not bring it.
TRITON_STAMP := $(TRITON_VENV)/.installed
# The interpreter up to 3.6 makes numbers of arrays with one element; NumPy warns of that, and refuses it from 2.4 on.
OLD_TRITON := $(filter 3.5.% 3.6.%,$(TRITON))
TRITON_NUMPY := $(if $(OLD_TRITON),'numpy<2.4')
TRITON_WARNINGS := $(if $(OLD_TRITON),-W 'ignore:Conversion of an array with ndim')

$(TRITON_STAMP): $(DEV)
	test -x $(TRITON_VENV)/bin/python || $(BIN)/python -m venv $(TRITON_VENV)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(TRITON_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/first.pth"
	$(TRITON_VENV)/bin/python -m pip --disable-pip-version-check install --no-deps triton==$(TRITON) $(TRITON_NUMPY)
	touch $@

# Two jobs: what was imported to be interpreted cannot be compiled.
test-triton: test-triton-interpreter test-triton-compiler

test-triton-interpreter: $(TRITON_STAMP)
	$(ONE_THREAD) OPENBLAS_NUM_THREADS=1 TRITON_INTERPRET=1 PYTHONPATH=. $(TRITON_VENV)/bin/python -m pytest -q $(TRITON_WARNINGS) \
		tests/gpu/test_interpreter.py tests/gpu/test_sanitizer.py

test-triton-compiler: $(TRITON_STAMP)
	$(ONE_THREAD) TRITON_INTERPRET=0 PYTHONPATH=. $(TRITON_VENV)/bin/python -m pytest -q tests/gpu/test_compilation.py

slow-triton: $(TRITON_STAMP)
	$(ONE_THREAD) TRITON_INTERPRET=0 PYTHONPATH=. $(TRITON_VENV)/bin/python -m pytest -q -m slow tests/gpu/test_compilation.py

# RLlib and the gymnasium that it pins before the packages of the first environment.
RLLIB_STAMP := $(RLLIB_VENV)/.installed-$(RAY)

$(RLLIB_STAMP): $(DEV)
	test -x $(RLLIB_VENV)/bin/python || $(BIN)/python -m venv $(RLLIB_VENV)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(RLLIB_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/first.pth"
	grep -v '^gymnasium==' constraints.txt > $(RLLIB_VENV)/constraints.txt
	$(RLLIB_VENV)/bin/python -m pip --disable-pip-version-check install -c $(RLLIB_VENV)/constraints.txt 'ray[rllib]==$(RAY)'
	rm -f $(RLLIB_VENV)/.installed-*
	touch $@

# Warnings of ray are not ours; then what meets gymnasium, where warnings are errors again.
test-rllib: $(RLLIB_STAMP)
	$(ONE_THREAD) PYTHONPATH=$(CURDIR) $(RLLIB_VENV)/bin/python -m pytest -q -W default -m "slow or not slow" tests/rllib
	$(ONE_THREAD) PYTHONPATH=$(CURDIR) $(RLLIB_VENV)/bin/python -m pytest -q -n $(WORKERS) tests/envs tests/agents tests/runs

gpu-check: $(RUNTIME)
	$(BIN)/python -m benchmarks.gpu_check

# gpu_check needs a GPU and has a target of its own.
bench: $(DEV)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.layers
	$(ONE_THREAD) $(BIN)/python -m benchmarks.throughput
	$(ONE_THREAD) $(BIN)/python -m benchmarks.collapse

clean:
	rm -rf $(VENV) .venv-triton-* $(RLLIB_VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
