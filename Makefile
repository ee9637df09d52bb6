# Every target works in a fresh clone and with `make -C`: it sets up the environment first, when that is not done yet.
# `TORCH_BACKEND=cpu make setup` takes PyTorch's own CPU wheels, where their server can be reached.

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help setup preflight demo test test-slow check bench mutants truth-free screenshots ui lock clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
LOCK := requirements/lock.txt
FREE_GB := 10
PYTHON := $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$p && break; done)

help:            ## This list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(STAMP)  ## Install everything into .venv, from the lock file

demo: $(STAMP)   ## Generate small scenes, run rounds 0..2 and print the table
	@$(BIN)/conta run recipes/scenes.yaml

test: $(STAMP)   ## The default tests: CPU, offline
	@$(BIN)/python -m pytest -q

test-slow: $(STAMP)  ## The tests that take minutes
	@$(BIN)/python -m pytest -q -m slow

check: $(STAMP)  ## Lint, format, types and the layers between the rooms
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(STAMP)  ## Time the parts that cost most on this machine
	@for file in benchmarks/bench_*.py; do $(BIN)/python -m benchmarks.$$(basename $$file .py) || exit 1; done

mutants: $(STAMP)  ## Break the code in known places; the tests have to notice each one
	@$(BIN)/python tests/mutants.py

truth-free: $(STAMP)  ## Train with and without the truth masks: the digests have to be equal
	@$(BIN)/python tests/truth_free.py

screenshots: $(STAMP)  ## Take the pictures in docs/img from the real pages; needs Chromium
	@$(BIN)/python tests/screenshots.py

ui: $(STAMP)     ## Prefect's and MLflow's pages for this folder's runs
	@$(BIN)/conta ui

# The stamp is written last: an installation that was cut off is taken up again by the next `make`. Bytecode is compiled
# here, for under PYTHONDONTWRITEBYTECODE every process would compile PyTorch, Prefect and MLflow anew: six seconds each.
$(STAMP): $(LOCK) pyproject.toml
	@rm -f $@
	@$(MAKE) preflight
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'
ifdef TORCH_BACKEND
# These wheels are not the ones that the lock file names, so its versions hold here and its hashes cannot.
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --torch-backend $(TORCH_BACKEND) --no-verify-hashes \
		--constraints $(LOCK) --requirements pyproject.toml --all-extras
else
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes --requirements $(LOCK)
endif
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

preflight:
	@test -n "$(PYTHON)" || { \
		echo "conta needs Python 3.11: none of python3.11, python3, python is that version; install it and run make again"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3.11-venv)"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(os.path.join(s.get_path("include"), "Python.h")))' || { \
		echo "$(PYTHON) has no C headers, pydensecrf2 is built with them; install them (Debian, Ubuntu: apt install python3.11-dev)"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { \
		echo "no C++ compiler, pydensecrf2 is built with one; install it (Debian, Ubuntu: apt install g++; macOS: xcode-select --install)"; exit 1; }
	@df -Pk . | awk 'NR == 2 && $$4 < $(FREE_GB) * 1048576 { \
		printf "%.1f GB are free here, the installation needs $(FREE_GB); free some and run make again\n", $$4 / 1048576; exit 1 }'

lock: $(STAMP)   ## Resolve the dependencies anew
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-emit-index-url \
		--no-annotate --no-header --generate-hashes -o $(LOCK)

clean:           ## Remove the environment and all caches; runs and artifacts in .conta stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
