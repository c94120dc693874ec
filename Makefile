# Commands: `make demo`, `make test`, `make lint`, and `make notebook`, which executes the notebook in small.
# All make the virtual environment .venv first.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test notebook lint
demo: .venv/ready
	$(BIN)/python demo.py

test: .venv/ready
	$(BIN)/python -m pytest -q tests

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy *.py

notebook: .venv/ready
	mkdir -p runs
	NOTEBOOK_SIZES=small $(BIN)/jupyter execute --timeout=600 --output=../runs/image_captioning notebooks/image_captioning.ipynb

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
