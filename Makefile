# Needs Python >= 3.11 with venv, g++ and make; nvcc is optional. `make` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(wildcard csrc/*.cpp $(foreach d,csrc/*/ csrc/*/*/,$(addprefix $(d),*.cpp *.h *.cu *.cuh))) parnet_kernels/schemas.inc
CXX_SOURCES = $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.hpp' 'tests/*.h' 'tests/*.cu' 'examples/*.cpp')

# Files of tests side by side. A thread watches the clock, so that a test that hangs in native code ends too.
PYTEST := -m pytest -n logical --maxprocesses 4 --dist loadfile --timeout-method thread

.PHONY: help setup build demo test test-all test-oldest test-integrations dist gpu-check bench asan lint format docs clean

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 28
	@echo 'Minutes: two cores, the first time. PYTEST_ARGS and BENCH_ARGS are passed on.'

setup: .venv/tools build/ready ## make .venv with all tools, build both libraries (4 minutes)

# torch first: the native code is compiled with its headers. Never through pip, which would hide what takes the time.
.venv/torch: pyproject.toml
	$(PYTHON) -m venv .venv
	@echo 'installing torch into .venv'
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0 numpy 'setuptools>=77' wheel ninja
	@touch $@

.venv/ready: .venv/torch | build/cpu
	@echo 'installing the package and what the demo needs into .venv'
	PARNET_CUDA=0 $(BIN)/python -m pip install -qq --no-build-isolation --editable '.[demo]'
	@touch $@

.venv/tools: .venv/ready
	@echo 'installing what tests, linters and documentation need into .venv'
	PARNET_CUDA=0 $(BIN)/python -m pip install -qq --no-build-isolation --editable '.[dev]'
	@touch $@

build: build/ready ## compile what has changed in csrc

build/cpu: $(filter-out csrc/cuda/%,$(NATIVE)) setup.py | .venv/torch
	@echo 'compiling the CPU kernels for every instruction set (about a minute on two cores)'
	PARNET_CUDA=0 $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

build/ready: build/cpu $(NATIVE)
	@echo 'compiling the CUDA kernels, where nvcc is (about a minute on two cores)'
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: .venv/ready ## train on handwritten digits, deploy, compare, time; writes out/demo (4 minutes; later 2)
	$(BIN)/parnet demo

test: setup ## the test suite (20 minutes)
	$(BIN)/python $(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-all: setup ## the test suite with the long sweeps
	$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

# The wheel that the pinned torch built, beside the oldest. NumPy: Triton 3.6's interpreter fails with a newer one.
test-oldest: setup ## the test suite beside torch 2.11 and Triton 3.6 (takes what `make test` takes)
	rm -rf build/wheel
	$(BIN)/python setup.py --quiet bdist_wheel --dist-dir build/wheel
	test -d .venv-oldest || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet torch==2.11.0 triton==3.6.0 'numpy<2.4' 'setuptools>=77,<82' \
		"$$(echo build/wheel/*.whl)[test]"
	.venv-oldest/bin/python -m pip install --quiet --force-reinstall --no-deps build/wheel/*.whl
	.venv-oldest/bin/python $(PYTEST) -m 'not slow' $(PYTEST_ARGS)

# The newest torch that torchvision, and so timm, supports. From tests/, so that the wheel is tested, not the checkout.
test-integrations: setup ## the wheel beside timm, ONNX engines, Ray and the newest torch of torchvision (15 minutes, 6 GB)
	rm -rf build/wheel
	$(BIN)/python setup.py --quiet bdist_wheel --dist-dir build/wheel
	test -d .venv-integrations || $(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1 onnxruntime openvino \
		"$$(echo build/wheel/*.whl)[test,onnx,timm,hub,ray]"
	.venv-integrations/bin/python -m pip install --quiet --force-reinstall --no-deps build/wheel/*.whl
	cd tests && ../.venv-integrations/bin/python -P $(PYTEST) -m 'not slow' integrations test_pretrained.py test_ops.py \
		test_export_package.py test_train.py test_docs.py $(PYTEST_ARGS)
	cd tests && ../.venv-integrations/bin/python -P -m pytest -m slow integrations/test_ray.py $(PYTEST_ARGS)

dist: setup ## the packages in dist, each tried in an environment of its own (15 minutes with nvcc; DIST_ARGS=--quick: 4)
	$(BIN)/python -m pip install -qq --no-build-isolation --editable '.[dist]'
	$(BIN)/python tests/packages.py $(DIST_ARGS)

# With the running Python and its torch, not with .venv.
gpu-check: ## on a machine with a GPU: build, test, time and profile there (9 minutes; GPU_CHECK_ARGS=--rehearse needs none)
	$(PYTHON) -m bench.gpu_check $(GPU_CHECK_ARGS)

bench: setup .venv/peers ## speed against other engines; writes out/bench (BENCH_ARGS=--quick: a minute)
	$(BIN)/python -m bench cpu $(BENCH_ARGS)

.venv/peers: pyproject.toml | .venv/tools ## the engines that the benchmark compares with; it reports those it does not get
	-$(BIN)/python -m pip install -qq --no-build-isolation --editable '.[peers]'
	@touch $@

asan: setup ## the CPU kernels under the address, undefined-behaviour and thread sanitizers (about a minute)
	tests/asan/run.sh

lint: .venv/tools ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: .venv/tools ## apply ruff and clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# Not --quiet: that hides warnings from --strict.
docs: .venv/tools ## the documentation as a site in out/site; warnings and broken links are errors (seconds)
	$(BIN)/python docs/figures.py
	$(BIN)/mkdocs build --strict

clean: ## remove what was built, and .venv
	rm -rf .venv .venv-oldest .venv-integrations build dist out parnet_kernels/*.so *.egg-info
