# kiln: GPT training in C++.
#   make          build ./train                         make test     everything that can be tested on this machine
#   make demo     from nothing to a trained model,      make help     the other targets, and the switches
#                 a loss curve and generated text
SHELL      := /bin/bash
first       = $(firstword $(foreach c,$(1),$(shell command -v $(c))))
comma      := ,

CPU        ?= native## instruction set for -march=; x86-64-v3 for a binary that moves between machines
SANITIZE   ?=## 1: address and undefined-behaviour sanitizers (C++ tests only)
DEBUG      ?=## 1: -O1, assertions on
CUDA       ?= $(if $(NVCC),1,0)## 0: a ./train for the CPU alone, without nvcc
ARCH       ?= 80 86 89 90a 100## compute capabilities to compile for; the last also as PTX, for later ones
NVCC       ?= $(call first,$(CUDA_HOME:%=%/bin/nvcc) nvcc /usr/local/cuda/bin/nvcc)
DEPS       ?= 1## 0: never look for or install packages
PYTHON     ?= $(call first,/usr/bin/python3 python3)
MPICXX     ?= $(call first,mpicxx.mpich mpicxx)
MPIRUN     ?= $(call first,mpirun.mpich mpirun)
CCACHE     ?= $(call first,ccache)

export MPIRUN PYTHON

VARIANT    := $(if $(SANITIZE),sanitize,$(if $(DEBUG),debug,release))
B          := build/$(VARIANT)$(patsubst %,-%,$(filter-out native,$(CPU)))
O          := $(B)/obj
SAN        := $(if $(SANITIZE),-fsanitize=address$(comma)undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
CXXFLAGS   += -std=c++20 -I. -Wall -Wextra -Werror -Wno-missing-field-initializers -Wno-restrict -fopenmp -g -march=$(CPU) $(SAN) \
              -fno-math-errno -fno-trapping-math $(if $(DEBUG)$(SANITIZE),-O1,-O3 -DNDEBUG)
LIBS       := -ldnnl -lyaml-cpp -lfmt -lxxhash
LIB_SRC    := $(filter-out comm/nccl.cpp,$(wildcard common/*.cpp kernels/*.cpp kernels/cpu/*.cpp model/*.cpp data/*.cpp comm/*.cpp))
LIB_OBJ    := $(LIB_SRC:%.cpp=$(O)/%.o)
# The CUDA backend is compiled twice from the same sources: by nvcc for GPUs, and by the host compiler over the emulator.
CUDA_SRC   := $(wildcard kernels/cuda/*.cu) comm/nccl.cpp
N          := build/$(VARIANT)/obj/cuda# kernels' objects are the same for every CPU
KERNEL_OBJ := $(patsubst %.cu,$(N)/%.o,$(filter %.cu,$(CUDA_SRC)))
CUDA_OBJ   := $(KERNEL_OBJ) $(O)/cuda/comm/nccl.o
EMU_SRC    := $(CUDA_SRC) $(wildcard test/emulator/*.cpp)
EMU_OBJ    := $(patsubst %,$(O)/emulated/%.o,$(basename $(EMU_SRC)))
EMU_FLAGS  := -Itest/emulator/include -DKILN_CUDA=1
# The emulator's core is fast in every variant and never instrumented: in a sanitizer build it poisons by hand.
EMU_CORE   := $(patsubst %,$(O)/emulated/test/emulator/%.o,async counters fiber hooks launch memory mma race report scheduler sync tma wgmma)
# The race check: kernels call the emulator's hooks at every access.  They are compiled with -fsanitize=thread and linked
# without it; they come last in a link, or std:: templates would be taken from them for the whole program.
RACE       := $(B:build/$(VARIANT)%=build/race%)
RACE_CUDA  := $(patsubst %.cu,$(RACE)/obj/emulated/%.o,$(filter %.cu,$(CUDA_SRC)))
RACE_HOST  := $(filter-out $(patsubst %.cu,$(O)/emulated/%.o,$(filter %.cu,$(CUDA_SRC))),$(EMU_OBJ))
RACE_TESTS := $(patsubst %.cpp,$(RACE)/obj/%.o,test/main.cpp $(shell grep -l 'targets()' test/*.cpp))
TO_HOOKS   := $(foreach f,memcpy memmove memset,--redefine-sym $(f)=__tsan_$(f))
EMU_TESTS  := $(wildcard test/emulator/test/*.cu)
TOOLKIT    := $(if $(NVCC),$(abspath $(dir $(realpath $(NVCC)))..))
CUDA_FLAGS := -I$(TOOLKIT)/include -DKILN_CUDA=1
CUDA_LIBS  := -L$(TOOLKIT)/lib64 -Wl,-rpath,$(TOOLKIT)/lib64 -lcublasLt -lnccl -lcudart_static -ldl -lrt -lpthread
# FMT_USE_CONSTEXPR: fmt 9 takes nvcc for a compiler without constexpr.
NVCC_FLAGS  = -std=c++20 -O3 -lineinfo -I. -DKILN_CUDA=1 -DFMT_USE_CONSTEXPR=1 -Werror all-warnings -Xcompiler -Wall,-fopenmp \
              -Xptxas --warn-on-spills,--warning-as-error,-v $(if $(DEBUG),,-DNDEBUG) \
              $(foreach a,$(ARCH),-gencode arch=compute_$(a),code=sm_$(a)) \
              -gencode arch=compute_$(lastword $(ARCH)),code=compute_$(lastword $(ARCH))
MAIN       := train training_run run_device
TESTS      := $(addprefix $(B)/,test test_emulator test_mpi) \
              $(if $(SANITIZE),,all emulated $(RACE)/test_emulator $(RACE)/test_race $(B)/bench_ops-emulated $(B)/fault_shim.so)
TEST_OBJ   := $(patsubst %.cpp,$(O)/%.o,$(wildcard test/*.cpp))
FORMATTED  := $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' 2>/dev/null)
$(shell mkdir -p build; c=$$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown); \
        [ "$$c" = "$$(cat build/commit 2>/dev/null)" ] || echo $$c > build/commit)

all: $(B)/train ## build ./train
	@ln -sf $(B)/train train

emulated: $(B)/train-emulated ## build ./train-emulated: the whole GPU program on an emulated GPU
	@ln -sf $(B)/train-emulated train-emulated

demo: deps ## prepare text, train about 90 seconds on 2 ranks, plot, generate
	@$(MAKE) --no-print-directory -j$$(nproc) all
	scripts/demo.sh $(DEMO_ARGS)

test: deps ## all tests; the last line is "N passed, N failed"
	@$(MAKE) --no-print-directory -j$$(nproc) $(TESTS)
	$(PYTHON) test/run.py --build $(B) --mpirun $(MPIRUN) $(if $(SANITIZE),--no-system,--race $(RACE))

parity: all ## losses and gradient norms against PyTorch, made afresh
	@[ "$(DEPS)" = 0 ] || scripts/install_deps.sh --torch
	$(PYTHON) scripts/parity.py

bench: all $(B)/bench_gemm ## speed and memory beside PyTorch on this CPU; writes benchmarks/results/
	@[ "$(DEPS)" = 0 ] || scripts/install_deps.sh --torch
	$(PYTHON) scripts/bench_cpu.py

NATIVE     := $(addprefix $(B)/,train test_native test_mpi_native test_isa_native test_isa_sm90_native bench_ops)
gpu-check: $(NATIVE) ## on a machine with a GPU: tests, op times, speed beside PyTorch; STAGE=... chooses
	KILN_BUILD=$(abspath $(B)) scripts/gpu_check.sh

bundle: ## build/kiln-bundle.tar.zst: all that another machine with a GPU needs
	@$(MAKE) --no-print-directory -j$$(nproc) CPU=x86-64-v3 native
	scripts/bundle.sh build/release-x86-64-v3

native: $(NATIVE)

kernel-table: $(KERNEL_OBJ) ## registers, memory and spills of each kernel into docs/kernels.md
	$(PYTHON) scripts/kernel_table.py --logs $(N)
kernel-table-check: $(KERNEL_OBJ)
	$(PYTHON) scripts/kernel_table.py --logs $(N) --check

lint: ## formatting, include directions, shell scripts
	@clang-format --dry-run -Werror $(FORMATTED)
	scripts/check_includes.sh
	shellcheck $$(git ls-files '*.sh') .ci/run

format: ## rewrite the sources by .clang-format
	clang-format -i $(FORMATTED)

deps:
	@[ "$(DEPS)" = 0 ] || scripts/install_deps.sh

LINK = @echo "link $@"; $(MPICXX) -fopenmp $(SAN) $(filter %.o,$^) $(LIBS) -o $@
COMPILE = @[ -n "$(MPICXX)" ] || { echo "mpicxx not found; run scripts/install_deps.sh first"; exit 2; }; \
          mkdir -p $(@D); echo "compile $<"; $(CCACHE) $(MPICXX) $(CXXFLAGS) -MMD -MP
ifeq ($(CUDA),1)
$(B)/train: $(MAIN:%=$(O)/cuda/%.o) $(LIB_OBJ) $(CUDA_OBJ); $(LINK) $(CUDA_LIBS)
else
$(B)/train: $(MAIN:%=$(O)/%.o) $(LIB_OBJ); $(LINK)
endif
$(B)/train-emulated: $(MAIN:%=$(O)/emulated/%.o) $(LIB_OBJ) $(EMU_OBJ); $(LINK)
$(B)/test: $(TEST_OBJ) $(LIB_OBJ) $(EMU_OBJ); $(LINK)
$(B)/test_mpi: $(patsubst %.cpp,$(O)/%.o,$(wildcard test/mpi/*.cpp)) $(patsubst %.cpp,$(O)/emulated/%.o,$(wildcard test/emulator/mpi/*.cpp)) $(LIB_OBJ) $(EMU_OBJ); $(LINK)
$(B)/test_emulator: $(O)/test/main.o $(patsubst %,$(O)/emulated/%.o,$(basename $(EMU_TESTS) $(wildcard test/emulator/test/*.cpp))) $(LIB_OBJ) $(EMU_OBJ); $(LINK)
$(RACE)/test_emulator: $(O)/test/main.o $(LIB_OBJ) $(RACE_HOST) $(RACE_CUDA) $(EMU_TESTS:%.cu=$(RACE)/obj/emulated/%.o); $(LINK)
$(RACE)/test_race: $(RACE_TESTS) $(LIB_OBJ) $(RACE_HOST) $(RACE_CUDA); $(LINK)
# test/emulator/mutate.py writes a copy of the kernels whose barriers can be left out one by one.
build/mutants/test_mutants: $(RACE_TESTS) $(LIB_OBJ) $(RACE_HOST) $(patsubst %.cu,build/mutants/obj/%.o,$(filter %.cu,$(CUDA_SRC))); $(LINK)
$(B)/test_native: $(TEST_OBJ) $(LIB_OBJ) $(CUDA_OBJ); $(LINK) $(CUDA_LIBS)
$(B)/test_mpi_native: $(patsubst %.cpp,$(O)/%.o,$(wildcard test/mpi/*.cpp)) $(LIB_OBJ) $(CUDA_OBJ); $(LINK) $(CUDA_LIBS)
$(B)/test_isa_native: $(O)/test/main.o $(N)/test/emulator/test/test_isa.o $(LIB_OBJ); $(LINK) $(CUDA_LIBS)
$(B)/test_isa_sm90_native: $(O)/test/main.o $(N)/sm90/test/emulator/test/test_isa.o $(LIB_OBJ); $(LINK) $(CUDA_LIBS)
$(B)/bench_gemm: $(O)/test/bench/gemm.o $(LIB_OBJ); $(LINK)
$(B)/bench_ops-emulated: $(O)/emulated/test/bench/ops.o $(LIB_OBJ) $(EMU_OBJ); $(LINK)
$(B)/bench_ops: $(O)/cuda/test/bench/ops.o $(LIB_OBJ) $(CUDA_OBJ); $(LINK) $(CUDA_LIBS)
COMMIT = -DKILN_COMMIT='"$(shell cat build/commit)"'
$(O)/%.o: %.cpp; $(COMPILE) -c $< -o $@
# What ptxas says of each kernel stays beside the object, for scripts/kernel_table.py; anything else is shown.
KERNEL = @mkdir -p $(@D); echo "nvcc $<"; $(NVCC) $(NVCC_FLAGS) -MMD -MP -c $< -o $@ >$@.ptxas 2>&1; code=$$?; \
         grep -vE '^ptxas info|bytes stack frame' $@.ptxas >&2; exit $$code
$(N)/%.o: %.cu; $(KERNEL)
$(N)/sm90/%.o: override ARCH := 90a
$(N)/sm90/%.o: NVCC_FLAGS += -DKILN_SM90=1
$(N)/sm90/%.o: %.cu; $(KERNEL)
$(O)/cuda/%.o: %.cpp; $(COMPILE) $(CUDA_FLAGS) -c $< -o $@
$(EMU_CORE): SAN = $(if $(SANITIZE),-DEMULATOR_ASAN=1)
$(EMU_CORE): EMU_OPT = -O3
$(O)/emulated/%.o: %.cu; $(COMPILE) $(EMU_FLAGS) $(if $(SANITIZE),,-O2) -x c++ -c $< -o $@
$(O)/emulated/%.o: %.cpp; $(COMPILE) $(EMU_FLAGS) $(EMU_OPT) -c $< -o $@
RACE_FLAGS := $(EMU_FLAGS) -O1 -fsanitize=thread
$(RACE)/obj/emulated/%.o: %.cu; $(COMPILE) $(RACE_FLAGS) -x c++ -c $< -o $@ && objcopy $(TO_HOOKS) $@
build/mutants/obj/%.o: build/mutants/src/%.cu
	$(COMPILE) -iquote build/mutants/src $(RACE_FLAGS) -include left_out.h -x c++ -c $< -o $@ && objcopy $(TO_HOOKS) $@
$(RACE)/obj/%.o: %.cpp; $(COMPILE) $(EMU_FLAGS) -O1 -DKILN_RACE=1 -c $< -o $@
$(O)/train.o: train.cu build/commit; $(COMPILE) $(COMMIT) -x c++ -c $< -o $@
$(O)/cuda/train.o: train.cu build/commit; $(COMPILE) $(CUDA_FLAGS) $(COMMIT) -x c++ -c $< -o $@
$(O)/emulated/train.o: train.cu build/commit; $(COMPILE) $(EMU_FLAGS) $(COMMIT) -x c++ -c $< -o $@
$(B)/fault_shim.so: test/system/fault_shim.c; $(CC) -shared -fPIC -O1 -Wall -Werror $< -o $@ -ldl

clean: ## remove everything that was built
	rm -rf build train train-emulated
help: ## this list
	@awk -F ' *## *' '/^[a-z-]+:.*## / {sub(/:.*/, "", $$1); printf "  make %-13s %s\n", $$1, $$2} \
	                  /^[A-Z]+ +\?=.*##/ {sub(/ .*/, "", $$1); printf "  %-18s %s\n", $$1 "=", $$2}' Makefile

.PHONY: all emulated demo test parity bench gpu-check bundle native kernel-table kernel-table-check lint format deps clean help
-include $(shell find build -name '*.d' 2>/dev/null)
