# Every target sets up what it needs: on a fresh machine `make demo` or `make test` is the first command.

PYTHON ?= python3
VENV ?= .venv
# One more than there are cores: many tests wait for processes that they start.
JOBS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --benchmark-disable
BASE := $(VENV)/.base-installed
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed
FAST := $(VENV)-compiled
FAST_PIP := $(FAST)/bin/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo serve test coverage check format golden compiled bench clean

help: ## Show this help
	@printf 'gLLM: make TARGET\n\n'
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nPYTHON=%s (3.11 or newer) makes the environment %s; JOBS=%s test processes.\n' '$(PYTHON)' '$(VENV)' '$(JOBS)'

setup: $(DEV) ## Create the environment with everything that tests and checks need
	@echo "ready: $(BIN)/python"

demo: $(BASE) ## Replay a sample trace on four simulated H200s under token throttling
	$(BIN)/python -m gllm.sim replay chat --rate-scale 10 --model qwen3-32b --gpu h200 --pp 4 --policy throttle \
		--slo-ttft 1 --slo-tpot 0.05 --out out/demo
	@echo "open out/demo/report.html in a browser; it needs no network"

serve: $(RUNTIME) ## Serve the small model that comes with gLLM to OpenAI clients (ARGS="MODEL --tp 2" for another)
	$(BIN)/python -m gllm.runtime serve $(ARGS)

test: coverage ## Run all tests; core and policy must be covered branch by branch
	$(PYTEST)

coverage: $(DEV)
	$(PYTEST) tests/core tests/policy --cov=gllm.core --cov=gllm.policy --cov-branch --cov-fail-under=100

check: $(DEV) ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV) ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(DEV) ## Write the golden decision logs anew (CONTRIBUTING.md says when that is right)
	$(BIN)/python tests/sim/test_golden.py

compiled: $(DEV) ## Build the package with its hot modules compiled, in an environment of its own
	@test -d $(FAST) || $(PYTHON) -m venv $(FAST)
	@$(FAST_PIP) 'setuptools>=77' wheel mypy pytest . -c constraints.txt
	@GLLM_COMPILE=1 $(FAST_PIP) --no-build-isolation --no-deps --force-reinstall .
	@rm -rf build
	$(FAST)/bin/pytest tests/sim/test_golden.py
	@echo "ready: $(FAST)/bin/gllm"

bench: compiled ## Measure the simulator, plain and compiled; results go to benchmarks/results
	$(BIN)/python -m pytest benchmarks
	$(BIN)/python benchmarks/sim_speed.py
	$(FAST)/bin/python benchmarks/sim_speed.py
	$(BIN)/python benchmarks/throttling.py
	$(BIN)/python benchmarks/vidur.py

clean: ## Remove outputs and caches; the environment stays
	rm -rf out build dist *.egg-info .coverage .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find gllm kernels traces tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEV): $(RUNTIME) pyproject.toml constraints.txt
	@echo "installing the development tools"
	@$(PIP) install --quiet -e '.[dev]' -c constraints.txt
	@touch $@

$(RUNTIME): $(BASE) pyproject.toml constraints.txt
	@echo "installing the runtime (torch is large)"
	@$(PIP) install --quiet -e '.[runtime]' -c constraints.txt
	@touch $@

$(BASE): $(BIN)/python pyproject.toml constraints.txt
	@echo "installing gLLM"
	@$(PIP) install --quiet -e . -c constraints.txt
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "$(PYTHON) was not found; install Python 3.11 or newer, or name it: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gLLM needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
