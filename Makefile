# `make train` and `make test` on a fresh clone install everything into .venv first, once.
# A GPU machine gets PyPI's CUDA build of torch. On a machine without one: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow bench measure lint check format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: .venv/installed ## create .venv with everything that is tested

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: install ## train pico on easy-VQA: a few minutes on a CPU
	$(BIN)/python src/train.py

test: install ## all tests but the slow ones, in two processes
	$(BIN)/python -m pytest -n 2

test-slow: install ## the slow proofs, in two processes
	$(BIN)/python -m pytest -n 2 -m slow

bench: install .venv-trl/installed ## compare speeds with the plain Trainer and TRL
	$(BIN)/python benchmarks/bench.py

measure: install ## memory and speed of training steps, into benchmarks/measured.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/measure.py --write

.venv-trl/installed:
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install --quiet --upgrade pip
	.venv-trl/bin/pip install --quiet $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	.venv-trl/bin/pip install --quiet --constraint constraints.txt trl==1.16.0 --editable '.[hub]'
	@touch $@

lint: install ## ruff, types, and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test ## what CI runs

format: install ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches
	rm -rf .venv .venv-trl .pytest_cache .ruff_cache .mypy_cache
