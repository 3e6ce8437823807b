# `make demo` and `make test` need nothing but Python 3.11 or newer: they set up .venv themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= auto

export OMP_NUM_THREADS ?= 1

.PHONY: demo test check lint types floors docs unit format chromium clean

demo: $(VENV)/.installed  ## run the main job on the embedded handwritten digits
	$(BIN)/gossamer shrink --out demo-out

test: $(VENV)/.installed-dev chromium  ## set up, then run every check
	$(MAKE) check

check: lint types floors docs unit  ## every check, in an environment that is set up

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/pyright

floors:
	$(BIN)/lint-imports

docs:
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

unit:
	$(BIN)/pytest -n $(JOBS)

format:  ## rewrite the sources as ruff likes them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the other targets made, but not the environment
	rm -rf build dist site demo-out .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "gossamer needs Python 3.11 or newer; name one: make PYTHON=python3.11 ..."; exit 1; }
	@# Debian keeps what venv needs in a package of its own.
	@if ! $(PYTHON) -c 'import ensurepip' 2>/dev/null \
	    && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv; \
	fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet -e '.[dev]'
	@touch $@ $(VENV)/.installed

chromium:  ## the browser in which reports are tested; without it those tests are skipped by name
	@if ! command -v chromium >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
	      || echo "chromium cannot be installed; the tests of reports in a browser are skipped"; \
	  else \
	    echo "there is no chromium; the tests of reports in a browser are skipped"; \
	  fi; \
	fi
