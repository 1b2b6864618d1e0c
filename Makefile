# Everything runs in .venv, which the first target that needs it makes. Nothing but pip uses the network.

PYTHON ?= $(shell for p in python3.11 python3; do $$p -c "" 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Two test processes where there are two cores; a file stays in one process, so that its models load once.
WORKERS := $(shell test "$$(getconf _NPROCESSORS_ONLN)" -ge 2 && echo "-n 2 --dist loadfile")

.DEFAULT_GOAL := help
.PHONY: help install dev demo test table bench pages lint format clean

help:  ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

install: .venv/.installed  ## make .venv and install the project with the tested versions

dev: .venv/.installed-dev  ## install, and the linter, the type checker and the builder

demo: .venv/.installed  ## train on a task that shows what a rule does
	$(BIN)/priority demo

test: .venv/.installed  ## the test suite, without what is marked slow or gpu
	$(BIN)/python -m pytest -q $(WORKERS)

table: .venv/.installed  ## all rules: regime, plan, test, training run
	$(BIN)/python -m tests.rules.table $(WORKERS)

bench: .venv/.installed  ## what the fused loss costs, as a table; LONG=1 adds large shapes and the other benchmarks
	$(BIN)/python -m tests.benchmarks.fused $(if $(LONG),--long)
	$(if $(LONG),$(BIN)/python -m pytest -q -s -m "not gpu" tests/benchmarks)

pages: .venv/.installed  ## write the generated tables of README.md, grammar/ and rules/
	$(BIN)/python -m priority_dsl.pages --write

lint: .venv/.installed-dev  ## ruff and pyright, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/.installed-dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove build outputs and caches; the next target installs again
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache .venv/.installed .venv/.installed-dev
	find priority_dsl trainer tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, from the same constraints, so that pip takes the build that the machine offers
# (a CPU wheel found locally, or the CUDA build) before anything else asks for torch.
.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c "" 2>/dev/null || { \
	  echo "cannot run '$(PYTHON)' as Python: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "priority_dsl needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1):" \
	    "make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) -e ".[test,figures]"
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(INSTALL) -e ".[test,figures,dev]"
	@touch $@
