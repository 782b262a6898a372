# make demo | test | bench | bench-quick | lint | format | clean. Each sets up what it needs in .venv and reuses it.

VENV := .venv
BIN := $(VENV)/bin
# The first Python that this package supports, unless PYTHON names one.
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11 python3.10; do \
	command -v $$p >/dev/null 2>&1 && \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$p && break; done)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CSRC := $(shell find csrc -type f)
CLANG := $(shell find csrc bench tests -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.c")
JOBS ?= 2

.PHONY: demo test bench bench-quick bench-full lint format clean setup

demo: $(VENV)/.built
	$(BIN)/fastast demo

test: $(VENV)/.built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Checks and times everything against what a user would pick instead; writes bench/results, the
# pictures and README's tables. Fifteen minutes on two quiet cores; quick is three and writes none.
bench: $(VENV)/.built
	$(BIN)/python -m pytest bench --set=cpu --benchmark-only --benchmark-json=build/bench.json
	$(BIN)/python bench/report.py build/bench.json

bench-quick: $(VENV)/.built
	$(BIN)/python -m pytest bench --set=quick --benchmark-only --benchmark-json=build/quick.json
	$(BIN)/python bench/report.py --show build/quick.json

bench-full: $(VENV)/.built
	$(BIN)/python -m pytest bench --set=full --benchmark-only --benchmark-json=build/full.json
	$(BIN)/python bench/report.py build/full.json

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CLANG)
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG)

setup: $(VENV)/.built

# Third-party packages.
$(VENV)/.installed: constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "FastAST needs Python 3.10 to 3.13; set PYTHON=..."; exit 1; }
	@echo "setting up $(VENV) (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel pybind11 ninja
	FASTAST_BUILD=none $(PIP) --no-build-isolation -e ".[dev]"
	touch $@

# This package, with its compiled extension.
$(VENV)/.built: $(VENV)/.installed setup.py $(CSRC)
	@mkdir -p build
	$(PIP) --no-build-isolation --no-deps -e . >build/log 2>&1 || { cat build/log; exit 1; }
	$(BIN)/python -c 'from fastast_kernels import backends; print(backends())'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastast_kernels/*.so demo_output bench_output
