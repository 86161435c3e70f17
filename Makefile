# Few verbs: venv (install), quickstart (the whole job), test, parity (beside transformers), recipes (every family), check
# (style and types), bench.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart
# further flags for `make quickstart`, such as ARGS='--config.train.steps=50'
ARGS ?=

.PHONY: venv quickstart test parity recipes check bench

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "llmjax needs Python 3.11 or newer: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "installing into $(VENV) (a minute or two, about 1 GB)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	@touch $@

# On Linux, huge pages spare a CPU step the page faults of its temporary memory (about a fifth of its time); elsewhere
# the variable means nothing.
quickstart: venv
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/llmjax train --config=configs/quickstart.py --workdir=$(WORKDIR) $(ARGS)

test: venv
	$(BIN)/pytest

parity: $(VENV)/.parity
	$(BIN)/pytest tests/parity

$(VENV)/.parity: $(VENV)/.installed
	@echo "installing torch and transformers; for torch's CPU build, install it first as README.md says"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,parity]' -c constraints.txt
	@touch $@

recipes: venv
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python tools/recipes.py

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: venv
	$(BIN)/python tools/bench_data.py
	$(BIN)/python tools/bench_train.py
