# Needs Python >= 3.11 with venv, g++ and make; nvcc is optional. `make` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(wildcard csrc/*.cpp $(foreach d,csrc/*/ csrc/*/*/,$(addprefix $(d),*.cpp *.h *.cu *.cuh))) parnet_kernels/schemas.inc
CXX_SOURCES = $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.hpp' 'tests/*.h' 'tests/*.cu')

.PHONY: help setup build demo test test-all bench asan lint format docs clean

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: .venv/ready build ## make .venv and install everything into it

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0 'setuptools>=77' wheel ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@ build/ready

build: .venv/ready build/ready ## compile what has changed in csrc

build/ready: $(NATIVE) setup.py
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: setup ## train on handwritten digits, deploy, compare, time; writes out/demo
	$(BIN)/parnet demo

test: setup ## the test suite (about 10 minutes on two cores)
	$(BIN)/python -m pytest -m 'not slow' $(PYTEST_ARGS)

test-all: setup ## the test suite with the long sweeps
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: setup .venv/peers ## speed against other engines; writes out/bench (BENCH_ARGS=--quick: a minute)
	$(BIN)/python -m bench $(BENCH_ARGS)

.venv/peers: pyproject.toml | .venv/ready ## the engines that the benchmark compares with; it reports those it does not get
	-$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[peers]'
	@touch $@

asan: setup ## the CPU kernels under the address, undefined-behaviour and thread sanitizers (about a minute)
	tests/asan/run.sh

lint: .venv/ready ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: .venv/ready ## apply ruff and clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# Not --quiet: that hides warnings from --strict.
docs: .venv/ready ## the documentation as a site in out/site; warnings and broken links are errors (seconds)
	$(BIN)/python docs/figures.py
	$(BIN)/mkdocs build --strict

clean: ## remove what was built, and .venv
	rm -rf .venv build out parnet_kernels/*.so *.egg-info
