# Every target does its own set-up: on a fresh machine only Python >= 3.11 is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo demo-scores test test-quick bench lint clean

help:
	@echo "make demo         train a DreamBooth adapter on the embedded base and look at it (3 to 4 minutes)"
	@echo "make demo-scores  the same with and without prior preservation, scored with more images"
	@echo "make test         the whole test suite        make test-quick  its quick part"
	@echo "make bench        speed, beside bare loops    make lint        ruff and pyright"
	@echo "make setup        only the virtual environment in $(VENV)"

setup: $(STAMP)

# torch comes first and pinned, so that nothing pulls another build of it
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "loraloom needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m loraloom.examples.demo

demo-scores: $(STAMP)
	$(BIN)/python -m loraloom.examples.demo --scores

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope

test-quick: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope -m 'not slow'

bench: $(STAMP)
	$(BIN)/python -m loraloom.benchmarks.speed
	$(BIN)/python -m loraloom.benchmarks.data

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build dist *.egg-info
