# Two commands on a fresh machine: `make run` and `make test`. Everything goes into build/, .venv/ and models/.

PYTHON ?= python3
JOBS   ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
BUILD  ?= build
VENV   := .venv
BIN    := $(VENV)/bin
CMAKE_ARGS ?=

export GGML_TQ_BUILD := $(CURDIR)/$(BUILD)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help run test lint build check-tools fetch eval sanitize clean

help:
	@echo "make run       set everything up and generate text from a real model with a tq3 cache"
	@echo "make test      set everything up and run all tests (linters, ctest, pytest)"
	@echo "make build     the programs only, in $(BUILD)/bin"
	@echo "make eval      measure quality: four models, every type (days on two cores; goes on where it was)"
	@echo "make sanitize  the C tests and a short generation under AddressSanitizer and UBSan"
	@echo "make clean     remove what was built (keeps models and the fetched source)"

run: build fetch
	$(BIN)/python scripts/demo.py

test: build fetch lint
	ctest --test-dir $(BUILD) --output-on-failure --no-tests=error -L ggml-tq
	$(BIN)/python -m pytest tests/python

lint: $(VENV)/.test-done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --config-file python/pyproject.toml

# stops with a clear message before anything is fetched
check-tools:
	@PYTHON="$(PYTHON)" sh scripts/check_tools.sh

$(VENV)/.done: python/pyproject.toml python/CMakeLists.txt | check-tools
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ./python
	@touch $@

# torch for the tests of the references, linters: some 300 MB that nobody else needs
$(VENV)/.test-done: $(VENV)/.done
	$(BIN)/python -m pip install --quiet --editable './python[test]'
	@touch $@

build: $(VENV)/.done
	cmake -S . -B $(BUILD) -DPython3_EXECUTABLE="$(CURDIR)/$(BIN)/python" -DGGML_TQ_CACHE_DIR="$(CURDIR)/build/download" $(CMAKE_ARGS)
	cmake --build $(BUILD) --parallel $(JOBS)

fetch: $(VENV)/.done
	$(BIN)/ggml-tq fetch smollm2 wiki

# days on two cores; every result is kept as soon as it is there, and the same command goes on where it was
eval: build
	$(BIN)/ggml-tq fetch smollm2 gemma3 qwen05 qwen15 wiki c4
	for m in SmolLM2-135M-Instruct.Q4_1 gemma-3-270m-q4_k_m qwen2.5-coder-0.5b-instruct-q4_k_m qwen2.5-coder-1.5b-instruct-q4_k_m; do \
	    test -f models/$$m-tq.gguf || $(BIN)/ggml-tq calibrate -m models/$$m.gguf -f models/c4.txt -o models/$$m-tq.gguf || exit 1; done
	$(BIN)/ggml-tq eval --matrix --no-keep-base
	$(BIN)/ggml-tq report results/quality.jsonl -o results/quality.md --study docs/results/study-smollm2.json --study docs/results/study-qwen05.json

sanitize: $(VENV)/.done fetch
	$(MAKE) build BUILD=build-sanitize CMAKE_ARGS="-DGGML_TQ_SANITIZE=address,undefined -DGGML_OPENMP=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo -DGGML_TQ_PROGRAMS=llama-completion"
	ctest --test-dir build-sanitize --output-on-failure --no-tests=error -L ggml-tq-c
	build-sanitize/bin/llama-completion -m models/SmolLM2-135M-Instruct.Q4_1.gguf -no-cnv -p "The sea is" -n 8 -c 256 -ctk tq3 -ctv tq3

clean:
	rm -rf $(BUILD)/CMakeFiles $(BUILD)/bin $(BUILD)/upstream $(BUILD)/llama.cpp $(BUILD)/CMakeCache.txt $(VENV)
