PYTHON ?= python3
BIN = .venv/bin

.PHONY: sample test check slow wheel

.venv/.base:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q "torch==2.13.0"
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/.base
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q --no-deps "diffsynth==1.1.7"  # for its copy of the published T5 tokenizer alone
	touch $@

# pictures of the built-in model
sample: .venv/.base
	$(BIN)/eridiff sample --out samples

test: .venv/.dev
	$(BIN)/python -m pytest

# full-size and long-running tests
slow: .venv/.dev
	$(BIN)/python -m pytest -m slow

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

# a wheel, built and used in an empty environment
wheel: .venv/.dev
	rm -rf dist build/wheel && $(BIN)/pip wheel -q --no-deps -w dist .
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip install -q "torch==2.13.0"
	build/wheel/bin/pip install -q -c constraints.txt dist/*.whl
	cd build && wheel/bin/python -c "from eridiff.weights import KeyMap; print(sorted(KeyMap('flux').layouts))"
