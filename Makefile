# Everything a newcomer or CI runs. Each target makes the environment first if it is missing.
#
#   make demo              the whole product on a tiny SDXL: prepare, train, compare, report
#   make test              all tests
#   make lint              ruff, ruff format, mypy
#   make test-base         the loss in an environment with the base install only
#
# PIP_ARGS is handed to pip, for instance to choose the CPU build of torch:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-out
PIP_ARGS ?=

BIN := $(VENV)/bin

.PHONY: demo test test-base lint format clean

demo: $(VENV)/.installed
	$(BIN)/mapo-fast demo --out $(OUT)

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[train,examples,dev]"
	touch $@

# A wheel, not an editable install: this also proves that the wheel is complete.
test-base:
	$(PYTHON) -m venv --clear $(VENV)-base
	$(VENV)-base/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt .
	cd $(VENV)-base && bin/python ../tests/base_install.py

clean:
	rm -rf $(VENV) $(VENV)-base build dist *.egg-info
