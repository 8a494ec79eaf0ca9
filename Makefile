# `make serve` on a fresh machine; `make test` before a commit. Everything lands in .venv.

PRESET ?= laptop
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt protos/build.py $(wildcard protos/*.proto)
PYTEST := $(BIN)/pytest

.PHONY: serve test test-all lint coverage bench demo-model demo-eagle demo-eval wheel \
	released-protos clean

# Serve a preset or a deployment file: make serve PRESET=laptop_single ARGS="--model DIR".
serve: $(VENV)/.runtime
	$(BIN)/ostro serve $(PRESET) $(ARGS)

test: lint
	$(PYTEST) $(ARGS)

# The slow tests too, and those for GPUs where there are any.
test-all: lint
	$(PYTEST) -m "" $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A report; the floor holds for the rooms of pure Python only.
coverage: $(VENV)/.test
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage combine
	$(BIN)/coverage report
	$(BIN)/coverage report --include="*/actors/engine/*,*/configs/*" --fail-under=90

# A short set; `ostro bench --help` has the rest.
bench: $(VENV)/.runtime
	$(BIN)/ostro bench quick

# The embedded model, made anew: tokenizer, about 90 minutes of training on two cores, export,
# speculation head, evaluation through a running cluster, card and plot. Interrupted, it goes on
# where it was.
MODEL := cluster/teaching_model
RUN := build/demo_model
demo-model: $(VENV)/.test
	$(BIN)/python tests/demo_model/train.py --out $(RUN) $(ARGS)
	$(BIN)/python tests/demo_model/export.py --run $(RUN) --to $(MODEL)
	$(MAKE) demo-eagle
	$(MAKE) demo-eval

# The embedded model's speculation head alone, and how many of its drafts are right.
demo-eagle: $(VENV)/.test
	$(BIN)/python tests/demo_model/train_eagle.py --run $(RUN) --model $(MODEL)
	$(BIN)/python tests/demo_model/evaluate_eagle.py --model $(MODEL) --out $(RUN)/eagle.json

# The figures of its card: every family, effort and face.
demo-eval: $(VENV)/.test
	$(BIN)/python tests/demo_model/evaluate.py --serve $(MODEL) --out $(RUN)/evaluation.json
	$(BIN)/python tests/demo_model/report.py --run $(RUN) --to $(MODEL)

# What ray_cluster.yaml installs on every node.
wheel: $(BIN)/python
	rm -f dist/*.whl
	$(BIN)/pip wheel --no-deps --wheel-dir dist .
	cp constraints.txt dist/

# At a release: what clients will be out there with. The tests refuse whatever would break them.
released-protos: $(VENV)/.test
	$(BIN)/python tests/helpers/buf_protos.py

# Leaves .venv alone.
clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f .coverage .coverage.* protos/*_pb2*.py protos/*_pb2*.pyi
	rm -f $(VENV)/.runtime $(VENV)/.test

# The stamps: installing again is needed only when an input is newer.
$(VENV)/.runtime: $(INPUTS) | $(BIN)/python
	$(BIN)/pip install -c constraints.txt -e .
	$(BIN)/python -m ostro.kernels.cpu.library
	touch $@

$(VENV)/.test: $(INPUTS) | $(BIN)/python
	$(BIN)/pip install -c constraints.txt -e ".[test]"
	$(BIN)/python -m ostro.kernels.cpu.library
	touch $(VENV)/.runtime $@

$(BIN)/python:
	@for python in $(PYTHON) python3.12 python3.11; do \
	  if $$python -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))" \
	      >/dev/null 2>&1; then \
	    echo "$$python -m venv $(VENV)"; \
	    $$python -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; \
	    exit 0; \
	  fi; \
	done; \
	echo "Ostro needs Python 3.11 or 3.12, and '$(PYTHON)' is neither:" \
	  "name one with 'make PYTHON=/path/to/python3.12'" >&2; \
	exit 1
