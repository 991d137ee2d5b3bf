"""Runs the stages of scripts/gpu_check.sh and keeps their results; scripts/gpu_stages.py has the stages themselves.

A stage writes OUT/<stage>.json and OUT/<stage>.log; after every stage all results in OUT are merged into
OUT/<gpu>-<date>.json.
"""
from __future__ import annotations

import ctypes
import datetime
import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Optional

from gpu_stages import (BUNDLE, LIBRARIES, ROOT, Data, Failed, Gpu, Skipped, Stage, kiln_env, quietly, stages,
                        torch_python)

OUT = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results-in-progress").resolve()
FORCE = os.environ.get("FORCE", "") not in ("", "0")
DEFAULT = ("tests", "ops", "pytorch-124m")


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
    return dict(zip(keys, (v.strip() for v in text.split(",")))) if text else {}


def library_version(name: str, function: str) -> Optional[int]:
    """A library's own answer, asked in a process of its own: it takes half a gigabyte."""
    for folder in filter(None, LIBRARIES.split(":")):
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
            "libraries": LIBRARIES, "bundle": BUNDLE, "clocks": clocks(), "cores": len(os.sched_getaffinity(0)),
            "kernel": os.uname().release}


# ---- results --------------------------------------------------------------------------------------------------------

def write_json(path: Path, value: Data) -> None:
    """All of it or nothing: a kill in the middle leaves no half file behind."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def read_result(name: str) -> Optional[Data]:
    try:
        result = json.loads((OUT / f"{name}.json").read_text())
        return result if isinstance(result, dict) and result.get("stage") == name else None
    except (OSError, ValueError):
        return None


def keep(result: Optional[Data], here: Data) -> bool:
    """A result that need not be made again: it passed, on this GPU, at this commit."""
    if FORCE or not result or result["result"] not in ("passed", "skipped"):
        return False
    before = result["environment"]
    return all(before.get(key) == here[key] for key in ("commit", "gpu"))


def run_stage(name: str, gpu: Gpu, here: Data) -> Data:
    log = OUT / f"{name}.log"
    log.write_text("")
    start = time.monotonic()
    result, data = "passed", {}
    with tempfile.TemporaryDirectory(prefix="kiln-check-", ignore_cleanup_errors=True) as work:
        try:
            if gpu.why:
                raise Failed(f"no usable GPU: {gpu.why}")
            headline, data = stages()[name](Stage(name, gpu, log, Path(work)))
        except (Failed, Skipped, MemoryError) as e:
            result = "skipped" if isinstance(e, Skipped) else "failed"
            headline, data = str(e.args[0]), e.args[1] if len(e.args) > 1 else {}
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as e:    # output not as expected
            result, headline = "failed", f"{type(e).__name__}: {e}"
    return {"stage": name, "result": result, "headline": headline, "seconds": round(time.monotonic() - start, 1),
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "environment": here,
            "clocks_after": clocks(), "data": data}


def merge() -> Path:
    """All results in OUT in one file. What is the same for all stages is said once."""
    results = [r for r in map(read_result, stages()) if r]
    environments = [r.pop("environment") for r in results]
    common = environments[-1] if environments else {}
    for r, e in zip(results, environments):
        differs = {k: v for k, v in e.items() if common.get(k) != v and k != "clocks"}
        if differs:
            r["environment_differs"] = differs
    name = re.sub(r"[^a-z0-9]+", "-", str(common.get("gpu") or "no-gpu").lower()).strip("-")
    path = OUT / f"{name}-{datetime.date.today().isoformat()}.json"
    write_json(path, {"environment": common, "stages": {r.pop("stage"): r for r in results}})
    return path


def main() -> int:
    names = os.environ.get("STAGE", "").replace(",", " ").split() or list(DEFAULT)
    known = [*stages(), "merge"]
    for name in names:
        if name not in known:
            print(f"error: STAGE={name}; known are {', '.join(known)}", file=sys.stderr)
            return 2
    OUT.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # so that what is running is ended too
    wanted = [n for n in names if n != "merge"]
    if wanted:
        gpu = find_gpu()
        if not gpu.why and not LIBRARIES:
            gpu = gpu._replace(why="libcublasLt.so.13 and libnccl.so.2 are nowhere; set CUDA_HOME or LD_LIBRARY_PATH")
        here = environment(gpu)
        print(f"{gpu.name or 'no GPU'}; results in {OUT}", flush=True)
        for name in wanted:
            before = read_result(name)
            if keep(before, here):
                print(f"== {name}: has passed before; FORCE=1 runs it again", flush=True)
                continue
            print(f"== {name} ({datetime.datetime.now():%H:%M:%S})", flush=True)
            write_json(OUT / f"{name}.json", run_stage(name, gpu, here))
            merge()
    path = merge()
    results = [r for r in map(read_result, stages()) if r and (not wanted or r["stage"] in wanted)]
    print(f"\n{'stage':20} {'result':8} {'seconds':>8}  headline")
    for r in results:
        print(f"{r['stage']:20} {r['result']:8} {r['seconds']:8.1f}  {r['headline']}")
    print(path)
    return 0 if all(r["result"] != "failed" for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
