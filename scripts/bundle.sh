#!/bin/bash
# make bundle: everything that a GPU machine needs of kiln in one archive, build/kiln-bundle.tar.zst (.tar.xz where zstd
# is missing here, or with FORMAT=xz). The other machine needs x86-64 Linux with the glibc that README.txt in it names, an
# NVIDIA driver, and CUDA 13's libraries; python3 for scripts/gpu_check.sh.
# Usage: scripts/bundle.sh BUILD_FOLDER [FOLDER_OF_THE_ARCHIVE]     (build/release-x86-64-v3: not tied to this CPU)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=${1:?usage: scripts/bundle.sh BUILD_FOLDER [FOLDER_OF_THE_ARCHIVE]}
out=${2:-build}
limit_mb=${LIMIT_MB:-60}
programs=(train test_native test_mpi_native test_isa_native test_isa_sm90_native bench_ops)
launcher=${HYDRA:-$(command -v mpiexec.hydra)} || { echo "mpiexec.hydra (MPICH) not found" >&2; exit 2; }
top=$out/kiln-bundle

# From the machine, never from the bundle: glibc, whose parts must match its kernel and each other, the driver, CUDA.
not_ours='^(ld-linux.*|lib(c|m|dl|rt|pthread|resolv|util|anl|mvec|nsl|nss_.*|thread_db|BrokenLocale|cuda|nvidia.*|cudart|cublas|cublasLt|nccl|nvrtc|nvJitLink))\.so'

# Libraries that a program or library loads, transitively: "name path" per line.
closure() {
    local listed
    listed=$(ldd "$1")
    if grep "not found" <<<"$listed" | grep -vqE "lib(cuda|cublasLt|nccl)\.so"; then
        echo "$1: $(grep "not found" <<<"$listed")" >&2
        return 1
    fi
    awk '$2 == "=>" && $3 ~ /^\// {print $1, $3}' <<<"$listed" | { grep -vE "$not_ours" || true; }
}

rm -rf "$top"
mkdir -p "$top"/{bin,libexec,lib/ucx,scripts,configs}
files=()
for program in "${programs[@]}"; do
    [ -x "$build/$program" ] || { echo "$build/$program is missing; make bundle builds it" >&2; exit 2; }
    cp "$build/$program" "$top/libexec/"
    files+=("$build/$program")
done
# mpiexec.hydra starts hydra_pmi_proxy from its own folder.
cp -L "$launcher" "$top/libexec/mpiexec.hydra"
cp -L "$(dirname "$launcher")/hydra_pmi_proxy" "$top/libexec/"
files+=("$top"/libexec/mpiexec.hydra "$top"/libexec/hydra_pmi_proxy)

needed=$(for f in "${files[@]}"; do closure "$f"; done | sort -u)
while read -r name path; do
    cp -L "$path" "$top/lib/$name"
    # UCX loads its transports from ucx/ beside itself; of those in files of their own only cma stays within one host.
    if [ "$name" = libucs.so.0 ] && [ -e "$(dirname "$path")/ucx/libuct_cma.so.0" ]; then
        cp -L "$(dirname "$path")/ucx/libuct_cma.so.0" "$top/lib/ucx/"
    fi
done <<<"$needed"
# -lineinfo is device code's and stays.
find "$top/libexec" "$top/lib" -type f -exec strip --strip-debug {} + 2>/dev/null

cat >"$top/bin/run" <<'END'
#!/bin/bash
# Starts the program of libexec/ that has the name of this link, with the bundle's libraries and the machine's CUDA.
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd) || exit 2
name=$(basename "$0")
[ "$name" != mpirun ] || name=mpiexec.hydra
if [ -z "${KILN_CUDA_LIBRARIES+set}" ]; then  # ranks have it from their mpirun
    KILN_CUDA_LIBRARIES=$("$here/scripts/cuda_libraries.sh")
fi
export KILN_CUDA_LIBRARIES
export LD_LIBRARY_PATH="$here/lib${KILN_CUDA_LIBRARIES:+:$KILN_CUDA_LIBRARIES}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$here/libexec/$name" "$@"
END
chmod +x "$top/bin/run"
for name in "${programs[@]}" mpirun; do ln -s run "$top/bin/$name"; done
ln -s bin/train bin/mpirun "$top/"
cp scripts/{gpu_check.sh,gpu_check.py,gpu_stages.py,cuda_libraries.sh,bench_pytorch.py,gpt2_torch.py,prepare_data.py} "$top/scripts/"
cp configs/*.yaml "$top/configs/"
cp LICENSE "$top/"
{ cat build/commit 2>/dev/null || echo unknown; } >"$top/commit"

glibc=$(find "$top/libexec" "$top/lib" -type f -exec objdump -T {} + 2>/dev/null | grep -oE 'GLIBC_2\.[0-9]+' | sort -uV | tail -1)
cat >"$top/README.txt" <<END
kiln $(cat "$top/commit"): programs for an x86-64 Linux machine with an NVIDIA GPU.

Needed there: an x86-64-v3 CPU (AVX2), glibc ${glibc#GLIBC_} or newer (ldd --version), the NVIDIA driver for CUDA 13, and
CUDA 13's libcublasLt.so.13 and libnccl.so.2: found through CUDA_HOME, LD_LIBRARY_PATH, /usr/local/cuda or python3's
nvidia-* packages. Everything else is in lib/.

    scripts/gpu_check.sh                          tests, op times, speed beside PyTorch; needs python3 (its head lists stages)
    ./train --config configs/demo.yaml --help     ./mpirun -np 2 ./train --config configs/demo.yaml
END

rm -f "$top".tar.zst "$top".tar.xz
# The programs share the kernels' code: a window over several of them stores it once.
pack=(tar --sort=name --owner=0 --group=0 --numeric-owner -C "$out" -c kiln-bundle)
if [ "${FORMAT:-zst}" = zst ] && command -v zstd >/dev/null; then
    archive=$top.tar.zst
    "${pack[@]}" | zstd -q -T0 "-${LEVEL:-15}" --long=27 -o "$archive"
else
    archive=$top.tar.xz
    "${pack[@]}" | xz -T0 "--lzma2=preset=${LEVEL:-6},dict=128MiB" >"$archive"
fi
size=$(stat -c %s "$archive")
echo "$archive: $((size / 1000000)).$((size / 100000 % 10)) MB, unpacked $(du -sm "$top" | cut -f1) MiB, needs glibc ${glibc#GLIBC_}"
if [ "$size" -ge $((limit_mb * 1000000)) ]; then
    echo "$archive is over its limit of $limit_mb MB; its largest files:" >&2
    find "$top" -type f -printf '%s %P\n' | sort -rn | head -5 >&2
    exit 1
fi
