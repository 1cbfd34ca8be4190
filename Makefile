# Every target installs into .venv on first use; `make help` lists them.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
INSTALLED := $(VENV)/.installed

export PATH := $(VENV)/bin:$(PATH)
# For every pip, those of isolated build environments included: a source build must not pull another torch.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install demo test test-full check format gpu

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: $(INSTALLED)  ## .venv with everything that a CPU machine can use

$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed, $(PYTHON) is $$($(PYTHON) --version); set PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --upgrade pip
	python -m pip install --quiet torch ninja setuptools wheel
	python -m pip install --quiet --editable '.[train,demo,test,dev,cluster,moshi]'
	python -m pip install --quiet --no-deps moshi
	touch $@

demo: $(INSTALLED)  ## the main job on this machine: speak, shard, train, kill, resume, export, evaluate, report
	python -m megatron_omni.demo.run

test: $(INSTALLED)  ## the test suite, with samples of the large grids
	OMP_NUM_THREADS=1 python -m pytest -m "not slow and not gpu"

test-full: $(INSTALLED)  ## the test suite with the whole grids
	OMP_NUM_THREADS=1 python -m pytest -m "not gpu"

check: $(INSTALLED)  ## format, lint, types, import floors
	ruff format --check .
	ruff check .
	mypy megatron_omni
	lint-imports

format: $(INSTALLED)  ## formats and fixes what ruff can
	ruff format .
	ruff check --fix .

gpu: $(INSTALLED)  ## GPU tests and benchmarks, on a machine with CUDA
	@python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo "make gpu needs a CUDA device and a CUDA build of torch; this machine has $$(python -c 'import torch; print("torch", torch.__version__, "with", torch.cuda.device_count(), "devices")')" >&2; exit 2; }
	python -m pytest -m gpu
	@for bench in $(wildcard tools/bench/*.py); do echo "== $$bench" && python $$bench || exit 1; done
