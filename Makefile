# Everything runs in .venv, which `make setup` builds from pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: setup demo test test-slow cluster-test lint format bench clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: Python 3.11 or newer is needed; set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make: Python 3.11 or newer is needed, found $$($(PYTHON) --version); set PYTHON=..." >&2; exit 1; }
	@echo "setting up .venv (about 7 GB: the ordinary torch build; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev,s3-demo]'
	@touch $@

demo: setup
	$(BIN)/kinoray demo $(if $(VIDEOS),--videos '$(VIDEOS)')

# Two processes: what uses Ray in one, all else in the other.
test: setup
	$(PYTEST) -n 2 --dist loadgroup --no-loadscope-reorder $(PYTEST_ARGS)

test-slow: setup
	$(PYTEST) -m slow --timeout 3000

# A cluster of nodes on this machine: each job loses a node in its middle, and nodes come for a job and go after it.
cluster-test: setup
	$(PYTEST) tests/test_nodes.py tests/test_autoscaling.py -m slow --timeout 3000

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv demo-out build dist .pytest_cache .mypy_cache .ruff_cache
