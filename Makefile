# make quickstart   a finished R1-Zero run on this machine, from nothing
# make test         lint, types, tests, from nothing
# Everything is installed into .venv; nothing outside this folder is touched.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
MEGATRON ?= 0.19
MEGATRON_TESTS ?= $(addprefix tests/,compat model optim checkpoint convert plan train distributed end_to_end)

# Without bytecode caches every process would compile torch and vLLM again: 15 s each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install quickstart check format test test-megatron lock clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

install: $(INSTALLED)  ## .venv with everything that a run needs, as pinned in requirements/cpu.lock

quickstart: $(INSTALLED)  ## base model, R1-Zero, held-out evaluation, report.html in runs/quickstart
	$(BIN)/python tools/quickstart.py

check: $(INSTALLED_DEV)  ## format, lint, types, layers and budgets
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(INSTALLED_DEV)  ## rewrite the sources in the project's format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

test: check $(VENV)/lm_eval  ## check, then all tests
	$(BIN)/python -m pytest -q

test-megatron: $(VENV)/megatron_$(MEGATRON)  ## what touches megatron-core, on the newest one (requirements/megatron_*.lock)
	PYTHONPATH=$(CURDIR)/$< $(BIN)/python -m pytest -q $(MEGATRON_TESTS)

lock: $(INSTALLED)  ## resolve requirements/*.lock anew from setup.py
	requirements/lock.sh $(VENV)

clean:  ## remove .venv, runs and caches
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say which: make PYTHON=/path/to/python3.11")'
	"$(PYTHON)" -m venv $(VENV)

# The import at the end proves the install and compiles what the runs will load.
$(INSTALLED): requirements/cpu.lock requirements/install.sh requirements/bubblewrap.sh setup.py | $(BIN)/python
	@export TORCH_INDEX='$(TORCH_INDEX)'; echo 'installing into $(VENV), about a minute' && SECONDS=0 \
	    && requirements/install.sh $(VENV) requirements/cpu.lock \
	    && $(BIN)/python -m pip install --quiet --no-deps --no-index --no-build-isolation --editable . \
    && requirements/bubblewrap.sh $(VENV) \
	    && { $(BIN)/python -c 'import megatron.core, vllm.entrypoints.openai.api_server' 2>$(VENV)/import.log \
	        || { cat $(VENV)/import.log; exit 1; }; } \
	    && echo $$SECONDS >$(VENV)/install_seconds && touch $@ && echo "installed in $$SECONDS s"

$(INSTALLED_DEV): requirements/dev.lock requirements/modelopt.lock requirements/chromium.sh requirements/slurm.sh $(INSTALLED)
	requirements/install.sh $(VENV) requirements/dev.lock requirements/modelopt.lock
	requirements/chromium.sh
	requirements/slurm.sh
	touch $@

# Folders of their own, which only some tests look into: another megatron-core; the harness of `lm-eval`, which brings
# scikit-learn, and where that is there transformers loads it in every process: 2 s each.
$(VENV)/lm_eval: requirements/lm_eval.lock requirements/install.sh $(INSTALLED_DEV)
	rm -rf $@ $@.partial
	TARGET=$@.partial requirements/install.sh $(VENV) $<
	mv $@.partial $@ && touch $@

$(VENV)/megatron_%: requirements/megatron_%.lock $(INSTALLED_DEV)
	rm -rf $@ $@.partial
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python --target $@.partial --requirement $<
	mv $@.partial $@ && touch $@
