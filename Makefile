# Every target sets up what it needs: a virtual environment in .venv with this project and its dependencies.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: pretrain test lint clean

pretrain: $(READY)  ## Train a small GPT with exact and with MuSe attention on Python's own standard library.
	$(BIN)/python examples/pretrain.py --compare

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[examples,tests]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
