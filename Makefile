# Two commands on a bare machine with Python 3.10 to 3.13 and its pip and venv:
#
#     make demo    installs into .venv and runs the main job on the bundled trained model
#     make test    installs what the tests need and runs them
#
# Both install again only when pyproject.toml has changed. Another interpreter:
# make demo PYTHON=python3.12 (after `make clean`, if .venv exists already).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CREATED := $(VENV)/.created
INSTALLED_ALL := $(VENV)/.installed-all
INSTALLED_TEST := $(VENV)/.installed-test
PIP := $(BIN)/python -m pip --quiet --no-input --disable-pip-version-check

# The lowest versions that pyproject.toml allows, on the lowest Python.
OLDEST_PYTHON ?= python3.10
OLDEST := .venv-oldest
INSTALLED_OLDEST := $(OLDEST)/.installed
OLDEST_PIP := $(OLDEST)/bin/python -m pip --quiet --no-input --disable-pip-version-check

PYTEST := -m pytest --quiet --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-oldest mutations docs lint format clean
.DELETE_ON_ERROR:

demo: $(INSTALLED_ALL)
	@$(BIN)/python -m layerswap demo

test: $(INSTALLED_TEST)
	@$(BIN)/python $(PYTEST)

test-oldest: $(INSTALLED_OLDEST)
	@$(OLDEST)/bin/python $(PYTEST)

mutations: $(INSTALLED_TEST)
	@$(BIN)/python tests/mutations.py

docs: $(INSTALLED_TEST)
	@$(BIN)/python -m layerswap.rulebook >docs/rules.md.new
	@mv docs/rules.md.new docs/rules.md
	@$(BIN)/python -m layerswap.onnx_graph.known_failures >docs/targets.md.new
	@mv docs/targets.md.new docs/targets.md

lint: $(INSTALLED_TEST)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(INSTALLED_TEST)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) build dist demo-output .hypothesis
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(CREATED):
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: there is no command '$(PYTHON)'; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || { \
	  echo "make: layerswap needs Python 3.10 to 3.13, but '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(INSTALLED_ALL): pyproject.toml $(CREATED)
	@echo "Installing layerswap with TensorFlow and ONNX Runtime into $(VENV); takes minutes once"
	@$(PIP) install --editable '.[all]'
	@touch $@

$(INSTALLED_TEST): pyproject.toml $(CREATED)
	@echo "Installing layerswap and what its tests need into $(VENV); takes minutes once"
	@$(PIP) install --editable '.[test]'
	@touch $(INSTALLED_ALL) $@

$(INSTALLED_OLDEST): pyproject.toml tests/lower_bounds.py
	@$(OLDEST_PYTHON) -c '' 2>/dev/null || { \
	  echo "make: '$(OLDEST_PYTHON)' doesn't run; name another:" \
	    "make test-oldest OLDEST_PYTHON=/path/to/python3.10" >&2; exit 1; }
	@echo "Installing layerswap with its lower bounds into $(OLDEST); takes minutes once"
	@$(OLDEST_PYTHON) -m venv --clear $(OLDEST)
	@$(OLDEST_PIP) install 'tomli; python_version < "3.11"'
	@$(OLDEST)/bin/python tests/lower_bounds.py >$(OLDEST)/bounds.txt
	@$(OLDEST_PIP) install --constraint $(OLDEST)/bounds.txt --editable '.[test]'
	@touch $@
