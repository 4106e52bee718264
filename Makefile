# Two commands: `make quickstart` and `make test`. Both make .venv from the pins in constraints.txt.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done || true)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# Byte code by all cores; pip makes it by one. What a package holds that is no Python, such as a template, is left out.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

.PHONY: quickstart test test-slow lint site clean

quickstart: $(VENV)/.installed
	$(BIN)/diptych quickstart

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m 'not gpu and not slow'

# What starts browsers, several training processes, notebooks or long runs; CI runs it after `make test`.
test-slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m 'slow and not gpu'

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

site: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# torch comes first, alone and pinned: its CPU build is then what the other packages find.
$(VENV)/.torch: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Diptych needs Python 3.11 or later and found none; give one: make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch
	$(PIP) -c constraints.txt -e '.[eval]'
	$(COMPILE)
	touch $@

# Holds what the other one does, too.
$(VENV)/.installed-dev: $(VENV)/.torch
	$(PIP) -c constraints.txt -e '.[dev]'
	$(COMPILE)
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
