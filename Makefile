# Everything a newcomer types: make setup, make quickstart, make test. Each sets itself up; a repeat is a no-op.
#
#   PYTHON             interpreter for the environment (3.10 to 3.12; default python3.11, else python3)
#   TORCH_INDEX        index to take torch from, e.g. one that carries its CPU wheels (default: pip's own)
#   PHIMR_CONSTRAINTS  pip constraints file (default: the tested CPU pins)
#   SEEDS, OUT         of `make quickstart`
#   PYTEST_ARGS        of `make test`

VENV := .venv
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
TORCH_INDEX ?=
PHIMR_CONSTRAINTS ?= requirements/constraints-cpu.txt
SEEDS ?= 0
OUT ?= runs/quickstart
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/setup.stamp
LOG := $(VENV)/setup.log
# -qq still shows errors; the log has every line.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq --log $(LOG)
INSTALL := $(PIP) install -c $(PHIMR_CONSTRAINTS)
SHELL_SCRIPTS := $(wildcard slurm/*.sh) .ci/run

.DELETE_ON_ERROR:
.PHONY: help setup quickstart test lint format clean

help:
	@echo "make setup | quickstart | test | lint | format | clean   (see README.md)"

setup: $(STAMP)

$(STAMP): setup.cfg requirements/aligner.txt $(PHIMR_CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info[:2] < (3, 13) else \
		"Python %d.%d found; 3.10 to 3.12 is needed: make setup PYTHON=python3.11" % sys.version_info[:2])'
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 \
		|| { echo "[1/5] environment in $(VENV) ($(PYTHON))"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "[2/5] build tools; full log in $(LOG)"
	@$(INSTALL) setuptools wheel
	@echo "[3/5] torch"
	@$(INSTALL) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch==2.13.0
	@echo "[4/5] phimr-nemo, NeMo, Megatron-Core and the development tools"
	@$(INSTALL) -e '.[train,dev]'
	@echo "[5/5] NeMo-Aligner"
	@$(INSTALL) --no-deps -r requirements/aligner.txt
	@$(BIN)/python -m pip --disable-pip-version-check check 2>>$(LOG)
	@touch $@

quickstart: setup
	$(BIN)/phimr quickstart --seeds $(SEEDS) --out $(OUT)

# One thread a process: the parallel tests start up to four of them.
test: setup
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline MPLBACKEND=Agg \
		$(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/shellcheck -x $(SHELL_SCRIPTS)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
