#!/bin/bash
# Installs what kiln needs that is missing.  Debian 12: tested.  Ubuntu 22.04: same names, untested.
# Without root or sudo it prints the exact command and stops.
# Usage: scripts/install_deps.sh [--torch] [--cudnn] [--lint] [--disassembler] [--cutlass]
#   --torch           also PyTorch, which only `make parity` and `make bench` use
#   --cudnn           also the headers through which attention on a GPU can be compared with cuDNN's, from PyPI into
#                     build/deps, and cuDNN 9 itself (some 400 MB) where make finds no cudnn.h
#   --lint            also ruff and mypy, from PyPI into build/deps/venv: `make lint` uses them
#   --disassembler    also NVIDIA's cuobjdump and nvdisasm, from PyPI into build/deps/bin: `make sass-check` uses them
#   --cutlass         also the headers of CUTLASS and CuTe, from PyPI into build/deps: `make isa-oracle` uses them
# Exit code: 0 all is there, 1 a download or installation failed, 2 usage, or packages that only root can install.
set -euo pipefail
self=$(readlink -f "${BASH_SOURCE[0]}")
cd "$(dirname "$self")/.."
ruff=0.17.6 mypy=2.4.1  # versions: others find other things
torch=0 cudnn=0 lint=0 disassembler=0 cutlass=0
for option in "$@"; do
    case $option in
        --torch) torch=1 ;;
        --cudnn) cudnn=1 ;;
        --lint) lint=1 ;;
        --disassembler) disassembler=1 ;;
        --cutlass) cutlass=1 ;;
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$self"; exit 0 ;;
        *) echo "usage: scripts/install_deps.sh [--torch] [--cudnn] [--lint] [--disassembler] [--cutlass]" >&2; exit 2 ;;
    esac
done

# Build and run; then plots; then tests and development.
packages=(g++ make mpich libmpich-dev libcli11-dev doctest-dev libyaml-cpp-dev libdnnl-dev nlohmann-json3-dev libfmt-dev
          libxxhash-dev python3 python3-matplotlib python3-venv python3-pytest python3-pytest-xdist python3-xxhash
          clang-format shellcheck ccache zstd iproute2 python3-yaml)
# OpenBLAS: with the reference BLAS, which comes otherwise, PyTorch would be too slow for a fair comparison.
[ $torch = 0 ] || packages+=(python3-torch libopenblas0-openmp)

install_packages() {
    local command sudo
    command="apt-get install -y --no-install-recommends $*"
    if [ "$(id -u)" -eq 0 ]; then
        sudo=()
    elif command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
        sudo=(sudo)  # asks for the password where a person can type it
    else
        echo "kiln needs these packages; run as root, then make again:"
        echo "    apt-get update && $command"
        exit 2
    fi
    echo "installing (some minutes, without further output): $*"
    export DEBIAN_FRONTEND=noninteractive
    "${sudo[@]}" apt-get update -qq
    # shellcheck disable=SC2086
    "${sudo[@]}" $command -qq >/dev/null
}
missing=()
for p in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${Status}' "$p" 2>/dev/null)" = "install ok installed" ] || missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"

pip() {
    [ -x build/deps/venv/bin/pip ] || /usr/bin/python3 -m venv build/deps/venv
    build/deps/venv/bin/pip --disable-pip-version-check "$@"
}
unpack() {  # package==version, path in the wheel, where that path goes
    local wheels
    wheels=$(mktemp -d build/deps/.wheels.XXXXXX)
    pip download -q --no-deps --only-binary=:all: -d "$wheels" "$1"
    /usr/bin/python3 -m zipfile -e "$wheels"/*.whl "$wheels/all"
    mkdir -p "$(dirname "$3")"
    rm -rf "$3"
    mv "$wheels/all/$2" "$3"
    rm -rf "$wheels"
    echo "$1 is in $3"
}
mkdir -p build/deps/bin
if [ $cudnn = 1 ]; then
    found=$(make --no-print-directory DEPS=0 cudnn-found)  # where make looks
    [[ $found != *"cudnn_frontend.h= "* ]] || unpack nvidia-cudnn-frontend==1.18.0 include build/deps/cudnn_frontend/include
    [[ $found != *"cudnn.h= "* ]] || unpack nvidia-cudnn-cu13==9.19.0.56 nvidia/cudnn build/deps/cudnn
fi
if [ $lint = 1 ]; then
    installed=$(cd build/deps/venv/bin 2>/dev/null && ./ruff --version 2>/dev/null && ./mypy --version 2>/dev/null) || true
    if [[ $installed != "ruff $ruff"*"mypy $mypy "* ]]; then
        pip install -q "ruff==$ruff" "mypy==$mypy"
        echo "ruff $ruff and mypy $mypy are in build/deps/venv/bin"
    fi
fi
if [ $disassembler = 1 ]; then
    for tool in cuobjdump nvdisasm; do
        [ -x build/deps/bin/$tool ] || unpack nvidia-cuda-$tool==13.2.51 nvidia/cu13/bin/$tool build/deps/bin/$tool
        chmod +x build/deps/bin/$tool
    done
fi
if [ $cutlass = 1 ]; then
    [ -d build/deps/cutlass ] || unpack nvidia-cutlass==4.2.0.0 cutlass_library/source/include build/deps/cutlass
fi
