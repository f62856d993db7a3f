# Two commands do everything on a fresh machine, install included: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest

.PHONY: quickstart test test-oldest test-gguf check install clean

quickstart: $(VENV)/installed
	@$(BIN)/exactune quickstart $(ARGS)

# Those that take minutes are left to CI (and to ARGS="-m 'not gpu'").
test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS)

# The same tests on the oldest versions that are supported (scripts/oldest.txt), in an environment of their own.
test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest -n auto --maxprocesses 8 $(ARGS)

# GGUF files are judged by llama.cpp, which is compiled on the first install: some minutes, and a C++ compiler.
test-gguf: $(VENV)/installed-gguf
	$(BIN)/python -m pytest -n auto --maxprocesses 8 -m 'not gpu' tests/export tests/evaluate $(ARGS)

check: $(VENV)/installed-check
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

install: $(VENV)/installed

install-gguf: $(VENV)/installed-gguf

# Each stamp is redone when pyproject.toml changes.
$(VENV)/installed: pyproject.toml scripts/install.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/install.sh && touch $@

$(VENV)/installed-test: $(VENV)/installed
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/install.sh test && touch $@

$(VENV)/installed-gguf: $(VENV)/installed-test
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/install.sh test,gguf && touch $@

$(VENV)/installed-check: $(VENV)/installed-test
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/install.sh test,check && touch $@

$(OLDEST)/installed: pyproject.toml scripts/install.sh scripts/oldest.txt
	@PYTHON="$(PYTHON)" VENV="$(OLDEST)" PIP_CONSTRAINT=scripts/oldest.txt sh scripts/install.sh test && touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist .pytest_cache .mypy_cache .ruff_cache
