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

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The constraints pin torch, so that pip takes its CPU build where there is no GPU.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) out
