# `make help` lists the targets. Everything is installed into .venv; nothing else is touched.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

PYTHON ?= python3
PYTEST_ARGS ?=
# Test processes, each of one thread: PyTorch's threads wait for each other when cores are shared.
TEST_PROCESSES ?= $(shell nproc)

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The lock is complete, so pip need not resolve; Python compiles what it imports, when it does.
# Together this halves the time of the first `make setup`.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SCHEMAS := configs/schema

# Where it is set, nothing that is compiled would be kept, and every process would compile PyTorch,
# MONAI and MLflow anew: 24 s instead of 10 s for the shortest command.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test test-all check lint bench lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Make .venv and install the locked packages and medssl into it

demo: $(INSTALLED) ## Run the whole road on real MR scans: index, pretrain, transfer, report
	@if $(BIN)/medssl datasets fetch hippocampus; then study=demo; else \
	  echo; echo "No real scans are within reach: SYNTHETIC DATA, WHICH PROVE NOTHING."; echo; \
	  $(BIN)/medssl datasets fetch phantom && study=phantom; fi && \
	$(BIN)/medssl study configs/studies/$$study.yaml

test: MARKS = not gpu and not slow
test: run-tests ## Run the tests that need no GPU, but the slow ones; PYTEST_ARGS="-k rotation" narrows

test-all: MARKS = not gpu
test-all: run-tests ## Run all tests that need no GPU

.PHONY: run-tests
run-tests: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(MARKS)" --ignore=tests/benchmarks \
	  --numprocesses=$(TEST_PROCESSES) --dist=loadfile $(PYTEST_ARGS)

check: lint test ## Run every check that a commit must pass: lint and test

lint: $(INSTALLED) ## Check format, style, types, layers, and that the config schemas are current
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy --strict medssl
	$(BIN)/lint-imports --no-logo
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(BIN)/medssl config schema --out "$$fresh" && \
	diff --recursive --brief $(SCHEMAS) "$$fresh" || { \
	  echo "$(SCHEMAS) is out of date. Run: $(BIN)/medssl config schema --out $(SCHEMAS)"; exit 1; }

bench: $(INSTALLED) ## Measure speed and memory on this machine
	$(BIN)/python -m pytest tests/benchmarks $(PYTEST_ARGS)

lock: $(INSTALLED) ## Write requirements.lock anew, keeping the pins that still fit
	$(BIN)/pip install --quiet pip-tools
	@head -n 3 requirements.lock > requirements.lock.header
	$(BIN)/pip-compile --quiet --no-header --allow-unsafe --strip-extras \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
	  --extra dev --extra onnx --extra ray --extra server --extra imagenet-lite0 \
	  --output-file requirements.lock pyproject.toml
	@sed --in-place '/^# The following packages are considered/d' requirements.lock
	@cat requirements.lock.header requirements.lock | cat --squeeze-blank > requirements.lock.new
	@mv requirements.lock.new requirements.lock && rm requirements.lock.header

clean: ## Remove .venv and caches; runs/ and data/ are kept
	rm -rf $(VENV) dist medssl.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find medssl tests workflows -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "medssl needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing the locked packages into $(VENV) (several GB the first time)"
	$(PIP_INSTALL) --no-deps --no-compile --requirement requirements.lock
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@
