# `make` lists the commands. All but help, bench, lock and clean create the virtual environment .venv first.
PYTHON ?= python3
BIN = .venv/bin
IN_PARALLEL = -n 2 --dist loadfile --no-loadscope-reorder  # tests/conftest.py has the order of the files
CACHES = .mypy_cache .pytest_cache .ruff_cache

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint format notebook bench lock clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/ready  ## run the whole pipeline on drawn shapes; takes 6 to 12 minutes on 2 cores
	$(BIN)/python demo.py

test: .venv/ready  ## run all tests
	$(BIN)/python -m pytest -q $(IN_PARALLEL)

test-fast: .venv/ready  ## run the tests that are not marked slow
	$(BIN)/python -m pytest -q $(IN_PARALLEL) -m "not slow"

lint: .venv/ready  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready  ## sort imports, apply ruff's safe fixes, and format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

notebook: .venv/ready  ## execute the notebook with a small dataset; writes runs/image_captioning.ipynb
	mkdir -p runs
	NOTEBOOK_SIZES=small $(BIN)/jupyter execute --timeout=600 --output=../runs/image_captioning notebooks/image_captioning.ipynb

bench:  ## print the benchmark commands (each takes minutes and needs an otherwise idle machine)
	@echo "$(BIN)/python -m benchmarks.training     # captions per second in training"
	@echo "$(BIN)/python -m benchmarks.captioning   # captions per second; a folder against the CNN alone; inference.py as a process"
	@echo "$(BIN)/python -m benchmarks.serving      # images per second of beyond.serve, and how long a client waits"
	@echo "$(BIN)/python -m benchmarks.features     # images per second when caching features"
	@echo "$(BIN)/python -m benchmarks.memory       # start time and memory of training on all of COCO"
	@echo "$(BIN)/python -m benchmarks.consensus    # what --choose consensus takes with all of COCO"
	@echo "$(BIN)/python -m benchmarks.gpu          # on a machine with a GPU: whether all works there, and how fast"

lock:  ## resolve requirements.lock again, for CI; needs uv (`pip install uv`)
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate --no-header \
		--output-file requirements.lock requirements-dev.txt

clean:  ## delete caches of Python and the tools; keeps .venv, data, features and runs
	rm -rf $(CACHES)
	find . '(' -path ./.venv -o -path ./data -o -path ./features -o -path ./runs ')' -prune \
		-o -type d '(' -name __pycache__ -o -name .ipynb_checkpoints ')' -prune -exec rm -rf {} +

.venv/ready: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 14) and "expected Python 3.11, 3.12 or 3.13 (TensorFlow 2.19 to 2.21 does not support 3.14), found %d.%d; choose another: make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
