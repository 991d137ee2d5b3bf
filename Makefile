# kiln: GPT training in C++.
#   make          build ./train                         make test     everything that can be tested on this machine
#   make demo     from nothing to a trained model,      make help     the other targets, and the switches
#                 a loss curve and generated text
SHELL      := /bin/bash
MAKEFLAGS  += --no-builtin-rules
first       = $(firstword $(foreach c,$(1),$(shell command -v $(c))))
comma      := ,

CPU        ?= native## instruction set for -march=; x86-64-v3 for a binary that moves between machines
SANITIZE   ?=## 1: address and undefined-behaviour sanitizers, without the system tests
DEBUG      ?=## 1: -O1, assertions on
CUDA       ?= $(if $(NVCC),1,0)## 0: a ./train for the CPU alone, without nvcc
ARCH       ?= 80 86 89 90a 100## compute capabilities to compile for; the last also as PTX, for later GPUs
NVCC       ?= $(call first,$(CUDA_HOME:%=%/bin/nvcc) nvcc /usr/local/cuda/bin/nvcc)
DEPS       ?= 1## 0: never look for or install packages
PYTHON     ?= $(call first,/usr/bin/python3 python3)
MPICXX     ?= $(call first,mpicxx.mpich mpicxx)
MPIRUN     ?= $(call first,mpirun.mpich mpirun)
CCACHE     ?= $(call first,ccache)## compiler cache; empty: none

export MPIRUN PYTHON
# Clones share the compiler cache: paths below this folder are relative, in debug information too.
export CCACHE_BASEDIR ?= $(CURDIR)
# A new source is not preprocessed for the cache alone: the list of headers that -MD writes is its key.
export CCACHE_DEPEND ?= 1

VARIANT    := $(if $(SANITIZE),sanitize,$(if $(DEBUG),debug,release))
B          := build/$(VARIANT)$(patsubst %,-%,$(filter-out native,$(CPU)))
O          := $(B)/obj
# GCC's documentation: a sanitizer may cause false warnings of -Wmaybe-uninitialized (GCC 12 does so in its own <regex>).
SAN        := $(if $(SANITIZE),-fsanitize=address$(comma)undefined -fno-sanitize-recover=undefined \
                               -fno-omit-frame-pointer -Wno-maybe-uninitialized)
# Files that compute are optimised; the other files compile at a lower level in half the time.  Contracted products
# (FMA) begin at -O2: below -O2 the same source gives other bits.
LEVEL       = $(if $(DEBUG)$(SANITIZE),-O1,-O2)
OPT         = $(LEVEL) $(if $(DEBUG),-g,-g1) $(if $(DEBUG)$(SANITIZE),,-DNDEBUG)
CXXFLAGS   += -std=c++20 -I. -Wall -Wextra -Werror -Wno-missing-field-initializers -Wno-restrict -fopenmp -march=$(CPU) \
              -fno-math-errno -fno-trapping-math -ffile-prefix-map=$(CURDIR)=. $(OPT) $(SAN)
LIBS       := -ldnnl -lyaml-cpp -lfmt -lxxhash
# The library that programs and tests share, then the files of ./train alone; MAIN's depend on the device (KILN_CUDA).
LIB_SRC    := $(filter-out comm/nccl.cpp bench/bench_%,$(wildcard $(addsuffix /*.cpp,common kernels kernels/cpu model trainer \
                checkpoint data comm bench))) run/attention_kernels.cpp
LIB_OBJ    := $(LIB_SRC:%.cpp=$(O)/%.o)
RUN_OBJ    := $(patsubst %.cpp,$(O)/%.o,$(filter-out $(LIB_SRC) run/device.cpp,$(wildcard run/*.cpp)))
MAIN       := train run/device
TRAIN      := $(B)/train$(if $(filter 1,$(CUDA)),,-cpu)
TEST_SRC   := $(filter-out test/mpi/%,$(wildcard test/*.cpp test/*/*.cpp))
TEST_OBJ   := $(TEST_SRC:%.cpp=$(O)/%.o)
MPI_TESTS  := $(patsubst %.cpp,$(O)/%.o,$(wildcard test/mpi/*.cpp))
.DEFAULT_GOAL := all
include cuda.mk
TESTS      := $(addprefix $(B)/,test test_emulator test_mpi) \
              $(if $(SANITIZE),,all emulated $(RACE)/test_emulator $(RACE)/test_race $(BENCH_EMULATED) $(B)/fault_shim.so \
              $(B)/test_mpi_nccl231)
FORMATTED  := $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' 2>/dev/null)
$(shell mkdir -p build; c=$$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown); \
        [ "$$c" = "$$(cat build/commit 2>/dev/null)" ] || echo $$c > build/commit)

all: $(TRAIN) ## build ./train
	@ln -sf $(TRAIN) train

demo: deps ## prepare text, train about 90 seconds on 2 ranks, plot, generate
	@$(MAKE) --no-print-directory -j$$(nproc) all
	scripts/demo.sh $(DEMO_ARGS)

test: deps ## all tests; the last line is "N passed, N failed"
	@$(MAKE) --no-print-directory -j$$(nproc) $(TESTS)
	$(PYTHON) test/run.py --build $(B) --mpirun $(MPIRUN) $(if $(SANITIZE),--no-system,--race $(RACE))

quick: ## lint, and the tests of files that differ from HEAD: under a minute after touching one kernel
	@$(PYTHON) test/quick.py --build $(B)

test-full: ## test, the sanitizers' suites and removals, all in full; CI runs a shorter form
	@KILN_TEST_FULL=1 $(MAKE) --no-print-directory test
	@KILN_TEST_FULL=1 $(MAKE) --no-print-directory test SANITIZE=1
	@$(MAKE) --no-print-directory removals
	@$(if $(NVCC),scripts/install_deps.sh --cutlass && $(MAKE) --no-print-directory isa-oracle isa-oracle-mutants,echo "SKIP  isa-oracle: no nvcc")

parity: all ## compare losses and gradient norms with PyTorch, both computed anew
	@[ "$(DEPS)" = 0 ] || scripts/install_deps.sh --torch
	$(PYTHON) scripts/pytorch/parity.py

bench: all $(B)/bench_gemm $(B)/bench_all_reduce ## speed and memory beside PyTorch on this CPU; writes benchmarks/results/, docs/performance.md
	@[ "$(DEPS)" = 0 ] || scripts/install_deps.sh --torch
	OMP_NUM_THREADS=1 $(MPIRUN) -np 2 $(B)/bench_all_reduce
	$(PYTHON) scripts/pytorch/bench_cpu.py
	$(PYTHON) scripts/gpu/performance_page.py

performance-page: ## docs/performance.md and its pictures from benchmarks/results/
	$(PYTHON) scripts/gpu/performance_page.py

readme: all ## README.md's table of keys, which ./train --keys prints
	./train --keys > build/keys.md
	awk '/^\| key \| default/ {system("cat build/keys.md"); old = 1} !/^\|/ {old = 0} !old' README.md > build/README.md
	cp build/README.md README.md

VENV := build/deps/venv/bin
lint: $(B)/train-cpu ## formatting, include directions, README's table of keys, shell scripts, Python (ruff and mypy)
	@[ "$(DEPS)" = 0 ] || scripts/install_deps.sh --lint
	@for tool in ruff mypy; do [ -x $(VENV)/$$tool ] || \
	    { echo "$(VENV)/$$tool is missing; scripts/install_deps.sh --lint installs it" >&2; exit 2; }; done
	@clang-format --dry-run -Werror $(FORMATTED)
	scripts/build/check_includes.sh
	@awk '/^\| key \| default/ {table = 1} !/^\|/ {table = 0} table' README.md | \
	    diff --label README.md --label "./train --keys" -u - <($(B)/train-cpu --keys) || \
	    { echo "README.md's table of keys is out of date: run make readme" >&2; exit 1; }
	shellcheck $$(git ls-files '*.sh' '*.sbatch') .ci/run
	$(VENV)/ruff check
	$(VENV)/mypy --python-executable $(PYTHON)

format: ## rewrite the sources by .clang-format
	clang-format -i $(FORMATTED)

deps:
	@[ "$(DEPS)" = 0 ] || scripts/install_deps.sh

LINK = @echo "link $@"; $(MPICXX) -fopenmp $(SAN) $(filter %.o,$^) $(LIBS) -o $@
COMPILE = @[ -n "$(MPICXX)" ] || { echo "mpicxx not found; run scripts/install_deps.sh first"; exit 2; }; \
          mkdir -p $(@D); echo "compile $<"; $(CCACHE) $(MPICXX) $(CXXFLAGS) -MD -MP
$(B)/train-cpu: $(MAIN:%=$(O)/%.o) $(RUN_OBJ) $(LIB_OBJ); $(LINK)
$(B)/test: $(LIB_OBJ) $(EMU_REST) $(TEST_OBJ) $(EMU_CORE); $(LINK)
$(B)/test_mpi: $(LIB_OBJ) $(EMU_REST) $(MPI_TESTS) $(EMU_MPI_TESTS) $(EMU_CORE); $(LINK)
$(B)/bench_gemm $(B)/bench_all_reduce: $(B)/bench_%: $(O)/bench/bench_%.o $(LIB_OBJ); $(LINK)
COMMIT = -DKILN_COMMIT='"$(shell cat build/commit)"'
$(O)/%.o: %.cpp; $(COMPILE) -c $< -o $@
COMPUTING_TESTS = $(TARGET_TESTS:%.cpp=$(O)/%.o)
ifdef SANITIZE
# ASan checks an address by a call: such code compiles in 10 to 25 % less time than with the check in line, and is slower.
CALLS := --param asan-instrumentation-with-call-threshold=0
# Tests are checked for addresses alone: the checks for undefined behaviour take as long to compile as the tests.  A
# link takes an inline function from the first object that has it.  Product code, checked for both, therefore comes
# first, and the emulator's core, checked for nothing, last.
$(TEST_OBJ) $(MPI_TESTS) $(EMU_HOST_TESTS) $(EMU_MPI_TESTS): SAN = -fsanitize=address -fno-omit-frame-pointer \
    -Wno-maybe-uninitialized $(CALLS)
$(patsubst %,$(O)/%/%.o,bench checkpoint comm common data model run trainer) $(filter-out $(COMPUTING_TESTS),$(TEST_OBJ)): LEVEL = -O0 $(CALLS)
else ifndef DEBUG
$(patsubst %,$(O)/%/%.o,comm kernels/cpu): LEVEL = -O3
$(TEST_OBJ) $(MPI_TESTS): LEVEL = -O0
$(COMPUTING_TESTS) $(EMU_HOST_TESTS): LEVEL = -O1
endif
$(O)/train.o: train.cu build/commit; $(COMPILE) $(COMMIT) -x c++ -c $< -o $@
$(B)/fault_shim.so: test/system/fault_shim.c; $(CC) -shared -fPIC -O1 -Wall -Werror $< -o $@ -ldl

clean: ## remove everything that was built
	rm -rf build train train-emulated
help: ## this list
	@awk -F ' *## *' '/^[a-z-]+:.*## / {sub(/:.*/, "", $$1); printf "  make %-13s %s\n", $$1, $$2} \
	                  /^[A-Z_]+ +\?=.*##/ {sub(/ .*/, "", $$1); printf "  %-18s %s\n", $$1 "=", $$2}' Makefile cuda.mk

.PHONY: all demo test quick test-full parity bench performance-page readme lint format deps clean help
-include $(shell find build -name '*.d' 2>/dev/null)
