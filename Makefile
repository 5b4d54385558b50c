# A fresh machine needs python3, make and the package index; every target installs what it needs.
ifdef PYTHON
VENV := .venv-$(notdir $(PYTHON))
else
VENV := .venv
# The newest tested one that runs (a pyenv shim may not) and can make a virtual environment.
PYTHON := $(shell for p in python3.13 python3.12 python3.11; do $$p -c 'import venv, ensurepip' 2>/dev/null && exec echo $$p; done; echo python3)
endif
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(notdir $(PYTHON))
DEV := $(STAMP)-dev
VERSION = -c 'import sys; print(sys.version_info[:2])'
CUDA = $(shell nvidia-smi 2>/dev/null | grep -q 'CUDA Version: 1[3-9]' && echo 13 || echo 12)
# Python compiles what is imported, when it is; compiling all that is installed takes half a minute.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
DATA ?=
PALETTE ?=
FULL ?=
export MPLBACKEND ?= Agg

.PHONY: help install reproduce test test-slow lint bench bench-accelerator measurements clean

help:
	@echo "make reproduce   run every experiment and write results/report/index.html, in 6 to 8 minutes;"
	@echo "                 FULL=1 at the larger sizes; DATA=file.npz PALETTE=file.npy on your pictures, in your colours"
	@echo "make test        the tests (test-slow: the long ones)"
	@echo "make lint        ruff and basedpyright"
	@echo "make bench       timings beside peers, to results/bench.json"
	@echo "make bench-accelerator   whole trainings on a GPU, 8 minutes, to results/bench-accelerator.json"
	@echo "make measurements   MEASUREMENTS.md, and with your own timings results/measurements.md"
	@echo "make clean       remove results, caches and virtual environments"
	@echo "PYTHON=python3.12 chooses another interpreter than $(PYTHON), with a virtual environment of its own"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "optjax needs Python 3.11 or newer; $(PYTHON) is older or missing: give PYTHON=python3.12"; exit 2; }
	@test "$$($(BIN)/python $(VERSION) 2>&1)" = "$$($(PYTHON) $(VERSION))" || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) -e .
	@touch $@

$(DEV): $(STAMP)
	$(PIP) -e '.[dev]'
	@touch $@

install: $(DEV)

reproduce: $(STAMP)
	$(BIN)/optjax reproduce $(if $(DATA),--data $(DATA)) $(if $(PALETTE),--palette $(PALETTE)) $(if $(FULL),--full)

test: $(DEV)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

test-slow: $(DEV)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile -m slow

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

bench: $(STAMP)
	$(BIN)/python -m optjax.experiments.bench

bench-accelerator: $(STAMP)
	@if nvidia-smi >/dev/null 2>&1; then $(PIP) 'jax[cuda$(CUDA)]'; \
	else echo "no NVIDIA GPU: for another device install jax's build for it into $(VENV) first"; fi
	$(BIN)/python -m optjax.experiments.bench.accelerator

measurements: $(STAMP)
	$(BIN)/python -m optjax.experiments.bench.measurements

clean:
	rm -rf .venv .venv-* results build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
