#!/bin/bash
# make bundle: everything that a GPU machine needs of kiln in one archive. The GPU machine must have x86-64 Linux with
# the glibc and the CPU that the archive's README.txt names, an NVIDIA driver, and CUDA 13's libraries; python3 for
# scripts/gpu/gpu_check.py.
# Usage: scripts/build/bundle.sh BUILD_FOLDER [ARCHIVE]
#   BUILD_FOLDER   build/release-x86-64-v3, or build/release, whose programs are tied to this machine's CPU
#   ARCHIVE        *.tar.zst or *.tar.xz; build/kiln-bundle.tar.zst, or .tar.xz where zstd is missing here
# Exit code: 0 packed, 1 over LIMIT_MB or a library is missing, 2 usage, or kernels or programs that are not all there.
set -euo pipefail
self=$(readlink -f "${BASH_SOURCE[0]}")
cd "$(dirname "$self")/../.."
usage="usage: scripts/build/bundle.sh BUILD_FOLDER [ARCHIVE.tar.zst|ARCHIVE.tar.xz]"
[[ ${1:-} != -h && ${1:-} != --help ]] || { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$self"; exit 0; }
[ $# -eq 1 ] || [ $# -eq 2 ] || { echo "$usage" >&2; exit 2; }
build=${1%/}
archive=${2:-build/kiln-bundle.tar.$(command -v zstd >/dev/null && echo zst || echo xz)}
architectures="80 86 89 90a 100"
limit_mb=${LIMIT_MB:-60}
case $archive in
    *.tar.zst) command -v zstd >/dev/null || { echo "zstd not found: name an archive *.tar.xz" >&2; exit 2; } ;;
    *.tar.xz) ;;
    *) echo "$usage" >&2; exit 2 ;;
esac
programs=(train test_native test_mpi_native test_isa_native test_isa_sm90_native bench_attention)
launcher=${HYDRA:-$(command -v mpiexec.hydra)} || { echo "mpiexec.hydra (MPICH) not found" >&2; exit 2; }

# Not packed, as the GPU machine has its own: glibc, whose parts must match its kernel and each other, the driver, CUDA.
not_ours='^(ld-linux.*|lib(c|m|dl|rt|pthread|resolv|util|anl|mvec|nsl|nss_.*|thread_db|BrokenLocale|cuda|nvidia.*|cudart|cublas|cublasLt|cudnn.*|nccl|nvrtc|nvJitLink))\.so'

# Prints the libraries that a program or library loads, transitively: "name path" per line.
closure() {
    local listed
    listed=$(ldd "$1")
    if grep "not found" <<<"$listed" | grep -vqE "lib(cuda|cublasLt|nccl)\.so"; then
        echo "$1: $(grep "not found" <<<"$listed")" >&2
        return 1
    fi
    awk '$2 == "=>" && $3 ~ /^\// {print $1, $3}' <<<"$listed" | { grep -vE "$not_ours" || true; }
}

# Kernels' objects are the same for every CPU: build/release/obj/cuda for build/release-x86-64-v3 too. The output of
# ptxas stands beside each object, with a line for each kernel and architecture.
kernels_are_complete() {
    local objects log object source wanted arch program missing=0 found=0
    objects=$(dirname "$build")/$(basename "$build" | cut -d- -f1)/obj/cuda/kernels/cuda
    for log in "$objects"/*.o.ptxas; do
        [ -e "${log%.ptxas}" ] || continue # also where there is no log at all
        source=$(basename "$log" .o.ptxas).cu
        grep -q "Compiling entry function" "$log" || continue # host code
        found=1
        wanted=$architectures
        [[ $source != *_sm90.cu ]] || wanted=90a # Hopper's instructions exist nowhere else
        for arch in $wanted; do
            grep -q "Compiling entry function .* for 'sm_$arch'" "$log" ||
                { echo "$source is not compiled for sm_$arch; ARCH must have all of $architectures" >&2; missing=1; }
        done
    done
    [ $found = 1 ] || { echo "no compiled kernels in $objects" >&2; return 1; }
    for program in train test_native test_mpi_native bench_attention; do
        object=$(find "$objects" -name '*.o' -newer "$build/$program" -print -quit)
        [ -z "$object" ] || { echo "$build/$program is older than $object; make bundle builds it" >&2; missing=1; }
    done
    return $missing
}

for program in "${programs[@]}"; do
    [ -x "$build/$program" ] || { echo "$build/$program is missing; make bundle builds it" >&2; exit 2; }
done
kernels_are_complete || exit 2

mkdir -p "$(dirname "$archive")"
work=$(mktemp -d "$(dirname "$archive")/.kiln-bundle.XXXXXX")
trap 'rm -rf "$work"' EXIT
top=$work/kiln-bundle
mkdir -p "$top"/{bin,libexec,lib/ucx,scripts/gpu,scripts/pytorch,configs}
files=()
for program in "${programs[@]}"; do
    cp "$build/$program" "$top/libexec/"
    files+=("$build/$program")
done
# mpiexec.hydra starts hydra_pmi_proxy from its own folder.
cp -L "$launcher" "$top/libexec/mpiexec.hydra"
cp -L "$(dirname "$launcher")/hydra_pmi_proxy" "$top/libexec/"
files+=("$top"/libexec/mpiexec.hydra "$top"/libexec/hydra_pmi_proxy)

needed=$(for f in "${files[@]}"; do closure "$f" || exit 1; done | sort -u)
while read -r name path; do
    cp -L "$path" "$top/lib/$name"
    # UCX loads its transports from ucx/ beside itself; of transports in separate files only cma works within a host.
    if [ "$name" = libucs.so.0 ] && [ -e "$(dirname "$path")/ucx/libuct_cma.so.0" ]; then
        cp -L "$(dirname "$path")/ucx/libuct_cma.so.0" "$top/lib/ucx/"
    fi
done <<<"$needed"
# strip leaves -lineinfo, which belongs to device code.
find "$top/libexec" "$top/lib" -type f -exec strip --strip-debug {} + 2>/dev/null

cat >"$top/bin/run" <<'END'
#!/bin/bash
# Starts the program of libexec/ that has the name of this link, with the bundle's libraries and the machine's CUDA.
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd) || exit 2
name=$(basename "$0")
[ "$name" != mpirun ] || name=mpiexec.hydra
if [ -z "${KILN_CUDA_LIBRARIES+set}" ]; then  # ranks have it from their mpirun
    KILN_CUDA_LIBRARIES=$("$here/scripts/gpu/cuda_libraries.sh")
fi
export KILN_CUDA_LIBRARIES
export LD_LIBRARY_PATH="$here/lib${KILN_CUDA_LIBRARIES:+:$KILN_CUDA_LIBRARIES}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$here/libexec/$name" "$@"
END
chmod +x "$top/bin/run"
for name in "${programs[@]}" mpirun; do ln -s run "$top/bin/$name"; done
ln -s bin/train bin/mpirun "$top/"
cp scripts/prepare_data.py "$top/scripts/"
cp scripts/gpu/{gpu_check.py,gpu_stages.py,gpu_speed.py,gpu_first.py,goals.py,cuda_libraries.sh} "$top/scripts/gpu/"
cp scripts/pytorch/{bench_pytorch.py,torch_ops.py,train_pytorch.py,gpt2_torch.py} "$top/scripts/pytorch/"
cp configs/*.yaml "$top/configs/"
cp LICENSE "$top/"
{ cat build/commit 2>/dev/null || echo unknown; } >"$top/commit"

glibc=$(find "$top/libexec" "$top/lib" -type f -exec objdump -T {} + 2>/dev/null | grep -oE 'GLIBC_2\.[0-9]+' | sort -uV | tail -1)
name=$(basename "$build")
case $name in
    *-x86-64-v3) cpu="an x86-64-v3 CPU (AVX2)" ;;
    *-*) cpu="a CPU that is ${name#*-}" ;;
    *) cpu="a CPU like that where it was built ($(awk -F ': ' '/^model name/ {print $2; exit}' /proc/cpuinfo))" ;;
esac
cat >"$top/README.txt" <<END
kiln $(cat "$top/commit"): programs for an x86-64 Linux machine with an NVIDIA GPU.

Needed there: $cpu, glibc ${glibc#GLIBC_} or newer (ldd --version),
the NVIDIA driver for CUDA 13, and CUDA 13's libcublasLt.so.13 and libnccl.so.2: found through CUDA_HOME,
LD_LIBRARY_PATH, /usr/local/cuda or python3's nvidia-* packages. libcudnn.so.9 is looked for likewise; without it there is
only no comparison with cuDNN's attention. Everything else is in lib/.

    scripts/gpu/gpu_check.py            tests, op times, speed beside PyTorch; needs python3 (--help lists the stages)
    scripts/gpu/gpu_check.py --bench    all that is measured beside PyTorch, stage by stage, into benchmarks/results/

The demo, on two ranks, which may share one GPU; the first line makes its data, and python3 is needed for that:

    python3 scripts/prepare_data.py --python-stdlib --out runs/demo-data
    ./mpirun -np 2 ./train --config configs/demo.yaml
END

rm -f "$archive"
# The programs share the kernels' code: a compression window over several programs stores that code once.
pack=(tar --sort=name --owner=0 --group=0 --numeric-owner -C "$work" -c kiln-bundle)
case $archive in
    *.zst) "${pack[@]}" | zstd -q -T0 "-${LEVEL:-12}" --long=27 -o "$archive" ;;
    *.xz) "${pack[@]}" | xz -T0 "--lzma2=preset=${LEVEL:-6},dict=128MiB" >"$archive" ;;
esac
size=$(stat -c %s "$archive")
echo "$archive: $((size / 1000000)).$((size / 100000 % 10)) MB, unpacked $(du -sm "$top" | cut -f1) MiB, needs glibc ${glibc#GLIBC_}"
if [ "$size" -ge $((limit_mb * 1000000)) ]; then
    echo "$archive is over its limit of $limit_mb MB; its largest files:" >&2
    find "$top" -type f -printf '%s %P\n' | sort -rn | head -5 >&2
    exit 1
fi
