# make demo   the product on a small model, no network     make test   everything CI checks by default
# make docs   the documentation as pages in site/
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-slow docs lint format clean

demo: $(INSTALLED)
	$(BIN)/afpq demo --report demo-report

# Two processes of one thread: a file's tests share models, so a file stays in one of them.
test: export OMP_NUM_THREADS ?= 1
test: lint
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: export OMP_NUM_THREADS ?= 1
test-slow: $(VENV)/.installed-eval
	$(BIN)/pytest -m slow -n 2 --dist loadfile
	$(BIN)/pytest tests/evaluation/test_benchmarks.py

# Into site/; a warning is an error, and so is a page that would fetch something from another server (docs/hooks.py).
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.installed-docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

# The evaluation harness, 630 MB with all it needs, and the fuzzer: only here.
$(VENV)/.installed-eval: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[eval,fuzz]'
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch goes first and pinned: its version decides whether pip takes the small CPU build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[plot,test]'
	touch $@

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .old-transformers demo-report
