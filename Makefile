# make demo   an answer about a picture in the terminal, then the same model as a chat in the browser
# make test   the test suite
# The others are for people who change the code. `make PYTHON=python3.12 VENV=.venv312 test` chooses another Python.

# The first of these that is a Python with pins in requirements/.
PYTHON ?= $(shell for python in python3.11 python3.12 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1 \
	&& { echo $$python; break; }; done)
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --no-input
VERSION = $$($(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')

PICTURE := qwenvl_jax/assets/pictures/word.png
QUESTION := Where is the yellow cross?

# Two processes, each with whole files.
PYTEST := -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
JAX_TESTS := tests/nn tests/models tests/test_platforms.py tests/test_sharding.py tests/inference/test_engine.py \
	tests/checkpoints/test_orbax.py $(addprefix tests/training/test_, checkpoints.py optimizer.py step.py)
# Looked for when they are needed: to collect the others, too, takes half a minute.
LONG_TESTS = $(shell grep -rl --include='test_*.py' 'mark\.long' tests)

.PHONY: demo test test-jax test-long test-browser screenshots parity lint types format env lock dist clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.stamp
	@echo
	$(RUN) demo.py --image $(PICTURE) --ask "$(QUESTION)"
	@echo
	$(RUN) demo.py

test: $(VENV)/.stamp
	$(RUN) $(PYTEST) -m "not long and not browser"

# What another JAX could break: `.ci/run` has these on Python 3.12, whose JAX is newer, and the whole suite on 3.11.
test-jax: $(VENV)/.stamp
	$(RUN) $(PYTEST) -m "not long and not browser" $(JAX_TESTS)

# What takes long: several processes, several stages, every dataset end to end. No part of `make test`.
test-long: $(VENV)/.stamp
	$(RUN) $(PYTEST) -m "long and not browser" $(LONG_TESTS)

# The chat page in a real browser. Playwright drives the system's Chromium and downloads none.
test-browser: $(VENV)/.stamp
	@command -v chromium >/dev/null || { echo "make: no chromium found; install it: apt-get install chromium"; exit 1; }
	$(RUN) -m pytest -m browser tests/browser

# The pictures of the chat page in README.md and docs/, taken anew.
screenshots: $(VENV)/.stamp
	$(RUN) docs/screenshots.py

# Against transformers on torch, which have an environment of their own.
parity: $(VENV)-parity/.stamp
	$(VENV)-parity/bin/python $(PYTEST) tests/parity

lint: $(VENV)/.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.stamp
	$(RUN) -m mypy

format: $(VENV)/.stamp
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .

env: $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml requirements/py311.txt requirements/py312.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV), once (a few minutes)."
	@$(PIP) install --quiet -r requirements/py$(VERSION).txt
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)-parity/.stamp: $(VENV)/.stamp requirements/parity.txt
	$(PYTHON) -m venv $(VENV)-parity
	@echo "Installing the pinned packages and torch into $(VENV)-parity, once (a few minutes)."
	@$(VENV)-parity/bin/python -m pip install --quiet -r requirements/py$(VERSION).txt -r requirements/parity.txt
	@$(VENV)-parity/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# Writes the newest versions that fit pyproject.toml and each other into requirements/.
lock:
	rm -rf .cache/lock && $(PYTHON) -m venv .cache/lock
	.cache/lock/bin/python -m pip install --quiet ".[data,demo,dev,eval]"
	{ echo "# Everything that \`make\` installs on Python $(VERSION), pinned. Made by \`make lock PYTHON=...\`."; \
	  .cache/lock/bin/python -m pip freeze --exclude qwenvl-jax; } > requirements/py$(VERSION).txt

dist: $(VENV)/.stamp
	$(RUN) -m build --no-isolation

clean:
	rm -rf build dist .cache .mypy_cache .pytest_cache .ruff_cache
