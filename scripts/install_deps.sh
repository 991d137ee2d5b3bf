#!/bin/bash
# Installs what kiln needs that is missing.  Debian 12: tested.  Ubuntu 22.04: same names, untested.
# Without root or sudo it prints the exact command and stops.  --torch adds PyTorch, which only `make parity` and `make bench` use.
# --disassembler does nothing but put NVIDIA's cuobjdump and nvdisasm into build/deps/bin, from PyPI: `make sass-check` uses them.
set -euo pipefail

disassembler() {
    local version=13.2.51 to python=${PYTHON:-python3} work
    to=$(cd "$(dirname "$0")/.." && pwd)/build/deps/bin
    [ -x "$to/cuobjdump" ] && [ -x "$to/nvdisasm" ] && return
    "$python" -m pip --version >/dev/null 2>&1 || { echo "$python has no pip: install python3-pip" >&2; return 2; }
    work=$(mktemp -d)
    "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: -d "$work" \
        "nvidia-cuda-cuobjdump==$version" "nvidia-cuda-nvdisasm==$version"
    for wheel in "$work"/*.whl; do "$python" -m zipfile -e "$wheel" "$work"; done
    install -D -m 755 -t "$to" "$work"/nvidia/cu13/bin/{cuobjdump,nvdisasm}
    rm -r "$work"
    echo "$to: cuobjdump and nvdisasm of CUDA $version"
}
if [ "${1:-}" = --disassembler ]; then
    disassembler
    exit
fi

# Build and run; then plots; then tests and development.
packages=(g++ make mpich libmpich-dev libcli11-dev doctest-dev libyaml-cpp-dev libdnnl-dev nlohmann-json3-dev libfmt-dev
          libxxhash-dev python3 python3-matplotlib python3-venv python3-pytest python3-xxhash clang-format shellcheck zstd)
# OpenBLAS: the reference BLAS that PyTorch gets otherwise would make a straw man of it.
[ "${1:-}" = --torch ] && packages+=(python3-torch libopenblas0-openmp)

missing=()
for p in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${Status}' "$p" 2>/dev/null)" = "install ok installed" ] || missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] && exit 0

command="apt-get install -y --no-install-recommends ${missing[*]}"
if [ "$(id -u)" -eq 0 ]; then
    sudo=()
elif command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
    sudo=(sudo)  # asks for the password where a person can type it
else
    echo "kiln needs these packages; run as root, then make again:"
    echo "    apt-get update && $command"
    exit 2
fi
echo "installing (some minutes, without further output): ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
"${sudo[@]}" apt-get update -qq
# shellcheck disable=SC2086
"${sudo[@]}" $command -qq >/dev/null
