# `make` lists the commands. All but help, bench and clean make the virtual environment .venv first.
PYTHON ?= python3
BIN = .venv/bin
IN_PARALLEL = -n 2 --dist loadfile --no-loadscope-reorder  # tests/conftest.py has the order of the files
CACHES = .mypy_cache .pytest_cache .ruff_cache
CODE_FOLDERS = . captioning tests tests/helpers benchmarks notebooks

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint format notebook bench clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/ready  ## run the whole pipeline on drawn shapes: about 5 minutes on 2 cores
	$(BIN)/python demo.py

test: .venv/ready  ## run all tests
	$(BIN)/python -m pytest -q $(IN_PARALLEL)

test-fast: .venv/ready  ## run the tests that are not marked slow
	$(BIN)/python -m pytest -q $(IN_PARALLEL) -m "not slow"

lint: .venv/ready  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready  ## sort imports, apply ruff's safe fixes, and format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

notebook: .venv/ready  ## execute the notebook with small sizes, into runs/
	mkdir -p runs
	NOTEBOOK_SIZES=small $(BIN)/jupyter execute --timeout=600 --output=../runs/image_captioning notebooks/image_captioning.ipynb

bench:  ## print the commands of the benchmarks, which take minutes each and want a machine that does nothing else
	@echo "$(BIN)/python -m benchmarks.training     # captions per second in training"
	@echo "$(BIN)/python -m benchmarks.captioning   # captions per second; a folder against the CNN alone; inference.py as a process"
	@echo "$(BIN)/python -m benchmarks.serving      # images per second of beyond.serve, and how long a client waits"
	@echo "$(BIN)/python -m benchmarks.features     # images per second when caching features"
	@echo "$(BIN)/python -m benchmarks.memory       # start time and memory of training on all of COCO"
	@echo "$(BIN)/python -m benchmarks.gpu_plan     # kernels and waits of a step on a GPU, counted without one"
	@echo "$(BIN)/python benchmarks/gpu.py          # on a machine with a GPU: whether all works there, and how fast"

clean:  ## delete the caches of Python and of the tools; .venv, data, features and runs stay
	rm -rf $(CACHES) $(CODE_FOLDERS:%=%/__pycache__) $(CODE_FOLDERS:%=%/.ipynb_checkpoints)

.venv/ready: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 14) and "expected Python 3.11, 3.12 or 3.13 (there is no TensorFlow 2.19 to 2.21 for 3.14), found %d.%d; name another one: make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
