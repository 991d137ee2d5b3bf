#!/usr/bin/env python3
"""Runs the checks that need a GPU, in a checkout (make gpu-check builds the programs) or in an unpacked bundle (make
bundle). Writes one JSON file for benchmarks/results/ and prints a short table last.

    scripts/gpu/gpu_check.py                    tests, attention, ops-124m, pytorch-124m
    STAGE=sanitize scripts/gpu/gpu_check.py     one stage, or several: STAGE="tests train"
    STAGE=first scripts/gpu/gpu_check.py        five minutes, the most decisive checks first; then STAGE=more
    scripts/gpu/gpu_check.py --gpu              names the GPU, or says why there is none (exit code 1), and runs nothing
    scripts/gpu/gpu_check.py --bench            the stages of STAGE, by default bench, then --publish (make bench-gpu)
    scripts/gpu/gpu_check.py --publish          runs nothing: puts the results so far into benchmarks/results/

  tests            instruction conformance, op and model tests, two ranks on one GPU
  sanitize         compute-sanitizer's four tools over the op tests; the tools that have not passed yet share the time
                   equally; a tool that "timed out" gets the whole time as a stage of its own, like sanitize-racecheck
  train            loss of the demo on the GPU, fp32 and bf16, against the CPU
  attention        attention kernels side by side, ours, cuDNN's and PyTorch's; which of their goals are met
  ops              ./train bench: time of every op beside PyTorch's and the device's limit (ops-124m, ops-1558m)
  pytorch-SIZE     tokens/s beside PyTorch, in turn; 124m, 350m, 774m, 1558m
  modes            deterministic kernels against the fastest; two runs, the same weights
  gaps             launches: B64 and B4, as a CUDA graph and without; idle time where nsys is installed
  start            seconds from the command to the first step
  quality          configs/shakespeare-char.yaml beside PyTorch, three seeds (quality-1 ...), and in fp32
  first, more      instructions, ops, attention, two runs' weights, 124M and single ops beside PyTorch in five minutes;
                   then what fits into seven more (gpu_first.py)
  bench            all stages of make bench-gpu: what is measured beside PyTorch, op by op and as whole runs
  merge            only puts the results in OUT together

  OUT=DIR          where results go; a stage is not run again where it has passed there with the same programs,
                   options and GPU, and from a clean tree
  FORCE=1          run it again
  BATCH=0 ROUNDS=5      of pytorch-SIZE; 0: 64, 32, 32, 16 by size. As many rounds as the stage's time allows
  SDPA=default|cudnn|flash   of pytorch-SIZE; cudnn is also stage pytorch-SIZE-cudnn
  TEXT=FILE        tiny Shakespeare, for quality (default data/tinyshakespeare.txt)
  DEMO_STEPS=1500       of train              STAGE_SECONDS=470          limit of one stage
  RESULTS=DIR      where --publish writes <gpu>-<date>.json, with versions and commit

Each stage has a time limit of its own under 8 minutes. It leaves OUT/<stage>.json and OUT/<stage>.log behind at once:
a machine that is taken away costs the running stage alone. After every stage all results in OUT are merged into
OUT/<gpu>-<date>.json. The last lines say which goals are met, not met or not measured (goals.py). gpu_stages.py and
gpu_speed.py have the stages themselves.
Exit code: 0 all passed (or skipped, in words), 1 something did not, 2 usage.
"""
from __future__ import annotations

import argparse
import ctypes
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if sys.version_info < (3, 10):  # noqa: UP036  other machines' Python may be older; before the imports that would fail
    print(f"gpu_check.py needs Python 3.10 or newer; {sys.executable} is {sys.version.split()[0]}", file=sys.stderr)
    sys.exit(2)
import goals
import gpu_first
import gpu_speed
import gpu_stages
from gpu_speed import SDPA, pytorch_stage
from gpu_stages import (
    BUNDLE,
    ROOT,
    SIZES,
    STAGE_SECONDS,
    TOOLS,
    Data,
    Failed,
    Gpu,
    Skipped,
    Stage,
    TimedOut,
    cuda_libraries,
    kiln_env,
    option,
    quietly,
    torch_python,
)

OUT = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results-in-progress").resolve()
RESULTS = Path(os.environ.get("RESULTS") or ROOT / "benchmarks" / "results")
FORCE = os.environ.get("FORCE", "") not in ("", "0")
DEFAULT = ("tests", "attention", "ops-124m", "pytorch-124m")
SAME = ("commit", "gpu", "driver", "cublaslt", "nccl", "torch")  # of the environment, for a result to be kept
CODE = ("prepare_data.py", *(f"gpu/{name}.py" for name in ("gpu_check", "gpu_stages", "gpu_speed", "gpu_first")),
        *(f"pytorch/{name}.py" for name in ("bench_pytorch", "torch_ops", "train_pytorch", "gpt2_torch")))


def stages() -> dict:
    return gpu_first.stages() | gpu_stages.stages() | gpu_speed.stages()


# ---- the machine ----------------------------------------------------------------------------------------------------

def find_gpu() -> Gpu:
    none = Gpu("", "", 0, "", "")
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return none._replace(why="libcuda.so.1 is missing: no NVIDIA driver")
    count, device, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if code := cuda.cuInit(0):
        return none._replace(why=f"cuInit failed with error {code}")
    if code := cuda.cuDeviceGetCount(ctypes.byref(count)) or int(count.value == 0):
        return none._replace(why="the driver sees no GPU")
    name, memory, major, minor = ctypes.create_string_buffer(128), ctypes.c_size_t(), ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    why = ""
    if major.value < 8:
        why = f"{name.value.decode()} has compute capability {major.value}.{minor.value}, needed is 8.0"
    elif version.value < 13000:
        why = f"the driver knows CUDA {version.value // 1000}.{version.value % 1000 // 10}, needed is 13.0"
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}", memory.value,
               f"{version.value // 1000}.{version.value % 1000 // 10}", why)


def clocks() -> Data:
    keys = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit", "temperature.gpu")
    text = quietly("nvidia-smi", "-i", "0", "--query-gpu=" + ",".join(keys), "--format=csv,noheader,nounits")
    return dict(zip(keys, (v.strip() for v in text.split(",")), strict=False)) if text else {}


def library_version(name: str, function: str) -> int | None:
    """A library's own answer, asked in a process of its own: it takes half a gigabyte."""
    for folder in filter(None, cuda_libraries().split(":")):
        code = (f"import ctypes; l = ctypes.CDLL('{folder}/{name}'); v = ctypes.c_int(); "
                + ("l.ncclGetVersion(ctypes.byref(v)); print(v.value)" if function == "ncclGetVersion" else
                   f"l.{function}.restype = ctypes.c_size_t; print(l.{function}())"))
        if (Path(folder) / name).exists():
            return int(quietly(sys.executable, "-c", code, env=kiln_env()) or 0) or None
    return None


def commit() -> str:
    for path in (ROOT / "commit", ROOT / "build" / "commit"):
        if path.exists():
            return path.read_text().strip()
    return "unknown"


def environment(gpu: Gpu) -> Data:
    torch = quietly(torch_python(), "-c", "import torch; print(torch.__version__)")
    return {"gpu": gpu.name, "capability": gpu.capability, "memory_bytes": gpu.memory_bytes,
            "driver": quietly("nvidia-smi", "-i", "0", "--query-gpu=driver_version", "--format=csv,noheader"),
            "driver_cuda": gpu.driver_cuda, "cublaslt": library_version("libcublasLt.so.13", "cublasLtGetVersion"),
            "nccl": library_version("libnccl.so.2", "ncclGetVersion"), "torch": torch or None, "commit": commit(),
            "libraries": cuda_libraries(), "bundle": BUNDLE, "clocks": clocks(), "cores": len(os.sched_getaffinity(0)),
            "kernel": os.uname().release}


# ---- results --------------------------------------------------------------------------------------------------------

def write_json(path: Path, value: Data) -> None:
    """All of it or nothing: a kill in the middle leaves no half file behind."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def read_result(name: str) -> Data | None:
    try:
        result = json.loads((OUT / f"{name}.json").read_text())
        return result if isinstance(result, dict) and result.get("stage") == name else None
    except (OSError, ValueError):
        return None


def code_hash() -> str:
    """Of the programs and of the scripts that run them: a build of the same commit may be another."""
    h = hashlib.sha256()
    folder = ROOT / "libexec" if BUNDLE else gpu_stages.BIN
    programs = ("train", "test_native", "test_mpi_native", "test_isa_native", "test_isa_sm90_native", "bench_attention")
    for path in (*(folder / p for p in programs), *(gpu_stages.SCRIPTS / s for s in CODE)):
        h.update(path.name.encode() + b"\0")
        if path.exists():
            with open(path, "rb") as f:
                while block := f.read(1 << 20):
                    h.update(block)
    return h.hexdigest()


def options(stage: str) -> Data:
    """The options that change what a stage does and are not in its name."""
    names = {"train": ("DEMO_STEPS",), "pytorch": ("BATCH", "ROUNDS")}.get(stage.split("-")[0], ())
    return {name: option(name) for name in names}


def keep(result: Data | None, here: Data) -> bool:
    """A result that need not be made again: it passed, made by this code under these options on this machine. Results
    of a dirty tree are made again: nobody can tell later which code made them."""
    if FORCE or not result or result["result"] != "passed" or str(here["commit"]).endswith("-dirty"):
        return False
    before = result["environment"]
    return (all(before.get(key) == here.get(key) for key in SAME) and before.get("code") == here["code"]
            and result.get("options") == options(result["stage"]))


def run_stage(name: str, gpu: Gpu, here: Data, seconds: float) -> Data:
    log = OUT / f"{name}.log"
    log.write_text("")
    start = time.monotonic()
    result, data = "passed", {}
    with tempfile.TemporaryDirectory(prefix="kiln-check-", ignore_cleanup_errors=True) as work:
        try:
            if gpu.why:
                raise Failed(f"no usable GPU: {gpu.why}")
            headline, data = stages()[name](Stage(name, gpu, log, Path(work), seconds))
        except (Failed, Skipped, TimedOut, MemoryError) as e:
            result = {Skipped: "skipped", TimedOut: "timed out"}.get(type(e), "failed")
            headline, data = str(e.args[0]), e.args[1] if len(e.args) > 1 else {}
        except Exception as e:                                  # output not as expected; other stages can still pass
            result, headline = "failed", f"{type(e).__name__}: {e}"
    return {"stage": name, "result": result, "headline": headline, "options": options(name),
            "seconds": round(time.monotonic() - start, 1),
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "environment": here,
            "clocks_after": clocks(), "data": data}


def merge() -> Path:
    """All results in OUT in one file. The environment, the same for nearly all stages, stands there once."""
    results = [r for r in map(read_result, stages()) if r]
    environments = [r.pop("environment") for r in results]
    common = environments[-1] if environments else {}
    for r, e in zip(results, environments, strict=True):
        differs = {k: v for k, v in e.items() if common.get(k) != v and k != "clocks"}
        if differs:
            r["environment_differs"] = differs
    name = re.sub(r"[^a-z0-9]+", "-", str(common.get("gpu") or "no-gpu").lower()).strip("-")
    path = OUT / f"{name}-{datetime.date.today().isoformat()}.json"
    write_json(path, {"environment": common, "stages": {r.pop("stage"): r for r in results}})
    return path


class Group(NamedTuple):
    """Stages that share their time."""
    shares: dict[str, float]                                    # stage -> its part of the time, in any unit
    seconds: float


def asked_for(names: list[str]) -> list[Group]:
    """The stages that STAGE names."""
    sdpa = os.environ.get("SDPA") or "default"
    if sdpa not in SDPA:
        raise ValueError(f"SDPA={sdpa}; known are {', '.join(SDPA)}")
    known = {"tests": [["tests"]], "sanitize": [[f"sanitize-{tool}" for tool in TOOLS]]}
    known |= {"first": [], "more": []} | {name: [[name]] for name in stages()}
    known |= {f"pytorch-{size}": [[pytorch_stage(size, sdpa)]] for size in SIZES} | {"merge": []}
    known |= {"ops": [[f"ops-{size}"] for size in gpu_speed.OPS], "bench": [[name] for name in gpu_speed.BENCH],
              "quality": [[name] for name in gpu_speed.QUALITY]}
    for name in names:
        if name not in known:
            raise ValueError(f"STAGE={name}; known are {', '.join(known)}")
    whole = {"first": Group(dict(gpu_first.FIRST), gpu_first.SECONDS),
             "more": Group(dict(gpu_first.MORE), gpu_first.MORE_SECONDS)}
    groups = [group for name in names for group in
              ([whole[name]] if name in whole else [Group(dict.fromkeys(g, 1.0), STAGE_SECONDS) for g in known[name]])]
    return [group for i, group in enumerate(groups) if group not in groups[:i]]


def usable_gpu() -> Gpu:
    gpu = find_gpu()
    if not gpu.why and not cuda_libraries():
        gpu = gpu._replace(why="libcublasLt.so.13 and libnccl.so.2 are nowhere; set CUDA_HOME or LD_LIBRARY_PATH")
    return gpu


def no_gpu(gpu: Gpu) -> str:
    return f"error: no usable GPU: {gpu.why}; without one: make test, make emulated"


def passed(path: Path) -> set[str]:
    return {name for name, r in json.loads(path.read_text())["stages"].items() if r["result"] == "passed"}


def publish() -> Path:
    """A file of the same day is replaced only where no stage that has passed would be lost."""
    merged = merge()
    if merged.name.startswith("no-gpu"):
        raise FileNotFoundError(f"{OUT} holds no results of a GPU")
    RESULTS.mkdir(parents=True, exist_ok=True)
    target, n = RESULTS / merged.name, 1
    while target.exists() and not passed(target) <= passed(merged):
        n += 1
        target = RESULTS / f"{merged.stem}-{n}.json"
    return Path(shutil.copy(merged, target))


def check(default: Sequence[str]) -> int:
    """Runs the stages that STAGE names, else `default`; returns the exit code."""
    try:
        asked = asked_for(os.environ.get("STAGE", "").replace(",", " ").split() or list(default))
        for name in gpu_stages.OPTIONS:
            option(name)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # so that what is running is ended too
    wanted = [stage for group in asked for stage in group.shares]
    if wanted:
        gpu = usable_gpu()
        here = environment(gpu) | {"code": code_hash()}
        print(f"{gpu.name or 'no GPU'}; results in {OUT}", flush=True)
        if any(name in gpu_speed.QUALITY for name in wanted) and not gpu_speed.TEXT.exists():
            print(f"quality will be skipped: {gpu_speed.missing_text()}", flush=True)
        for group in asked:
            left = [name for name in group.shares if not keep(read_result(name), here)]
            for name in group.shares:
                if name not in left:
                    print(f"== {name}: has passed before; FORCE=1 runs it again", flush=True)
            end = time.monotonic() + group.seconds
            for i, name in enumerate(left):                     # what one does not use of its share the next ones have
                print(f"== {name} ({datetime.datetime.now():%H:%M:%S})", flush=True)
                part = group.shares[name] / sum(group.shares[n] for n in left[i:])
                share = (end - time.monotonic()) * part
                write_json(OUT / f"{name}.json", run_stage(name, gpu, here, share))
                merge()
    path = merge()
    results = [r for r in map(read_result, stages()) if r and (not wanted or r["stage"] in wanted)]
    print(f"\n{'stage':20} {'result':9} {'seconds':>8}  headline")
    for r in results:
        print(f"{r['stage']:20} {r['result']:9} {r['seconds']:8.1f}  {r['headline']}")
    if wanted and gpu.why:
        print(no_gpu(gpu), file=sys.stderr)
    else:
        print(goals.table(json.loads(path.read_text())))
    print(path)
    return 0 if all(r["result"] in ("passed", "skipped") for r in results) else 1



def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--gpu", action="store_true", help="only name the GPU")
    what.add_argument("--bench", action="store_true", help="run what make bench-gpu runs, and publish")
    what.add_argument("--publish", action="store_true", help="only publish the results so far")
    a = parser.parse_args(words)
    if a.gpu:
        gpu = usable_gpu()
        print(gpu.name if not gpu.why else no_gpu(gpu), file=sys.stderr if gpu.why else sys.stdout)
        return int(bool(gpu.why))
    code = 0 if a.publish else check(["bench"] if a.bench else DEFAULT)
    if code == 2 or not (a.bench or a.publish):
        return code
    try:
        print(f"wrote {publish()}")
    except OSError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
