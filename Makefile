# Every target sets up what it needs in .venv; a second run finds the stamp file and installs nothing.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install install-dev demo test test-all check bench conformance notebooks screenshot clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --root-user-action=ignore -c .ci/constraints.txt
PYTEST := $(BIN)/python -m pytest -q
WORKERS ?= 2

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.stamp ## .venv with the moe-lens command in it

install-dev: $(VENV)/.stamp-dev ## the same with what the tests and linters need

demo: $(VENV)/.stamp ## compare the bundled MoE with its dense twin and print what was found
	@$(BIN)/moe-lens demo

test: $(VENV)/.stamp-dev ## unit, conformance and command-line tests, without the slow ones
	@$(PYTEST) -n $(WORKERS) -m "not slow" tests

test-all: $(VENV)/.stamp-dev ## every test, the slow ones and the notebooks included
	@$(PYTEST) -n $(WORKERS) tests
	@if compgen -G "notebooks/*.ipynb" >/dev/null; then $(PYTEST) --nbmake --nbmake-timeout=600 notebooks; fi

check: $(VENV)/.stamp-dev ## lint, format and types
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/pyright --level error

bench: $(VENV)/.stamp-dev ## ratios against plain forwards and per-cell scikit-learn fits
	@$(BIN)/python tests/bench/run.py

conformance: $(VENV)/.stamp-dev ## check every model family and write the table in the README
	@$(BIN)/python -m tests.conformance.report README.md

notebooks: $(VENV)/.stamp-dev ## run every notebook from top to bottom
	@if compgen -G "notebooks/*.ipynb" >/dev/null; then $(PYTEST) --nbmake --nbmake-timeout=600 notebooks; \
	else echo "no notebooks yet"; fi

screenshot: $(VENV)/.stamp-dev ## picture of the demo's report for the README (needs chromium)
	@$(BIN)/moe-lens demo -o runs/screenshot
	@$(BIN)/moe-lens faithfulness --model bundled:tiny-moe --rankings load,gradient --modes mean_off --max-tokens 1024 \
	  -o runs/screenshot
	@$(BIN)/python -m tests.report.screenshot runs/screenshot .github/screenshot.png

clean: ## remove .venv, caches and built files (runs/ stays)
	@rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.stamp: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "moe-lens needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "building $(VENV), a few minutes the first time" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp
	@$(PIP) -e '.[train,dev]'
	@touch $@
