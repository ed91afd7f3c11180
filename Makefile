# make demo: set up and run the main job.  make check: lint, types, floors and unit tests, in two minutes.
# make test: all tests.  make lint: without tests.
# make guide: the pictures of docs/guide.md.  make oldest: the tests with the oldest libraries that are allowed.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
PYTEST := -m pytest -n auto
# the wings without FiftyOne, whose examples in docstrings are run
DOCTESTS := --doctest-modules $(addprefix fiftyone_ecif/,influence misalignment store settings registry.py progress.py)
BIN := $(VENV)/bin
export FIFTYONE_DO_NOT_TRACK := 1

.PHONY: demo check test oldest lint unit guide clean

demo: $(VENV)/.ready
	$(BIN)/fiftyone-ecif demo

check: lint unit

unit: $(VENV)/.ready-dev
	$(BIN)/python $(PYTEST) $(DOCTESTS) tests/unit

# the longest file first
test: unit
	$(BIN)/python $(PYTEST) --dist loadfile --no-loadscope-reorder tests/browser tests/integration

oldest: $(VENV)/.ready-dev
	$(BIN)/pip install -q uv
	$(BIN)/uv venv -q --seed --allow-existing --python $(BIN)/python $(OLDEST)
	$(BIN)/uv pip install -q --python $(OLDEST) --resolution lowest-direct -e '.[dev]'
	$(OLDEST)/bin/python -m fiftyone_ecif.install.database
	$(OLDEST)/bin/python $(PYTEST) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

guide: $(VENV)/.ready-dev
	$(BIN)/python tools/make_guide.py

$(VENV)/.ready: pyproject.toml requirements.txt | $(BIN)/pip
	$(BIN)/pip install -q -e .
	$(BIN)/python -m fiftyone_ecif.install.database
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

$(BIN)/pip:
	$(PYTHON) tools/make_venv.py $(VENV)

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info
