#!/bin/bash
# make nccl-versions: compiles comm/nccl.cpp against the headers of the oldest NCCL that kiln supports, and of the
# newest on PyPI: with both ways of excluding NVLS.  Each wheel (some 200 MB) is loaded once; its header stays.
# Usage: scripts/build/check_nccl.sh [VERSION ...]      needs CUDA's headers (CUDA_HOME or /usr/local/cuda)
# Exit code: 0 all compile, 1 one does not, or cannot be loaded.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."
package=nvidia-nccl-cu13
cuda=${CUDA_HOME:-/usr/local/cuda}
[ -x build/deps/venv/bin/pip ] || { mkdir -p build/deps && /usr/bin/python3 -m venv build/deps/venv; }
pip() { build/deps/venv/bin/pip --disable-pip-version-check "$@"; }
if [ $# = 0 ]; then
    newest=$(pip index versions $package 2>/dev/null | sed -n "s/^$package (\(.*\))/\1/p" || true)
    set -- 2.27.7 "${newest:?PyPI names no version of $package}"
fi
for version in "$@"; do
    folder=build/deps/nccl/$version
    if [ ! -e "$folder/nccl.h" ]; then
        mkdir -p "$folder"
        pip download -q --no-deps --only-binary=:all: -d "$folder" "$package==$version"
        /usr/bin/python3 -m zipfile -e "$folder"/*.whl "$folder/wheel"
        mv "$folder/wheel/nvidia/nccl/include/nccl.h" "$folder/"
        rm -r "$folder"/*.whl "$folder/wheel"
    fi
    names="by NCCL_ALGO"
    ! grep -q 'define NCCL_COLLCONFIG_INITIALIZER' "$folder/nccl.h" || names="per call"
    "${MPICXX:-mpicxx.mpich}" -std=c++20 -Wall -Wextra -Werror -Wno-missing-field-initializers -fsyntax-only -I. \
        -I"$folder" -I"$cuda/include" -DKILN_CUDA=1 comm/nccl.cpp
    echo "NCCL $version: comm/nccl.cpp compiles; algorithms are named $names"
done
