# Everything about CUDA: the backend built by nvcc for GPUs, and the same sources built by the host compiler over the
# emulator (emulator/): plain, with sanitizers, and with the race check.  The Makefile includes it.

# ---- by nvcc ----
CUDA_SRC   := $(wildcard kernels/cuda/*.cu kernels/cuda/*.cpp) comm/nccl.cpp
N          := build/$(VARIANT)/obj/cuda# kernels' objects are the same for every CPU
KERNEL_OBJ := $(patsubst %.cu,$(N)/%.o,$(filter %.cu,$(CUDA_SRC)))
CUDA_OBJ   := $(KERNEL_OBJ) $(patsubst %.cpp,$(O)/cuda/%.o,$(filter %.cpp,$(CUDA_SRC)))
TOOLKIT    := $(if $(NVCC),$(abspath $(dir $(realpath $(NVCC)))..))
CUDA_FLAGS := -I$(TOOLKIT)/include -DKILN_CUDA=1
CUDA_LIBS   = -L$(TOOLKIT)/lib64 -Wl,-rpath,$(TOOLKIT)/lib64 $(CUDNN_RPATH) -lnccl -lcudart_static -ldl -lrt -lpthread

# cuDNN, for comparison: a build needs the headers of cuDNN and cudnn-frontend; a program loads the library when asked.
# The headers may be beside nvcc, in /usr, in python's packages, and where scripts/install_deps.sh --cudnn puts them.
PACKAGES   := $(VIRTUAL_ENV:%=%/lib/python3*/site-packages) $(HOME)/.local/lib/python3*/site-packages /usr/local/lib/python3*/*-packages
has_header  = $(patsubst %/include/$(1),%,$(firstword $(wildcard $(2:%=%/include/$(1)))))
CUDNN      ?= $(call has_header,cudnn.h,$(TOOLKIT) /usr $(PACKAGES:%=%/nvidia/cudnn) build/deps/cudnn)## folder with cuDNN 9's include/cudnn.h; 0: without cuDNN
CUDNN_FRONTEND ?= $(call has_header,cudnn_frontend.h,build/deps/cudnn_frontend /usr $(PACKAGES))## folder with cudnn-frontend's include/
CUDNN_MISSING := $(if $(filter 0,$(CUDNN)),make was told CUDNN=0,$(if $(call has_header,cudnn.h,$(CUDNN)),$(if \
                 $(call has_header,cudnn_frontend.h,$(CUDNN_FRONTEND)),,cudnn-frontend's headers were not found),cudnn.h was not found))
CUDNN_FLAGS := $(if $(CUDNN_MISSING),-DKILN_CUDNN_MISSING='"$(subst ','\'',$(CUDNN_MISSING))"',-DKILN_CUDNN=1 \
               $(patsubst %,-I%/include,$(filter-out /usr $(TOOLKIT),$(CUDNN))) $(patsubst %,-isystem %/include,$(filter-out /usr,$(CUDNN_FRONTEND))))
CUDNN_RPATH := $(if $(CUDNN_MISSING),,$(patsubst %,-Wl$(comma)-rpath$(comma)%/lib,$(abspath $(filter-out /usr $(TOOLKIT),$(CUDNN)))))
# FMT_USE_CONSTEXPR: fmt 9 wrongly assumes that nvcc has no constexpr.
NVCC_FLAGS  = -std=c++20 -O3 -lineinfo -I. -DKILN_CUDA=1 -DFMT_USE_CONSTEXPR=1 -Werror all-warnings -Xcompiler -Wall,-fopenmp \
              -Xptxas --warn-on-spills,--warning-as-error,-v $(if $(DEBUG),,-DNDEBUG) \
              $(foreach a,$(ARCH),-gencode arch=compute_$(a),code=sm_$(a)) \
              -gencode arch=compute_$(lastword $(ARCH)),code=compute_$(lastword $(ARCH))
NATIVE     := $(addprefix $(B)/,train test_native test_mpi_native test_isa_native test_isa_sm90_native bench_attention)

gpu-there:
	@KILN_BUILD=$(abspath $(B)) scripts/gpu/gpu_check.py --gpu
gpu-check: gpu-there ## on a machine with a GPU: tests, op times, speed beside PyTorch; STAGE=... chooses
	@$(MAKE) --no-print-directory native
	KILN_BUILD=$(abspath $(B)) scripts/gpu/gpu_check.py

bench-gpu: gpu-there ## on a machine with a GPU: the whole step beside PyTorch, and the goals; writes benchmarks/results/
	@$(MAKE) --no-print-directory native
	KILN_BUILD=$(abspath $(B)) $(PYTHON) scripts/gpu/gpu_check.py --bench; \
	    code=$$?; $(PYTHON) scripts/gpu/performance_page.py && exit $$code

nccl-versions: ## compile kiln's calls of NCCL against the oldest version that it supports and the newest on PyPI
	MPICXX=$(MPICXX) CUDA_HOME=$(TOOLKIT) scripts/build/check_nccl.sh

bundle: ## build/kiln-bundle.tar.zst: all that another machine with a GPU needs
	@$(MAKE) --no-print-directory -j$$(nproc) CPU=x86-64-v3 native
	scripts/build/bundle.sh build/release-x86-64-v3

native: $(NATIVE)

kernel-table: $(KERNEL_OBJ) ## write registers, memory and spills of each kernel into docs/kernels.md
	$(PYTHON) scripts/build/kernel_table.py --logs $(N)
kernel-table-check: $(KERNEL_OBJ)
	$(PYTHON) scripts/build/kernel_table.py --logs $(N) --check
sass-check: $(KERNEL_OBJ) ## check the machine code of the Hopper and the memory-bound kernels; needs a disassembler
	$(PYTHON) scripts/build/sass_check.py --objects $(N)

$(B)/train: $(MAIN:%=$(O)/cuda/%.o) $(RUN_OBJ) $(LIB_OBJ) $(CUDA_OBJ); $(LINK) $(CUDA_LIBS)
$(B)/test_native: $(TEST_OBJ) $(LIB_OBJ) $(CUDA_OBJ); $(LINK) $(CUDA_LIBS)
$(B)/test_mpi_native: $(MPI_TESTS) $(LIB_OBJ) $(CUDA_OBJ); $(LINK) $(CUDA_LIBS)
$(B)/test_isa_native: $(O)/test/main.o $(N)/emulator/test/test_isa.o $(LIB_OBJ); $(LINK) $(CUDA_LIBS)
$(B)/test_isa_sm90_native: $(O)/test/main.o $(N)/sm90/emulator/test/test_isa.o $(LIB_OBJ); $(LINK) $(CUDA_LIBS)
$(B)/bench_attention: $(O)/cuda/bench/bench_attention.o $(LIB_OBJ) $(CUDA_OBJ); $(LINK) $(CUDA_LIBS)
# Clones share nvcc's objects.  In -lineinfo such an object names the folder of the clone that compiled it.
NVCC_CACHE = $(CCACHE:%=env -u CCACHE_DEPEND CCACHE_NOHASHDIR=1 %)
KERNEL = @[ -n "$(NVCC)" ] || { echo "nvcc not found: kernels need the CUDA toolkit (CUDA_HOME); without it: make CUDA=0, make emulated"; exit 2; }; \
         echo "nvcc $<"; scripts/build/nvcc.sh $@ $(NVCC_CACHE) $(NVCC) $(NVCC_FLAGS) -MMD -MP -c $< -o $@
# A change of compiler, ARCH or flags recompiles the kernels.  make -n changes no file.
DRY_RUN := $(findstring n,$(firstword -$(MAKEFLAGS)))
ifndef DRY_RUN
$(shell mkdir -p $(N))$(file >$(N)/flags.new,$(NVCC) $(NVCC_FLAGS))
$(shell cmp -s $(N)/flags.new $(N)/flags || cp $(N)/flags.new $(N)/flags)
endif
$(O)/cuda/%.o: %.cpp; $(COMPILE) $(CUDA_FLAGS) -c $< -o $@
$(N)/%.o: %.cu $(N)/flags; $(KERNEL)
$(N)/%_sm90.o $(N)/sm90/%.o: override ARCH := 90a# uses instructions of this architecture alone
$(N)/sm90/%.o: NVCC_FLAGS += -DKILN_SM90=1
$(N)/sm90/%.o: %.cu; $(KERNEL)
$(O)/cuda/train.o: train.cu build/commit; $(COMPILE) $(CUDA_FLAGS) $(COMMIT) -x c++ -c $< -o $@

# cudnn-frontend's headers are 30,000 lines: no debug information and little optimisation for the file that calls them.
CUDNN_OBJ  := $(O)/cuda/kernels/cuda/attention_cudnn.o
ifndef DRY_RUN
$(shell mkdir -p $(O)/cuda)$(file >$(O)/cuda/cudnn.flags.new,$(CUDNN_FLAGS))
$(shell cmp -s $(O)/cuda/cudnn.flags.new $(O)/cuda/cudnn.flags || cp $(O)/cuda/cudnn.flags.new $(O)/cuda/cudnn.flags)
endif
$(CUDNN_OBJ): $(O)/cuda/cudnn.flags
$(CUDNN_OBJ): CUDA_FLAGS := $(CUDNN_FLAGS) $(CUDA_FLAGS) -O1 -g0

# ---- over the emulator ----
EMU_SRC    := $(CUDA_SRC) $(wildcard emulator/*.cpp)
EMU_OBJ    := $(patsubst %,$(O)/emulated/%.o,$(basename $(EMU_SRC)))
EMU_FLAGS  := -Iemulator/include -DKILN_CUDA=1
# The emulator's core is optimised and uninstrumented in every variant; sanitizer builds poison memory by hand.
EMU_CORE   := $(patsubst %,$(O)/emulated/emulator/%.o,async counters fiber hooks launch memory mma race report scheduler sync tma warpgroup wgmma)
EMU_REST   := $(filter-out $(EMU_CORE),$(EMU_OBJ))
EMU_KERNEL_TESTS := $(wildcard emulator/test/*.cu)
EMU_HOST_TESTS   := $(patsubst %.cpp,$(O)/emulated/%.o,$(wildcard emulator/test/*.cpp))
EMU_TESTS        := $(EMU_HOST_TESTS) $(patsubst %.cu,$(O)/emulated/%.o,$(EMU_KERNEL_TESTS))
EMU_MPI_TESTS    := $(patsubst %.cpp,$(O)/emulated/%.o,$(wildcard emulator/test/mpi/*.cpp))

emulated: $(B)/train-emulated ## build ./train-emulated: the whole GPU program on an emulated GPU
	@ln -sf $(B)/train-emulated train-emulated

$(B)/train-emulated: $(MAIN:%=$(O)/emulated/%.o) $(RUN_OBJ) $(LIB_OBJ) $(EMU_OBJ); $(LINK)
$(B)/test_emulator: $(LIB_OBJ) $(EMU_REST) $(O)/test/main.o $(EMU_TESTS) $(EMU_CORE); $(LINK)
BENCH_EMULATED := $(B)/bench_attention-emulated
$(BENCH_EMULATED): $(O)/emulated/bench/bench_attention.o $(LIB_OBJ) $(EMU_OBJ); $(LINK)
$(EMU_CORE): SAN = $(if $(SANITIZE),-DEMULATOR_ASAN=1)
$(EMU_CORE): EMU_OPT = -O3
$(O)/emulated/%.o: %.cpp; $(COMPILE) $(EMU_FLAGS) $(EMU_OPT) -c $< -o $@
$(O)/emulated/%.o: %.cu; $(COMPILE) $(EMU_FLAGS) $(if $(SANITIZE),,-O2) -x c++ -c $< -o $@
$(O)/emulated/train.o: train.cu build/commit; $(COMPILE) $(EMU_FLAGS) $(COMMIT) -x c++ -c $< -o $@

# The same program and tests with a NCCL whose sums name their algorithms.
NCCL_PER_CALL := $(patsubst %,$(O)/nccl231/%.o,comm/nccl emulator/nccl emulator/nccl_calls emulator/test/mpi/test_nccl)
$(NCCL_PER_CALL): EMU_FLAGS += -DNCCL_STAND_IN_VERSION=23100
$(O)/nccl231/%.o: %.cpp; $(COMPILE) $(EMU_FLAGS) -c $< -o $@
$(B)/test_mpi_nccl231: $(LIB_OBJ) $(filter-out %/nccl.o %/nccl_calls.o,$(EMU_REST)) $(O)/test/mpi/main.o $(O)/test/mpi/yield.o $(NCCL_PER_CALL) $(EMU_CORE); $(LINK)

# ---- with the race check: kernels call the emulator's hooks at every access ----
# Kernels are compiled with -fsanitize=thread and linked without it.  Their objects come last in a link; otherwise the
# whole program would take its std:: templates from these objects.
RACE       := $(B:build/$(VARIANT)%=build/race%)
RACE_FLAGS := $(EMU_FLAGS) -O1 -fsanitize=thread
TO_HOOKS   := $(foreach f,memcpy memmove memset,--redefine-sym $(f)=__tsan_$(f))
RACE_CUDA  := $(patsubst %.cu,$(RACE)/obj/emulated/%.o,$(filter %.cu,$(CUDA_SRC)))
RACE_HOST  := $(filter-out $(patsubst %.cu,$(O)/emulated/%.o,$(filter %.cu,$(CUDA_SRC))),$(EMU_OBJ))
# The race check looks at one launch at a time.  test_trainer and test_gpt2_cuda launch the kernels of a whole step, so
# four other tests of whole steps are left out.
TARGET_TESTS := $(shell grep -lE 'targets\(\)|cuda_backend' $(TEST_SRC))
RACE_SRC   := test/main.cpp $(filter-out test/model/test_cut.cpp test/model/test_session.cpp test/checkpoint/% \
                test/bench/%,$(TARGET_TESTS))
RACE_TESTS := $(RACE)/obj/test/main.o $(RACE)/obj/test/kernels/test_traffic.o \
              $(patsubst %.cpp,$(O)/%.o,$(filter-out test/main.cpp test/kernels/test_traffic.cpp,$(RACE_SRC)))

$(RACE)/test_emulator: $(O)/test/main.o $(LIB_OBJ) $(RACE_HOST) $(RACE_CUDA) $(EMU_KERNEL_TESTS:%.cu=$(RACE)/obj/emulated/%.o); $(LINK)
$(RACE)/test_race: $(RACE_TESTS) $(LIB_OBJ) $(RACE_HOST) $(RACE_CUDA); $(LINK)
$(RACE)/obj/emulated/%.o: %.cu; $(COMPILE) $(RACE_FLAGS) -x c++ -c $< -o $@ && objcopy $(TO_HOOKS) $@
$(RACE)/obj/%.o: %.cpp; $(COMPILE) $(EMU_FLAGS) -O1 -DKILN_RACE=1 -c $< -o $@
# emulator/test/mutate.py writes a copy of the kernels in which barriers can be left out one by one.
build/mutants/test_mutants: $(RACE_TESTS) $(LIB_OBJ) $(RACE_HOST) $(patsubst %.cu,build/mutants/obj/%.o,$(filter %.cu,$(CUDA_SRC))); $(LINK)
build/mutants/obj/%.o: build/mutants/src/%.cu
	$(COMPILE) -iquote build/mutants/src $(RACE_FLAGS) -include left_out.h -x c++ -c $< -o $@ && objcopy $(TO_HOOKS) $@

# ---- kiln's kernels and emulator beside CuTe, the headers of the package nvidia-cutlass ----
CUTLASS  ?= build/deps/cutlass## folder with cute/ and cutlass/
ORACLE   := emulator/test/oracle
P        := $(B)/oracle# PTX and machine code of both sides
ORACLE_TESTS  := $(patsubst %.cu,$(O)/emulated/%.o,$(ORACLE)/wgmma.cu $(wildcard $(ORACLE)/test_*.cu))
ORACLE_CUTE   := $(patsubst %.cpp,$(O)/%.o,$(wildcard $(ORACLE)/cute_*.cpp))
ORACLE_NATIVE := $(if $(NVCC),$(O)/cuda/$(ORACLE)/native_map.o)
CUTE_HEADERS  := -isystem $(CUTLASS) -isystem $(TOOLKIT)/include -isystem $(TOOLKIT)/include/cccl

isa-oracle: $(B)/isa_oracle $(if $(NVCC),$(addprefix $(P)/,kiln.ptx cute.ptx kiln.cubin cute.cubin) $(N)/kernels/cuda/attention_sm90.o) ## kernels' instructions beside CuTe's
	$(B)/isa_oracle
	$(if $(NVCC),$(PYTHON) $(ORACLE)/instructions.py $(P)/kiln.ptx $(P)/cute.ptx,@echo "SKIP  PTX and machine code: no nvcc")
	$(if $(NVCC),$(PYTHON) $(ORACLE)/products.py $(P)/kiln.cubin $(P)/cute.cubin $(N)/kernels/cuda/attention_sm90.o)
isa-oracle-mutants: ## change the emulator and the kernels, one thing at a time: does the oracle notice?
	$(PYTHON) $(ORACLE)/mutants.py

# attention_sm90.cu is a part of test_tiles.cu, which needs a function that is local to that file.
$(B)/isa_oracle: $(LIB_OBJ) $(filter-out %/attention_sm90.o,$(EMU_REST)) $(O)/test/main.o $(ORACLE_TESTS) $(ORACLE_CUTE) $(ORACLE_NATIVE) $(EMU_CORE)
	$(LINK) -Wl,--wrap=_ZN8emulator11wgmma_issueEiPfPKjmmiii
$(ORACLE_TESTS): EMU_FLAGS += -DORACLE_NATIVE=$(if $(NVCC),1,0)
$(O)/$(ORACLE)/%.o: $(ORACLE)/%.cpp | $(CUTLASS)/cute
	$(COMPILE) -O1 -w $(CUTE_HEADERS) -c $< -o $@
$(ORACLE_NATIVE): $(ORACLE)/native_map.cu
	@mkdir -p $(@D); echo "nvcc $<"; $(NVCC_CACHE) $(NVCC) -std=c++20 -O1 -w -arch=sm_90a -I. -DFMT_USE_CONSTEXPR=1 -MMD -MP -c $< -o $@
$(CUTLASS)/cute:
	@[ -n "$(NVCC)" ] || { echo "CuTe needs the headers of the CUDA toolkit, and nvcc was not found (CUDA_HOME)" >&2; exit 2; }
	@[ "$(DEPS)" = 0 ] || scripts/install_deps.sh --cutlass
	@[ -d $@ ] || { echo "$@ is missing; scripts/install_deps.sh --cutlass installs it" >&2; exit 2; }
OF_KILN = -I. -DFMT_USE_CONSTEXPR=1
KILN_HEADERS = $(wildcard kernels/*.cuh kernels/*.h kernels/cuda/*.cuh common/*.h)
OF_CUTE = -DCUTE -DNDEBUG --expt-relaxed-constexpr -I$(CUTLASS) -I.
BY_NVCC = @mkdir -p $(@D); echo "nvcc $< for $(@F)"; $(NVCC_CACHE) $(NVCC) -std=c++20 -w -arch=sm_90a
$(P)/kiln.ptx: $(ORACLE)/instructions.cu $(KILN_HEADERS); $(BY_NVCC) $(OF_KILN) -ptx $< -o $@
$(P)/cute.ptx: $(ORACLE)/instructions.cu | $(CUTLASS)/cute; $(BY_NVCC) $(OF_CUTE) -ptx $< -o $@
$(P)/kiln.cubin: $(ORACLE)/products.cu $(KILN_HEADERS); $(BY_NVCC) $(OF_KILN) -cubin $< -o $@
$(P)/cute.cubin: $(ORACLE)/products.cu | $(CUTLASS)/cute; $(BY_NVCC) $(OF_CUTE) -cubin $< -o $@

removals: ## leave out every barrier and wait of the kernels, one at a time; records the run
	$(PYTHON) emulator/test/mutate.py --record
# Removals in files that changed since the recorded run, and an eighth of the others, chosen by the commit.
removals-changed:
	$(PYTHON) emulator/test/mutate.py --changed --every 8 --first $$((16#$$(git rev-parse --short=6 HEAD)))

# For scripts/install_deps.sh --cudnn.
cudnn-found:
	@echo "cudnn.h=$(call has_header,cudnn.h,$(CUDNN)) cudnn_frontend.h=$(call has_header,cudnn_frontend.h,$(CUDNN_FRONTEND)) "

.PHONY: nccl-versions isa-oracle isa-oracle-mutants removals removals-changed emulated gpu-there gpu-check bench-gpu bundle native kernel-table kernel-table-check sass-check cudnn-found
