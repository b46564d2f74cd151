# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# PyPI's torch for Linux is the CUDA build, gigabytes of it. Without a GPU the CPU build is taken from
# PyTorch's own index, where that can be reached. TORCH_INDEX=URL names another index; an empty one
# is PyPI's build.
CPU_INDEX := https://download.pytorch.org/whl/cpu
ifeq ($(origin TORCH_INDEX), undefined)
TORCH_INDEX = $(shell command -v nvidia-smi >/dev/null 2>&1 || \
	{ curl -fsI -m 3 $(CPU_INDEX)/torch/ >/dev/null 2>&1 && echo $(CPU_INDEX); } || echo unreachable)
endif
SUPPORTED := -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
comma := ,
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard kernels/csrc/*)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench families clean

help:
	@echo "make demo          distil a real encoder on real text, and compare (FULL=1: at length)"
	@echo "make test          linters, types, and some cases of every test: minutes"
	@echo "make test-all      the same with all cases, mutations and killed processes"
	@echo "make bench         the losses and the fused head next to PyTorch, a step; the driver next to a plain loop; exactness"
	@echo "make families      every family of transformers, tiny: are its students right?"
	@echo "make clean         remove .venv and build leftovers (runs/ stays)"

# Installs with the extras $(1). A Python that is too old or too new would leave a broken $(VENV).
define install
	@{ test -x $(BIN)/pip && $(BIN)/python $(SUPPORTED); } 2>/dev/null || \
	if $(PYTHON) $(SUPPORTED); then $(PYTHON) -m venv --clear $(VENV); else \
		echo "make: expected Python 3.11 to 3.13, got $$($(PYTHON) -V 2>&1);" \
			"choose one as in make PYTHON=python3.12" >&2; exit 2; fi
	@index=$(TORCH_INDEX); \
	if [ "$$index" = unreachable ]; then index=; \
		echo "no GPU, and $(CPU_INDEX) does not answer: pip fetches torch with CUDA, gigabytes," \
			"if PyPI has no other for this system; make TORCH_INDEX=URL takes it from elsewhere"; fi; \
	echo "installing into $(VENV) ..."; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		$${index:+--extra-index-url $$index} --editable '.[$(1)]'
endef

$(VENV)/demo: $(SOURCES)
	$(call install,demo)
	@touch $@

$(VENV)/dev: $(SOURCES)
	$(call install,demo$(comma)dev)
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

# The table of docs/models.md.
families: $(VENV)/dev
	$(BIN)/python bench/families.py --write

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
