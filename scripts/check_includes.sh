#!/bin/bash
# Checks the includes:  train -> model -> comm -> kernels -> common    train -> data -> common    test -> anything
# and the rules by which kernel files parse as plain C++20 (the head of kernels/simt.h):
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
check() {  # folder, then the folders it may include
    local folder=$1 allowed
    shift
    allowed=$(IFS='|'; echo "$*")
    report "$folder/ may include only: $*" "$(
        grep -rnE '^ *# *include "(common|kernels|comm|model|data|test)/' "$folder" |
            grep -vE "include \"($allowed)/" || true
    )"
}
check common common
check kernels kernels common
check comm comm kernels common
check model model comm kernels common
check data data common

only_in() {  # expression of the files that are allowed, the rule, expression of the forbidden text, where to look
    local allowed=$1 what=$2 expression=$3
    shift 3
    report "$what" "$(
        grep -rn '' "$@" --include='*.h' --include='*.cuh' --include='*.cu' --include='*.cpp' | sed -E 's,//.*,,' |
            grep -E "^[^:]*:[0-9]+:.*($expression)" | grep -vE "^($allowed):" || true
    )"
}
SOURCES=(common kernels comm model data ./*.cu ./*.cpp ./*.h)
CUDA_HEADER='# *include [<"](cuda|cublas|cudnn|nccl|nv|cooperative_groups|mma)'
only_in 'kernels/cuda/[^:]*|kernels/[^/:]*\.cuh|kernels/(simt|tensor_map)\.h|comm/nccl\.cpp|common/buf\.h' \
    'only kernels for GPUs and comm/nccl.cpp may include headers of CUDA, cuBLASLt, cuDNN and NCCL:' "$CUDA_HEADER" "${SOURCES[@]}"
only_in 'kernels/(ptx|wgmma)\.cuh' 'inline asm belongs into kernels/ptx.cuh:' '\basm\b|__asm' kernels
only_in 'kernels/simt\.h' 'kernels are launched by simt::launch:' '<<<' kernels
only_in 'kernels/simt\.h' 'shared memory is SIMT_SHARED or SIMT_DYN_SHARED:' '__shared__' kernels
only_in '-' 'no cooperative groups in kernels:' 'cooperative_groups|\bcg::' kernels
only_in '-' 'no printf in kernels:' 'printf *\(' kernels
exit $bad
