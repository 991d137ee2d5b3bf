#!/bin/bash
# Runs the checks that need a GPU, in a checkout (make gpu-check builds the programs) or in an unpacked bundle (make
# bundle). Writes one JSON file for benchmarks/results/ and prints a short table last.
#
#   scripts/gpu_check.sh                        tests, attention, ops-124m, pytorch-124m
#   STAGE=sanitize scripts/gpu_check.sh         one stage, or several: STAGE="tests train"
#   scripts/gpu_check.sh --gpu                  names the GPU, or says why there is none (exit code 1), and runs nothing
#
#   tests            instruction conformance, op and model tests, two ranks on one GPU
#   sanitize         compute-sanitizer's four tools over the op tests; the tools that have not passed yet share the time
#                    equally; a tool that "timed out" gets the whole time as a stage of its own, like sanitize-racecheck
#   train            loss of the demo on the GPU, fp32 and bf16, against the CPU
#   attention        attention kernels side by side, ours, cuDNN's and PyTorch's; which of their goals are met
#   ops              ./train bench: time of every op beside PyTorch's and the device's limit (ops-124m, ops-1558m)
#   pytorch-SIZE     tokens/s beside PyTorch, in turn; 124m, 350m, 774m, 1558m
#   modes            deterministic kernels against the fastest; two runs, the same weights
#   gaps             launches: B64 and B4, as a CUDA graph and without; idle time where nsys is installed
#   start            seconds from the command to the first step
#   quality          configs/shakespeare-char.yaml beside PyTorch, three seeds (quality-1 ...), and in fp32
#   bench            all stages that make bench-gpu runs
#   merge            only puts the results in OUT together
#
#   OUT=DIR          where results go; a stage is not run again where it has passed there with the same programs,
#                    options and GPU, and from a clean tree
#   FORCE=1          run it again
#   BATCH=0 ROUNDS=5      of pytorch-SIZE; 0: 64, 32, 32, 16 by size. As many rounds as the stage's time allows
#   SDPA=default|cudnn|flash   of pytorch-SIZE; cudnn is also stage pytorch-SIZE-cudnn
#   TEXT=FILE        tiny Shakespeare, for quality (default data/tinyshakespeare.txt)
#   DEMO_STEPS=1500       of train              STAGE_SECONDS=470          limit of one stage
#
# The last lines say which goals are met, not met or not measured (scripts/goals.py).
# Exit code: 0 all passed (or skipped, in words), 1 something did not, 2 usage.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
case "${1:-}" in
    "" | --gpu) ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "scripts/gpu_check.sh: unknown option $1; stages come from the environment: --help" >&2; exit 2 ;;
esac
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "scripts/gpu_check.sh needs python3, 3.10 or newer, on the PATH" >&2
    exit 2
fi
# cuda_libraries.sh says which library is missing; the stages then report the failure.
KILN_CUDA_LIBRARIES=$("$root/scripts/cuda_libraries.sh")
export KILN_CUDA_LIBRARIES
exec python3 "$root/scripts/gpu_check.py" "$@"
