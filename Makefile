# Targets: venv (install), quickstart (train a small model), test (the quick tests), test-all (also the slow tests and the
# comparison with transformers: what has to pass before a change lands), test-exhaustive (further rows of their tables, for
# releases), parity (the comparison with transformers alone), recipes (train every family), check (lint and types),
# docs (build the documentation site), bench, real-models (fetch two pretrained models that tests read, 180 MB).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart
# further flags for `make quickstart`, such as ARGS='--config.train.steps=50'
ARGS ?=

# Worker processes of the tests: a test mostly compiles, on one thread. The tests of a file share fixtures and compiled
# programs, so one worker runs them all; files start in the order that tests/conftest.py gives them.
WORKERS ?= 2
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist=loadfile --no-loadscope-reorder

.PHONY: venv quickstart test test-all test-exhaustive parity recipes check docs bench real-models

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "llmjax needs Python 3.11 or newer: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "installing into $(VENV) (a minute or two, about 2.2 GB)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	@touch $@

# On Linux, huge pages avoid the page faults of a CPU step's temporary memory (about a fifth of its time). Other systems
# ignore the variable.
quickstart: venv
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/llmjax train --config=configs/quickstart.py --workdir=$(WORKDIR) $(ARGS)

test: venv
	$(PYTEST) -m "not slow and not exhaustive"

# PyTorch comes last: commands of an environment that has it start two seconds later.
test-all: venv
	$(PYTEST) -m "not exhaustive" --ignore=tests/parity
	$(MAKE) parity

test-exhaustive: $(VENV)/.parity
	$(PYTEST) -m exhaustive

parity: $(VENV)/.parity
	$(PYTEST) -m "not exhaustive" tests/parity

$(VENV)/.parity: $(VENV)/.installed
	@echo "installing torch and transformers; for torch's CPU build, install it first: docs/installation.md"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,parity]' -c constraints.txt
	@touch $@

recipes: venv
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python tools/recipes.py

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]' -c constraints.txt
	@touch $@

bench: venv
	$(BIN)/python tools/bench_data.py
	$(BIN)/python tools/bench_train.py

# The folder is ~/.cache/llmjax/models, or LLMJAX_MODELS.
real-models: venv
	$(BIN)/python tools/real_models.py
