# Two commands: `make demo` and `make test`. Both make the virtual environment .venv first.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test
demo: .venv/ready
	$(BIN)/python demo.py

test: .venv/ready
	$(BIN)/python -m pytest -q tests

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
