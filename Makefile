PYTHON ?= python3
BIN = .venv/bin
OLDEST = transformers==4.54.1 huggingface_hub==0.34.3 safetensors==0.4.5
# versions that pass the tests; some of them need Python 3.11, so on 3.10 pip chooses
PINS = $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')

.PHONY: sample test fuzz check slow test-full gpu oldest wheel docs

.venv/.base:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("eridiff needs Python 3.10 or later, and $(PYTHON) is %d.%d: run make sample PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q "torch==2.13.0"
	$(BIN)/pip install -q $(PINS) -e .
	touch $@

.venv/.dev: .venv/.base
	$(BIN)/pip install -q $(PINS) -e ".[dev]"
	$(BIN)/pip install -q --no-deps "diffsynth==1.1.7"  # for its copy of the published T5 tokenizer alone
	touch $@

.venv/.docs: .venv/.base
	$(BIN)/pip install -q $(PINS) -e ".[docs]"
	touch $@

# images by the built-in model
sample: .venv/.base
	$(BIN)/eridiff sample --out samples
	@echo
	@echo "Open $$(ls samples/*-contact-sheet.png | tail -1) to see all images. To go on:"
	@echo '    source .venv/bin/activate'
	@echo '    eridiff sample --prompt "a fox on snow"'

# one process per core, each test on one thread
test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope

# N damaged files of every kind, by the seed SEED: each read or refused by one sentence
N = 10000
SEED = 0
fuzz: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(N) $(SEED)

# full-size and long-running tests
slow: .venv/.dev
	$(BIN)/python -m pytest -m slow

# published sizes with random weights beside diffusers: 12 GB on the disk, 16 GB of memory, a quarter of an hour
test-full: .venv/.dev
	$(BIN)/python -m pytest -m full -s

# what only a CUDA device can tell: tests, published sizes with random weights; 8 minutes, results in benchmarks/results
gpu: .venv/.dev
	$(BIN)/python -m benchmarks.gpu

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

# the tests of text, goldens, plans and of what trainers hand in, with the oldest versions that pyproject.toml admits
oldest: .venv/.dev
	rm -rf build/oldest && $(BIN)/pip install -q --no-deps --target build/oldest $(OLDEST) "tokenizers<0.22"
	PYTHONPATH=build/oldest $(BIN)/python -c 'import transformers, safetensors, huggingface_hub as hub; assert (transformers.__version__, hub.__version__, safetensors.__version__) == ("4.54.1", "0.34.3", "0.4.5")'
	PYTHONPATH=build/oldest $(BIN)/python -m pytest tests/test_text.py tests/test_golden.py tests/test_plan.py tests/test_handing_in.py tests/test_cached_embeddings.py tests/test_hub.py

# a wheel, built and used in an empty environment; then an editable installation, which puts nothing but eridiff on the path
wheel: .venv/.dev
	rm -rf dist build/wheel && $(BIN)/pip wheel -q --no-deps -w dist .
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip install -q "torch==2.13.0"
	build/wheel/bin/pip install -q $(PINS) dist/*.whl
	cd build && wheel/bin/eridiff sample --prompt "a swan on mars" --out wheel/swan.png
	build/wheel/bin/pip uninstall -q -y eridiff && build/wheel/bin/pip install -q $(PINS) -e .
	cd build && wheel/bin/python -c 'import importlib.util as i, eridiff; \
	    found = [n for n in ("tests", "docs", "benchmarks", "examples", "weights_map") if i.find_spec(n)]; assert not found, found'

# the documentation site in build/site; once its tools are installed nothing is fetched, and no page loads anything from elsewhere
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	! grep -rE '(src|<link[^>]* href)="https?:' build/site --include '*.html'
	@echo "Open build/site/index.html; search needs a server: python3 -m http.server -d build/site"
