# Every target makes the environment it needs (.venv) first; `PYTHON=python3.12 make test` picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
export PYTHON VENV

BIN := $(VENV)/bin
# Two workers share the machine: one thread each is faster than two that fight.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q

.PHONY: help venv lint format test test-all sanitize demo ci clean

help:
	@echo "make demo      SmolLM2-135M with its real weights, beside eager and inductor (under 10 minutes on 2 cores)"
	@echo "make test      the quick tests (under 15 minutes on 2 cores)"
	@echo "make test-all  also the slow ones"
	@echo "make sanitize  the kernels' GPU tests under compute-sanitizer"
	@echo "make lint      ruff and mypy"
	@echo "make format    let ruff fix and format"
	@echo "make ci        what CI runs: lint and test"
	@echo "make clean     remove what the other targets made"

venv:
	@.ci/venv

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: venv
	$(PYTEST)

test-all: venv
	$(PYTEST) -m ""

sanitize: venv
	PYTHON=$(BIN)/python .ci/sanitize

demo: venv
	$(BIN)/python examples/demo.py --work $(VENV)/demo

ci:
	.ci/run

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
