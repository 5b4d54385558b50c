# A fresh machine needs python3, make and the package index; every target installs what it needs.
PYTHON ?= python3
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA ?=
export MPLBACKEND ?= Agg

.PHONY: help install reproduce test test-slow lint bench clean

help:
	@echo "make reproduce   run every experiment and write results/report/index.html (DATA=file.npz for your pictures)"
	@echo "make test        the tests (test-slow: the long ones)"
	@echo "make lint        ruff and basedpyright"
	@echo "make bench       timings beside peers, to results/bench.json"
	@echo "make clean       remove results, caches and virtual environments"
	@echo "PYTHON=python3.12 chooses another interpreter; each has a virtual environment of its own"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "optjax needs Python 3.11 or newer; $(PYTHON) is older or missing: give PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP)

reproduce: $(STAMP)
	$(BIN)/optjax reproduce $(if $(DATA),--data $(DATA))

test: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

bench: $(STAMP)
	$(BIN)/python -m optjax.experiments.bench

clean:
	rm -rf .venv .venv-* results build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
