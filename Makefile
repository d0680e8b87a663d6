# `make demo` and `make test` need Python 3.11 to 3.13, git and make; all else goes into .venv.
#
#   make demo    install, generate with the built-in model, measure what adaptive depth gains
#   make test    install with the test tools, run the tests
#   make check   lint and test
#   make bench   measure against transformers' ways to decode (half an hour, an idle machine;
#                BENCH="--track mechanism --shape 8x128" and others: see benchmarks/README.md)
#   make fix     format and mend what ruff can
#   make support-table   write the README's table of model families anew
#   make clean   remove .venv and build leftovers

SUPPORTED := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	"$$python" -c "$(SUPPORTED)" 2>/dev/null && echo "$$python" && break; done)

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := adaptive_gen train calibrate tests benchmarks

.PHONY: demo test lint check bench fix support-table clean

demo: .venv/installed
	$(BIN)/adaptive-gen generate "Once upon a time, there was a little dog who" --max-new-tokens 120
	$(BIN)/adaptive-gen bench --rounds 1 --max-new-tokens 64

test: .venv/installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint test

bench: .venv/installed
	$(BIN)/python -m benchmarks.suite $(BENCH)

fix: .venv/installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

support-table: .venv/installed-dev
	$(BIN)/python tests/support_table.py

clean:
	rm -rf .venv build dist adaptive_gen.egg-info .pytest_cache .ruff_cache

# Installed editable: a change to the sources needs no new installation, one to these two files does.
.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv (a few minutes the first time) ..."
	$(PIP) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable ".[dev]"
	@touch $@

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 with venv found. Install one (on Debian and" \
		"Ubuntu with python3-venv), or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 2; }
