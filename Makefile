# The words everyone uses. Each sets up what it needs in .venv; nothing else is required than
# Python 3.11+ (a C++ compiler will be used by native kernels when there is one).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
EXTRAS := dev

.PHONY: demo test slow page clients trl gguf check bench format clean
.DEFAULT_GOAL := test

# torch goes first and alone. On Linux pip's usual index gives a build with gigabytes of CUDA
# libraries; name PyTorch's own CPU index in TORCH_INDEX to do without them.
TORCH_INDEX ?=
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Herdling needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: $(READY)  ## the whole life of a tiny model, then: .venv/bin/herdling chat runs/demo/model
	$(BIN)/herdling demo

# A process for each core (four at most) with one thread each: toy shapes gain nothing from two.
test: $(READY)  ## the unit and parity tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

# Where there is no Chromium and apt-get may not be used, name a browser: make page CHROMIUM=/path.
page: $(READY)  ## the tests of the server's page, in a headless Chromium (some minutes)
	command -v $${CHROMIUM:-chromium} || { apt-get update -qq && apt-get install -y -qq chromium; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS),page]'
	test -f .venv/axe/node_modules/axe-core/axe.min.js || npm install --silent --prefix .venv/axe axe-core@4.14.1
	$(BIN)/python -m pytest -m page tests/page

# Each environment is what tests/clients/NAME.txt pins; no single one can hold the newest of all.
# HERDLING_MODEL=runs/demo/model asks that model instead of a nano one made on the spot.
CLIENTS := sdk chains lm-eval schemathesis
CLIENT_TESTS = HERDLING_PYTHON=$(CURDIR)/$(BIN)/python .clients/$(1)/bin/python -m pytest -c tests/clients/pytest.ini $(2:%=tests/clients/test_%.py)
clients: $(READY) $(CLIENTS:%=.clients/%/.ready)  ## real clients against a live server (about 6 minutes)
	$(call CLIENT_TESTS,sdk,openai anthropic ollama hub sdk_shapes curl)
	$(call CLIENT_TESTS,chains,openai litellm langchain)
	$(call CLIENT_TESTS,lm-eval,lm_eval)
	$(call CLIENT_TESTS,schemathesis,schemathesis)

# Trainers of others, whose losses ours are compared with.
trl: $(READY) .clients/trl/.ready  ## preference and policy losses beside TRL's own (a minute, and TRL in an environment)
	$(call CLIENT_TESTS,trl,trl trl_rl)

# These import Herdling themselves, so their environment has it and torch.
IN_PROCESS := lm-eval trl
.clients/%/.ready: tests/clients/%.txt pyproject.toml constraints.txt
	$(PYTHON) -m venv .clients/$*
	.clients/$*/bin/python -m pip install -q --disable-pip-version-check -U pip
	$(if $(filter $*,$(IN_PROCESS)),.clients/$*/bin/python -m pip install -q -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch)
	$(if $(filter $*,$(IN_PROCESS)),.clients/$*/bin/python -m pip install -q -c constraints.txt -e '.[serve]')
	.clients/$*/bin/python -m pip install -q -r $<
	touch $@

# LLAMA_CPP is a folder with llama.cpp's binaries; docs/export.md says how to build them.
HERDLING_MODEL ?= runs/demo/model
gguf: $(READY)  ## do GGUF files compute the same in llama.cpp? (about 3 minutes)
	$(BIN)/python benchmarks/gguf_files.py $(HERDLING_MODEL) --llama-cpp $(LLAMA_CPP)

check: $(READY)  ## format, lint, types, import floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(READY)  ## the figures of docs/performance.md (about 15 minutes on an idle machine)
	$(BIN)/python benchmarks/model_speed.py
	$(BIN)/python benchmarks/expert_scaling.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist *.egg-info
