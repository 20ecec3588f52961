# Each target is one line around `dualvla` or a standard tool. PYTHON=python3.12 make install picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart lint test test-slow soak bench

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## .venv with everything, and a Vulkan driver where none renders and you may install it

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[all,dev]"
	-$(BIN)/dualvla doctor --install-driver
	@touch $@

quickstart: install ## the whole of DualVLA at its smallest real size: about 16 minutes on 2 cores, no GPU
	$(BIN)/dualvla run --recipe tiny --out runs/tiny

lint: install ## style, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint ## lint, then the tests that take seconds
	$(BIN)/pytest -m "not slow" --durations=15

test-slow: install ## faults, parity, whole suites
	$(BIN)/pytest -m "slow and not soak" --durations=15

soak: install ## ten minutes of robots at one endpoint, then slow tests and faults of a cluster, ten random seeds each
	$(BIN)/python benchmarks/soak.py --out benchmarks/results/soak.json
	$(BIN)/pytest -m slow --fault-seeds 10

# They take long, or an environment with the original's simulator.
BY_HAND = $(addprefix benchmarks/,soak.py simpler_spread.py simpler_original.py)

bench: install ## every benchmark that needs no more than this machine, one after the other
	@for benchmark in $(filter-out $(BY_HAND),$(wildcard benchmarks/*.py)); do echo "== $$benchmark"; $(BIN)/python $$benchmark || exit 1; done
