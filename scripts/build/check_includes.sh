#!/bin/bash
# Checks the source's includes.  Who may include whom:
#   train.cu -> run -> trainer, checkpoint, bench -> model, comm -> kernels -> common    run -> data -> common
#   emulator -> kernels, common    tests, and the programs bench/bench_*.cpp -> anything
# No header includes itself through others.  (Not checked in emulator/, whose includes are relative.)
# Headers of kernels/cpu and kernels/cuda belong to the ops there.
# Rules that keep kernel files parsing as plain C++20 (they stand at the head of kernels/simt.h):
#   headers of CUDA, cuBLASLt, cuDNN and NCCL only in kernels/*.cuh, kernels/simt.h, kernels/tensor_map.h, kernels/cuda/
#   and comm/nccl.cpp, and for bf16 in common/buf.h; in kernels/, inline asm only in ptx.cuh and wgmma.cuh, <<<>>> and
#   __shared__ only in simt.h, cooperative groups and printf nowhere.  Comments do not count.
# Prints every line that breaks a rule, and fails if there is one.
set -euo pipefail
bad=0
report() {  # the rule, then the lines that break it
    [ -z "$2" ] && return
    echo "$1"
    echo "$2"
    bad=1
}
ROOMS='bench|checkpoint|comm|common|data|emulator|kernels|model|run|test|trainer'
check() {  # folder or file, then the folders it may include
    local from=$1 allowed
    shift
    allowed=$(IFS='|'; echo "$*")
    report "$from may include only: $*" "$(
        find "$from" -name '*.[ch]' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' |
            grep -vE '^(emulator/test/|bench/bench_)' |
            xargs grep -nHE "^ *# *include \"($ROOMS)/" | grep -vE "include \"($allowed)/" || true
    )"
}
check common common
check kernels kernels common
check emulator emulator kernels common
check comm comm kernels common
check model model kernels common
check checkpoint checkpoint model kernels common
check trainer trainer model comm kernels common
check bench bench trainer model comm kernels common
check data data common
check run run trainer checkpoint bench data model comm kernels common
check train.cu run trainer checkpoint bench data model comm kernels common

headers=$(git ls-files '*.h' '*.cuh' | grep -v '^emulator/')
report "no header may include itself through others:" "$(
    # shellcheck disable=SC2086
    grep -HE '^ *# *include "' $headers | sed -E 's,^([^:]*):.*"([^"]*)".*,\1 \2,' | tsort 2>&1 >/dev/null || true
)"

only_in() {  # the files that may have it (an expression), what it is, its expression, where to look
    local allowed=$1 what=$2 expression=$3
    shift 3
    report "$what" "$(
        grep -rn '' "$@" --include='*.h' --include='*.cuh' --include='*.cu' --include='*.cpp' | sed -E 's,//.*,,' |
            grep -E "^[^:]*:[0-9]+:.*($expression)" | grep -vE "^($allowed):" || true
    )"
}
SOURCES=(common kernels comm model trainer checkpoint data bench run train.cu)
CUDA_HEADER='# *include [<"](cuda|cublas|cudnn|nccl|nv|cooperative_groups|mma)'
only_in 'kernels/cuda/[^:]*|kernels/[^/:]*\.cuh|kernels/(simt|tensor_map)\.h|comm/nccl\.cpp|common/buf\.h' \
    'only kernels for GPUs and comm/nccl.cpp may include headers of CUDA, cuBLASLt, cuDNN and NCCL:' "$CUDA_HEADER" "${SOURCES[@]}"
only_in 'kernels/cuda/[^:]*\.cuh?|kernels/[^/:]*\.cuh|kernels/tensor_map\.h|kernels/cuda/launch\.h' \
    'only files of kernels include simt.h; the others need cuda.h alone:' 'include "kernels/simt\.h"' kernels
only_in 'kernels/cuda/[^:]*|bench/bench_attention\.cpp' 'kernels for GPUs alone include headers of kernels/cuda:' \
    'include "kernels/cuda/' "${SOURCES[@]}"
only_in 'kernels/cpu/[^:]*|bench/bench_gemm\.cpp' 'ops on CPUs alone include headers of kernels/cpu:' \
    'include "kernels/cpu/' "${SOURCES[@]}"
only_in 'kernels/(ptx|wgmma)\.cuh' 'inline asm belongs into kernels/ptx.cuh:' '\basm\b|__asm' kernels
only_in 'kernels/simt\.h' 'kernels are launched by simt::launch:' '<<<' kernels
only_in 'kernels/simt\.h' 'shared memory is SIMT_SHARED or SIMT_DYN_SHARED:' '__shared__' kernels
only_in '-' 'no cooperative groups in kernels:' 'cooperative_groups|\bcg::' kernels
only_in '-' 'no printf in kernels:' 'printf *\(' kernels
exit $bad
