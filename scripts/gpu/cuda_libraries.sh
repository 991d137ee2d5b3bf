#!/bin/bash
# Prints the folders of CUDA 13's libcublasLt, of NCCL, and of cuDNN 9 where it is there, joined by colons, as
# LD_LIBRARY_PATH wants them.
# Looks for each library in CUDA_HOME, LD_LIBRARY_PATH, the loader's own list, beside nvcc, in /usr/local/cuda*, and in
# python3's nvidia-* packages; the first folder that has the library counts. A library that is nowhere is named on
# stderr, and the exit code is 1; cuDNN may be missing: it only serves for comparison.
# KILN_CUDA_SYSTEM=DIR:DIR (may be empty) stands in for the loader's list and /usr/local/cuda*.
set -uo pipefail

python_folders() {
    python3 2>/dev/null - <<'END'
import glob, sys
for path in sys.path:
    print(*sorted(glob.glob(path + "/nvidia/*/lib")), sep="\n")
END
}

folder_of() {  # library: prints its folder
    local name=$1 dir listed nvcc
    local -a places=() system=()
    [ -z "${CUDA_HOME:-}" ] || places+=("$CUDA_HOME/lib64" "$CUDA_HOME/lib" "$CUDA_HOME/targets/x86_64-linux/lib")
    while IFS= read -r -d : dir; do [ -z "$dir" ] || places+=("$dir"); done <<<"${LD_LIBRARY_PATH:-}:"
    if [ -z "${KILN_CUDA_SYSTEM+set}" ]; then
        listed=$(PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null |
                 awk -v n="$name" '$1 == n && /x86-64/ {print $NF; exit}')
        [ -z "$listed" ] || places+=("${listed%/*}")
        system=(/usr/local/cuda/lib64 /usr/local/cuda-13*/lib64)
    else
        IFS=: read -ra system <<<"$KILN_CUDA_SYSTEM"
    fi
    ! nvcc=$(command -v nvcc) || places+=("$(dirname "$(readlink -f "$nvcc")")/../lib64")
    places+=("${system[@]}")
    for dir in "${places[@]}"; do
        [ ! -e "$dir/$name" ] || { echo "$dir"; return 0; }
    done
    while IFS= read -r dir; do
        [ -z "$dir" ] || [ ! -e "$dir/$name" ] || { echo "$dir"; return 0; }
    done < <(python_folders)
    echo "$name not found: set CUDA_HOME or LD_LIBRARY_PATH, or install the nvidia-* Python packages" >&2
    return 1
}

code=0 folders=
for library in libcublasLt.so.13 libnccl.so.2 libcudnn.so.9; do
    if [ $library = libcudnn.so.9 ]; then
        dir=$(folder_of $library 2>/dev/null) || continue
    elif ! dir=$(folder_of $library); then
        code=1
        continue
    fi
    case ":$folders:" in *":$dir:"*) ;; *) folders=${folders:+$folders:}$dir ;; esac
done
echo "$folders"
exit $code
