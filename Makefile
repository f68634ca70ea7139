# Everything a newcomer needs: `make demo` and `make test`. Both set up .venv first, with Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LITERT_VENV := .venv-litert
LITERT_BIN := $(LITERT_VENV)/bin
# `make test-torch TORCH=2.11`: an environment for that PyTorch.
TORCH_VENV := .venv-torch-$(TORCH)
TORCH_BIN := $(TORCH_VENV)/bin

.PHONY: demo test test-slow test-litert test-all test-torch check format docs clean

demo: $(VENV)/.demo
	$(BIN)/python examples/digits.py runs/digits

# One worker for each core, each with one thread: threads of several workers would wait for each other. Files stay whole
# and in the order of tests/conftest.py. The export runtimes run in a pytest of their own, because one process that holds
# all of them has crashed.
WORKERS := --numprocesses=auto --dist=loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)
RUNTIME_TESTS := tests/benchmark tests/compare tests/demo tests/export tests/export/test_predictor.py
CORE_TESTS := $(addprefix --ignore=,$(RUNTIME_TESTS))

# All guarantees, on small networks and data.
test: $(VENV)/.dev
	$(PYTEST) -m "not slow" $(CORE_TESTS)
	$(PYTEST) -m "not slow" $(RUNTIME_TESTS)

# What `test` leaves out: more networks, sizes and combinations of the same.
test-slow: $(VENV)/.dev
	$(PYTEST) -m slow $(CORE_TESTS)
	$(PYTEST) -m slow $(RUNTIME_TESTS)

# LiteRT's converter requires an older torch than the rest, hence its own environment. Its dependencies include pytest
# plugins that no test here uses and that are too old for the newest pytest.
LITERT_TESTS := $(addprefix tests/export/test_,litert.py predictor.py accuracy.py evaluation.py)
test-litert: $(LITERT_VENV)/.dev
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(LITERT_BIN)/python -m pytest -k litert $(LITERT_TESTS)

test-all: test test-slow test-litert

# A reduced suite with another PyTorch: networks, weights, counting, training, resume and one export.
TORCH_TESTS := tests/models tests/training/test_loop.py tests/training/test_resume.py tests/training/test_optim.py \
    tests/test_parity.py tests/test_predict.py tests/benchmark/test_cost.py tests/compare/test_models.py \
    tests/export/test_rewrite.py tests/export/test_onnx.py
test-torch:
	@test -n "$(TORCH)" || { echo 'name a PyTorch version: make test-torch TORCH=2.11'; exit 2; }
	$(MAKE) --no-print-directory $(TORCH_VENV)/.dev
	OMP_NUM_THREADS=1 $(TORCH_BIN)/python -m pytest $(WORKERS) -m "not slow" $(TORCH_TESTS)

# What must hold before a commit, besides the tests.
check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation in site/; warnings, such as broken links, are errors.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf $(VENV) $(LITERT_VENV) .venv-torch-* runs site

$(VENV)/.created $(LITERT_VENV)/.created $(TORCH_VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("mobilevit needs Python 3.11 or newer, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(@D)
	@touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

$(LITERT_VENV)/.dev: $(LITERT_VENV)/.created pyproject.toml
	$(LITERT_BIN)/python -m pip install --quiet --editable '.[litert]' 'pytest>=8.3'
	@touch $@

$(TORCH_VENV)/.dev: $(TORCH_VENV)/.created pyproject.toml
	$(TORCH_BIN)/python -m pip install --quiet --editable '.[test-torch]' 'torch==$(TORCH).*'
	@touch $@
