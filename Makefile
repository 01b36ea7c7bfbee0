# Two commands: `make demo` generates a video, `make test` runs the whole suite. Both make .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo.mp4
PROMPT ?= a red circle moving left on a white background

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	@mkdir -p $(dir $(OUT))
	$(BIN)/frameloom generate "$(PROMPT)" --output $(OUT)

# Files are handed out in the order of tests/conftest.py, not with those of fewest tests last: some take longest.
# Bytecode is kept: the many processes that tests start would each compile our modules again.
test: $(VENV)/.installed-dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The constraints hold the tested versions, torch among them.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is older or missing: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) out
