# Everything a newcomer needs: `make demo` and `make test`. Both set up .venv first, with Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LITERT_VENV := .venv-litert
LITERT_BIN := $(LITERT_VENV)/bin

.PHONY: demo test test-core test-runtimes test-litert check format clean

demo: $(VENV)/.demo
	$(BIN)/python examples/digits.py runs/digits

# In two processes: the runtimes of export bring threads and memory of their own, and are not made to live with all others.
RUNTIME_TESTS := tests/benchmark tests/compare tests/demo tests/export

test: test-core test-runtimes

test-core: $(VENV)/.dev
	$(BIN)/python -m pytest $(addprefix --ignore=,$(RUNTIME_TESTS))

test-runtimes: $(VENV)/.dev
	$(BIN)/python -m pytest $(RUNTIME_TESTS)

# LiteRT's converter wants an older torch than the rest, and so an environment of its own. Its libraries bring plugins
# for pytest that no test here needs and that are too old for the newest pytest.
test-litert: $(LITERT_VENV)/.dev
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(LITERT_BIN)/python -m pytest tests/export/test_litert.py

# What must hold before a commit; the tests are `make test` and `make test-litert`.
check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LITERT_VENV) runs

$(VENV)/.created $(LITERT_VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("mobilevit needs Python 3.11 or newer, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(@D)
	@touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(LITERT_VENV)/.dev: $(LITERT_VENV)/.created pyproject.toml
	$(LITERT_BIN)/python -m pip install --quiet --editable '.[litert]' 'pytest>=8.3'
	@touch $@
