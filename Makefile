# What a developer runs. Everything goes into .venv and build/; `make clean` removes both.
#
#   make setup        .venv with dipper (editable) and its tools; again only when the build's inputs change
#   make demo         a real model, four modes, one table: about five minutes on two cores
#   make test         lint, native tests under sanitizers, Python tests
#   make test-neon    native tests as built for AArch64, under qemu
#   make test-slow    the tests that take minutes
#   make fix          format and fix what the linters can

PYTHON ?= python3
BIN := .venv/bin

# For the tests that compare with transformers. TORCH_OPTIONS goes to pip and can name a CPU index, which saves gigabytes.
# An empty TORCH_SPEC leaves torch out; those tests are then skipped, and pytest says so.
TORCH_SPEC ?= torch==2.13.0
TORCH_OPTIONS ?=
TRANSFORMERS_SPEC ?= transformers>=5
RAY_SPEC ?= ray>=2.40
TRAIN_SPEC ?= 'peft>=0.18' 'accelerate>=1.10'
# Pinned: versions of clang-format do not agree on a layout.
CLANG_FORMAT_SPEC ?= clang-format==18.1.8

BUILD_INPUTS := pyproject.toml CMakeLists.txt $(shell find csrc -type f)
# An editable install knows the modules that there were: one more, or one less, and it is made anew.
SETUP := .venv/.setup-$(shell find src -name '*.py' | LC_ALL=C sort | cksum | cut -d' ' -f1)
NATIVE_FILES = $(shell find csrc tests/cpp benchmarks -name '*.[chi]pp' -o -name '*.inl')

.DEFAULT_GOAL := help
.PHONY: help setup demo bench test build-native test-native build-neon test-neon test-python test-slow lint fix clean

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile

setup: $(SETUP)

$(SETUP): $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[pack,dev]' '$(CLANG_FORMAT_SPEC)'
	command -v cmake >/dev/null || $(BIN)/python -m pip install -q cmake
	command -v ninja >/dev/null || $(BIN)/python -m pip install -q ninja
	touch $@

.venv/.torch: $(SETUP)
ifneq ($(TORCH_SPEC),)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q $(TORCH_OPTIONS) '$(TORCH_SPEC)'
	$(BIN)/python -c 'import transformers' 2>/dev/null || $(BIN)/python -m pip install -q '$(TRANSFORMERS_SPEC)'
	$(BIN)/python -c 'import peft, accelerate' 2>/dev/null || $(BIN)/python -m pip install -q $(TRAIN_SPEC)
endif
	touch $@

demo: setup
	$(BIN)/python benchmarks/demo.py

bench: setup models/smollm2.dipper
	$(BIN)/dipper bench models/smollm2.dipper --mlp-dram 60%

models/smollm2.dipper: | $(SETUP)
	mkdir -p models
	$(BIN)/dipper pack "$$($(BIN)/dipper pull smollm2)" -o $@

test: lint test-native test-python

# The library alone, without Python, with every report of a sanitizer an error.
test-native: build-native
	cd build/native && PATH="$(CURDIR)/$(BIN):$$PATH" ctest -j 2 --output-on-failure

build-native: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/native -G Ninja -DCMAKE_BUILD_TYPE=Debug \
	  -DDIPPER_NATIVE_TESTS=ON -DDIPPER_SANITIZE=address,undefined -Wno-dev >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/native

# The same as compiled for AArch64, without sanitizers. An AArch64 machine has these kernels in `make test`.
test-neon: build-neon
	cd build/neon && PATH="$(CURDIR)/$(BIN):$$PATH" ctest -j 2 --verbose

build-neon: setup
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64-static; do command -v $$tool >/dev/null || { \
	  echo "test-neon: $$tool is missing: apt-get install g++-aarch64-linux-gnu qemu-user-static" >&2; exit 1; }; done
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/neon -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DDIPPER_NATIVE_TESTS=ON -Wno-dev >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/neon

# In processes, a core each: PyTorch's own threads would only stand in their way.
test-python: .venv/.torch
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'not slow' --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: .venv/.torch
	$(BIN)/python -c 'import ray' 2>/dev/null || $(BIN)/python -m pip install -q '$(RAY_SPEC)'
	$(BIN)/python -m pytest -q -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_FILES)

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE_FILES)

clean:
	rm -rf .venv build
