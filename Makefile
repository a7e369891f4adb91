# Two commands matter: `make reproduce` and `make test`. Both need Python 3.10+, make and PyPI, and nothing else.
PYTHON ?= python3

VENV   := .venv
BIN    := $(VENV)/bin
INTERP := $(BIN)/interp
# A stamp is newer than what the installation depends on, so that a second run installs nothing.
USE    := $(VENV)/.installed-notebooks
DEV    := $(VENV)/.installed-test

.DEFAULT_GOAL := help
# One step after the other, also under `make -j`: the steps of `test` are in order of what they cost.
.NOTPARALLEL:
.PHONY: help reproduce test lint types unit fast notebooks readme clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

reproduce: $(USE) ## Run every notebook on the default model and write results/index.html
	@$(INTERP) models fetch smollm2-135m
	@$(INTERP) reproduce all --out results

test: lint types unit fast ## Lint, type check, run the tests and doctests, run each notebook in fast mode

lint: $(DEV) ## Ruff: style, imports, docstrings, formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(DEV) ## Mypy over interp/
	@$(BIN)/mypy

unit: $(DEV) ## Tests and doctests, with run-time shape checks on
	@$(INTERP) models fetch smollm2-135m
	@$(INTERP) models fetch minilm-l6
	@# One thread: on tiny models, threads that wait for each other cost more than they give, much more on a busy machine.
	@OMP_NUM_THREADS=1 $(BIN)/pytest

fast: $(DEV) ## Each notebook in fast mode, into build/fast
	@$(INTERP) models fetch smollm2-135m
	@$(INTERP) reproduce all --fast --out build/fast

notebooks: $(DEV) ## Execute the notebooks on the default model and store their outputs in notebooks/
	@$(INTERP) models fetch smollm2-135m
	@$(INTERP) reproduce all --store

readme: $(DEV) ## Rewrite the README's table of methods from the registry
	@$(BIN)/python -m interp.report.readme

clean: ## Remove results, build files and the virtual environment
	rm -rf results build dist $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "interp needs Python 3.10 or newer, and '$(PYTHON)' is not one. Name another: make PYTHON=/path/to/python3.12 ..."; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed: install its venv module (on Debian and Ubuntu the package python3-venv)."; \
	  exit 1; }

# $(call install,extras): the tested versions, quietly; pip says what went wrong when something does.
install = echo "Installing interp[$(1)] into $(VENV), once; this takes minutes and a few gigabytes of disk ..." && \
	$(BIN)/pip install -qq --disable-pip-version-check --constraint constraints.txt --editable ".[$(1)]"

$(USE): pyproject.toml constraints.txt | $(BIN)/pip
	@$(call install,notebooks)
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/pip
	@$(call install,notebooks$(comma)test)
	@touch $(USE) $@

comma := ,
