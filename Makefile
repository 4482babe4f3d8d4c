# setup: .venv with everything for CPU    demo: the whole method on this machine, into runs/demo/
# test: the fast tests    test-all: then browser, demo, slurm, aot    lint: style, types, shell scripts
#
# TORCH_INDEX_URL may name another package index for torch, for example
#   make setup TORCH_INDEX_URL=INDEX_WITH_CPU_BUILDS

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_INDEX_URL ?=
PYTEST_ARGS ?=
# Test processes; each file of tests stays in one of them.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint clean

help:
	@sed -n '1,2s/^# //p' Makefile

setup: $(VENV)/.installed

# torch first and alone, so that only torch comes from the other index.
$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt \
		$(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,demo,fast,kernels]'
	touch $@

demo: setup
	$(BIN)/python -m launch.cli demo

test: setup
	$(PYTEST) -m "not slurm and not browser and not demo and not aot and not gpu and not slow" $(PYTEST_ARGS)

test-all: test
	$(PYTEST) -m "(slurm or browser or demo or aot) and not gpu and not slow" $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	shellcheck -x .ci/run slurm/*.sh

clean:
	rm -rf build dist ./*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
