# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One installation of torch, the one that is tested: a bare "torch" would fetch gigabytes of CUDA
# where there is no GPU. Where there is one, its build of the same version is what pip picks.
SOURCES := setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help:
	@echo "make demo          distil a real encoder on real text, and compare (FULL=1: at length)"
	@echo "make test          linters, types and tests"
	@echo "make bench         what the driver costs over a plain PyTorch loop"
	@echo "make clean         remove .venv and build leftovers (runs/ stays)"

$(VENV)/demo: $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	@$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/dev: $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	@$(INSTALL) --editable '.[demo,dev]'
	@touch $@ $(VENV)/demo

demo: $(VENV)/demo
	$(BIN)/distilfast demo $(if $(FULL),--full)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A file of tests a process, one thread each: on two cores that is twice as fast.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

bench: $(VENV)/demo
	$(BIN)/python bench/overhead.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
