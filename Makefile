# The front door. It needs python3 (3.11 or newer), pip and make; `make` lists targets.

PYTHON ?= python3
RUN := .venv/bin/python
STAMP := .venv/.installed
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) -m pytest -n 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The pins also hold for what pip draws to build the package.
export PIP_CONSTRAINT := constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo lint test test-all test-floor docs dist check check-all bench bench-train gpu conformance scale costs soak report clean

help: ## list the targets
	@echo "Usage: make TARGET [PYTHON=python3] [ARGS='options of the demo, of pytest, ...']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{ printf "  %-12s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## create .venv and install pinned dependencies (the others do so, too)
	@:

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit( \
	'sirfshampoo needs Python 3.11 or newer, this is ' + sys.version.split()[0] + \
	'. Try: make setup PYTHON=python3.11')"
	@echo "Setting up .venv ..."
	@$(PYTHON) -m venv .venv
	@$(RUN) -m pip uninstall -qq -y sirfshampoo 2>/dev/null # what this was called once
	@$(RUN) -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: setup ## train on two tasks beside AdamW and SGD (under 3 minutes)
	@$(RUN) examples/demo.py $(ARGS)

lint: setup ## check format, style and types
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

test: setup ## run the tests (5 to 7 minutes)
	@$(PYTEST) $(ARGS)

test-all: setup ## run the heavy tests, too (about 11 minutes)
	@$(PYTEST) -m '' --hypothesis-profile=heavy $(ARGS)

# Where a Python's own environment with the lowest torch promised lies.
FLOOR = .venv-floor/$(notdir $(PYTHON))
# What that torch needs otherwise, of what is pinned.
UNPINNED := torch|sympy

.venv-floor/%/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(@D) ..."
	@$(PYTHON) -m venv $(@D)
	@grep -vE '^($(UNPINNED))==' constraints.txt > $(@D)/constraints.txt
	@PIP_CONSTRAINT=$(@D)/constraints.txt $(@D)/bin/python -m pip install -qq -e '.[test]' \
	"torch==$$(sed -n 's/^dependencies = \["torch>=\(.*\)"\]/\1/p' pyproject.toml).*"
	@touch $@

test-floor: $(FLOOR)/.installed ## run the tests with the lowest torch promised (draws 3 GB; PYTHON=python3.13)
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(FLOOR)/bin/python -m pytest -n 2 \
	--ignore=tests/benchmarks $(ARGS)

docs: setup ## build the site into site/, its gallery included; a warning is an error
	@rm -rf site docs/gallery docs/_build # what is kept would keep its warnings, too
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) -m sphinx -W --keep-going -q -j auto docs site
	@echo "Open site/index.html: it needs no network."

dist: setup ## build sdist and wheel into dist/ and check them
	@rm -rf dist
	@$(RUN) -m build --no-isolation --outdir dist
	@$(RUN) -m twine check --strict dist/*

check: lint test ## lint, then test

check-all: lint docs dist test-all ## what CI runs: lint, site, distribution, then test-all

bench: setup ## time step() beside AdamW, Muon, SOAP, ... (under 10 minutes)
	@$(RUN) -m benchmarks.step $(ARGS)

bench-train: setup ## train beside AdamW, Muon, SOAP, ... (hours, goes on where it stopped; ARGS=--quick)
	@$(RUN) -m benchmarks.train $(ARGS)

gpu: ## test, time and train on a GPU, in 8 minutes, with the python at hand
	@$(PYTHON) -m benchmarks.gpu $(ARGS)

conformance: setup ## measure every line of the compatibility table
	@$(RUN) -m tests.conformance $(ARGS)

scale: setup ## count bytes, operations and traffic on many ranks (a minute)
	@$(RUN) -m benchmarks.scale $(ARGS)

soak: setup ## train for 20,000 steps with each structure (15 minutes)
	@$(RUN) -m benchmarks.soak $(ARGS)

costs: setup ## count what well-known models would cost (a minute)
	@$(RUN) -m benchmarks.costs $(ARGS)

report: setup ## rewrite all tables and pictures from committed results
	@$(RUN) -m benchmarks.report $(ARGS)

clean: ## remove environments, caches and out/
	rm -rf .venv .venv-floor .mypy_cache .pytest_cache .ruff_cache .hypothesis out build dist
	rm -rf site docs/_build docs/gallery docs/sg_execution_times.rst
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
