# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# PyPI's torch for Linux is the CUDA build, gigabytes of it. Without a GPU the CPU build is taken from
# PyTorch's own index, where that can be reached.
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX := $(shell command -v nvidia-smi >/dev/null 2>&1 || \
	{ curl -fsI -m 3 $(CPU_INDEX)/torch/ >/dev/null 2>&1 && echo --extra-index-url $(CPU_INDEX); })
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	--constraint constraints.txt $(TORCH_INDEX)
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard kernels/csrc/*)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench clean

help:
	@echo "make demo          distil a real encoder on real text, and compare (FULL=1: at length)"
	@echo "make test          linters, types, and some cases of every test: minutes"
	@echo "make test-all      the same with all cases, mutations and killed processes"
	@echo "make bench         the losses and the fused head next to PyTorch, a step; the driver next to a plain loop; exactness"
	@echo "make clean         remove .venv and build leftovers (runs/ stays)"

$(VENV)/demo: $(SOURCES)
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV) ..."
	@$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/dev: $(SOURCES)
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
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
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# Some cases of every test: minutes.
test: lint
	$(PYTEST)

# Every case of every test, mutations and killed processes among them.
test-all: lint
	$(PYTEST) --all

bench: $(VENV)/demo
	$(BIN)/python bench/losses.py
	$(BIN)/python bench/linear.py
	$(BIN)/python bench/linear.py --memory
	$(BIN)/python bench/step.py
	$(BIN)/python bench/overhead.py
	$(BIN)/python bench/batches.py
	$(BIN)/python bench/resume.py
	$(BIN)/python bench/save.py
	$(BIN)/python bench/exactness.py
	$(BIN)/python bench/accumulation.py
	$(BIN)/python bench/accumulation_cost.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
