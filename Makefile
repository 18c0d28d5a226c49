# Everything happens in $(VENV); stamps live inside it, so removing it starts afresh.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
REHEARSAL ?= $(HOME)/.cache/ssd-runtime/rehearsal
CONFIG ?= configs/smollm2_cpu.toml
PROMPT ?= Explain in a few sentences why the sky is blue.

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PROJECT := $(VENV)/.stamp-project
TESTING := $(VENV)/.stamp-testing
EXT_SOURCES := $(wildcard setup.py cuda_ext/csrc/*.* cuda_ext/csrc/cuda/*)

.PHONY: help demo install ext fetch test test-plain test-gpu host-check cuda-check sanitize lint format \
  rehearse gpu-pack clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make demo    install, fetch the default model, stream an answer with SSD, compare AR, SD and SSD"
	@echo "make test    install what the tests need and run them all"
	@echo "make test-plain  the suites that meet the operators once more, without the compiled extension"
	@echo "make lint    ruff, mypy and the import floors"
	@echo "make ext     rebuild the compiled extension"
	@echo "make host-check  compile the operators' C++ against the oldest torch that is supported"
	@echo "make cuda-check  compile the CUDA kernels (needs nvcc, no GPU) and hold them to their budgets"
	@echo "make sanitize    the kernels' tests under AddressSanitizer and UBSan"
	@echo "make test-gpu PYTHON=python3  the CUDA kernels on a GPU, with what that Python has: installs nothing"
	@echo "make rehearse    the scripts for an H100 (ops/gpu) on this CPU, in the environment of a GPU machine"
	@echo "make gpu-pack    what these scripts carry to a machine without a network, in parts"
	@echo "make clean   remove build products (distclean: the virtual environment too)"

# torch first, then the project against it: a build without isolation compiles for the torch that will run it.
$(VENV)/.stamp-torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch into $(VENV) (a minute or two; longer where it must be downloaded)"
	$(PIP) install "torch==2.13.*" numpy "setuptools>=77" wheel ninja
	touch $@

$(PROJECT): $(VENV)/.stamp-torch pyproject.toml $(EXT_SOURCES)
	@echo "building and installing the project (about a minute)"
	$(PIP) install --no-build-isolation --editable .
	touch $@

$(TESTING): $(PROJECT)
	$(PIP) install --no-build-isolation --editable ".[test]"
	touch $@

install: $(PROJECT)

ext: $(VENV)/.stamp-torch
	$(BIN)/python setup.py build_ext --inplace

fetch: $(PROJECT)
	$(BIN)/ssd fetch --config $(CONFIG)

demo: fetch
	@echo
	@echo "== ssd generate: one answer, streamed, in SSD mode"
	$(BIN)/ssd generate --config $(CONFIG) --mode ssd --max-tokens 96 --prompt "$(PROMPT)"
	@echo
	@echo "== ssd bench: the same prompts in every mode"
	$(BIN)/ssd bench --config $(CONFIG) --modes ar,sd,ssd --limit 3 --max-tokens 64

# Two workers: one for what starts engines, a test at a time, the other for the rest (tests/conftest.py).
test: $(TESTING) fetch
	$(BIN)/python -m pytest --numprocesses 2 $(PYTEST_ARGS)

# Left out: what compares the extension with plain torch (test_cuda_*, test_decoder_layers) or counts the bytes of its
# weights (test_memory); what calls no operator (the links, messages and sockets, the launcher and its processes, files
# and text, what a GPU session carries); and repetitions that are slow in plain torch (further distributions, other modes
# and lengths of the same identity, 64 tokens of the real model).
# tests/process, but for test_cli_ranks.py, always runs its ranks in plain torch.
PLAIN_LEFT_OUT := $(addprefix --ignore-glob=tests/unit/test_,cuda_* decoder_layers.py backup.py bench*.py cli.py \
  cli_commands.py config.py control*.py dependencies.py gpu_session.py logs.py memory.py messages* metrics.py model_files.py nodes.py processes.py prompts.py \
  rank.py tokenizer_text.py topology.py torchrun.py trace.py tree.py setup.py)
PLAIN_E2E := $(addprefix tests/e2e/,"test_token_identity.py::test_one_sequence_gets_the_tokens_of_plain_decoding[ssd-3-relative]" \
  "test_token_identity.py::test_one_sequence_gets_the_tokens_of_plain_decoding[sd-5-twin]" \
  "test_token_identity.py::test_one_sequence_gets_the_tokens_of_plain_decoding[sd-colocated-1-stranger]" \
  "test_distribution.py::test_three_tokens_have_the_models_joint_distribution[ssd-1.0]" \
  "test_smollm2.py::test_the_models_own_end_token_ends_an_answer[ssd]")

test-plain: $(TESTING) fetch
	SSD_CUDA_EXT=0 $(BIN)/python -m pytest -q $(PLAIN_LEFT_OUT) tests/unit $(PLAIN_E2E) \
	  "tests/process/test_serving.py::test_every_mode_gives_the_same_tokens"

host-check: $(PROJECT)
	$(BIN)/python -m ops.host_check

cuda-check: $(VENV)/.stamp-torch
	$(BIN)/python ops/cuda_check.py

sanitize: $(TESTING)
	ops/sanitize.sh $(BIN)/python

# With the torch at hand, a CUDA build, on a machine that may have no network; pytest's plugins may not be there either.
test-gpu:
	$(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m pytest tests/gpu -o addopts= $(PYTEST_ARGS)
	$(PYTHON) -m ops.bench.kv --device cuda

# Both build and run in $(REHEARSAL), outside of the tree and of $(VENV), which have an extension for their own torch.
gpu-pack:
	ops/gpu/environment.sh $(REHEARSAL)
	ops/gpu/pack.sh $(REHEARSAL) build/gpu/carry

rehearse: gpu-pack
	@cd $(REHEARSAL)/tree && export REHEARSE=1 PYTHON=$(REHEARSAL)/bin/python; \
	export CARRY=$(CURDIR)/build/gpu/carry OUT=$(CURDIR)/build/gpu/rehearsal; \
	ops/gpu/first.sh; first=$$?; ops/gpu/second.sh; second=$$?; \
	echo; cat $$OUT/first.txt $$OUT/second.txt; exit $$((first || second))

lint: $(TESTING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(TESTING)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache cuda_ext/*.so
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs -r rm -rf

distclean: clean
	rm -rf $(VENV)
