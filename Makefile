# Each goal makes .venv and installs what it needs. PIP_CONSTRAINT is respected, and so is a torch
# that $(PYTHON) already has.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# the kernels on the CPU, in Triton's interpreter; without Triton these tests skip or take torch's path
INTERPRETED := $(wildcard tests/ops/test_token_logps*.py tests/ops/test_tdpo1*.py tests/ops/test_sequence_log_ratios.py)

# one process a core, four at most: each holds a torch
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: quickstart test bench-gpu clean

quickstart: $(VENV)/installed
	$(BIN)/python train.py

test: $(VENV)/installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest $(PARALLEL)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) $(INTERPRETED)

# On one GPU, each part in under nine minutes: PART=tests runs what needs a GPU, PART=kernels measures
# the head beside its peers, PART=kl two heads and their KL, PART=train training steps beside TRL,
# PART=profile where a step's time goes, PART=sweep the tiles and forms that the fused kernels' table chooses from;
# they write to RESULTS. With PYTHON=... on the command line that python
# is used as it is and no environment is made.
PART ?= kernels
RESULTS ?= benchmarks/results
REAL_HEAD ?=
SHAPE ?= qwen2.5-0.5b
RANK ?=
# make hands what its command line sets on to programs, to which this one is a process among others
unexport RANK
COMPILE ?=
REFERENCE ?=
LAW ?= UF
ifeq ($(origin PYTHON),command line)
BENCH_PYTHON := PYTHONPATH=.:kernels:$(PYTHONPATH) $(PYTHON)
else
BENCH_PYTHON := $(BIN)/python
bench-gpu: $(VENV)/installed-bench
endif

# as the command line has it
bench-gpu: export PYTORCH_ALLOC_CONF ?= expandable_segments:True
bench-gpu:
ifeq ($(PART),tests)
	$(BENCH_PYTHON) -m pytest -m gpu $(PARALLEL) tests
else ifeq ($(PART),kernels)
	$(BENCH_PYTHON) benchmarks/bench_head.py --json --results $(RESULTS) \
	  --jobs forward train frozen $(if $(REAL_HEAD),--real-head $(REAL_HEAD))
else ifeq ($(PART),kl)
	$(BENCH_PYTHON) benchmarks/bench_head.py --json --results $(RESULTS) --name head_kl \
	  --jobs tdpo2 tdpo1 "tdpo2 frozen" "tdpo1 frozen" $(if $(REAL_HEAD),--real-head $(REAL_HEAD))
else ifeq ($(PART),train)
	$(BENCH_PYTHON) benchmarks/bench_train_step.py --shape $(SHAPE) --law $(LAW) --pairs 64 \
	  --micro-batches 8 --steps 8 --rounds 1 --seconds-budget 480 --json --results $(RESULTS) \
	  $(if $(RANK),--rank $(RANK)) $(if $(COMPILE),--compile $(COMPILE:1=true))
else ifeq ($(PART),profile)
	$(BENCH_PYTHON) benchmarks/profile_step.py --shape $(SHAPE) --law $(LAW) --json --results $(RESULTS) \
	  $(if $(RANK),--rank $(RANK)) $(if $(COMPILE),--compile $(COMPILE:1=true)) $(if $(REFERENCE),--reference $(REFERENCE))
else ifeq ($(PART),sweep)
	$(BENCH_PYTHON) benchmarks/sweep_tiles.py --results $(RESULTS)
else
	$(error PART must be tests, kernels, kl, train, profile or sweep, got $(PART))
endif

INSTALL = $(BIN)/python -m pip install --quiet --no-compile --editable
# on every core, where pip takes one; packages hold files for other Pythons, which do not compile
BYTECODE = @$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

# a torch at hand: its folder goes on the environment's path, so pip finds it installed
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	@$(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
	  2>/dev/null > torch.pth && mv torch.pth $(VENV)/lib/python*/site-packages/ || rm -f torch.pth

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV): a few minutes the first time, torch is large"
	$(INSTALL) .
	$(BYTECODE)
	@touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV): a few minutes the first time, torch is large"
	$(INSTALL) '.[test]'
	$(BYTECODE)
	@touch $@ $(VENV)/installed

$(VENV)/installed-bench: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV), with the peers to measure against"
	$(INSTALL) '.[test,bench]'
	$(BYTECODE)
	@touch $@ $(VENV)/installed-test $(VENV)/installed

clean:
	rm -rf $(VENV) build *.egg-info
