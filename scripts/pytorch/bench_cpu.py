#!/usr/bin/env python3
"""CPU speed and memory of kiln beside PyTorch and oneDNN, all in one run (make bench).

    python3 scripts/pytorch/bench_cpu.py [--rounds N] [--only nanogpt|gpt2] [--openblas DIR] [--out FILE]

Two models, fp32, random tokens (speed does not depend on the text): nanoGPT's CPU configuration and GPT-2 124M with
batches of 4 x 64 tokens. Every side runs in a process of its own, in turn (A B C A B C ...), so that a change of the
machine's speed hits all; each figure is the median over the rounds of the median step of a run. Writes
benchmarks/results/cpu-<date>.json.

The BLAS under PyTorch decides everything: Debian installs the reference BLAS by default, tens of times slower than
OpenBLAS. So PyTorch is measured with the BLAS that the machine gives it and, where found, with OpenBLAS, and every goal
is judged against each. OpenBLAS need not be installed to be found:
    apt-get download libopenblas0-openmp && dpkg -x libopenblas0-openmp_*.deb /tmp/openblas
    python3 scripts/pytorch/bench_cpu.py --openblas /tmp/openblas/usr/lib/x86_64-linux-gnu/openblas-openmp

Exit code: 0 measured, whether goals are met or not; 1 a program is missing or has failed; 2 usage.
"""
from __future__ import annotations

import argparse
import datetime
import glob
import json
import os
import platform
import random
import struct
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
TRAIN = Path(os.environ.get("KILN_TRAIN", ROOT / "train"))
BENCH_GEMM = Path(os.environ.get("KILN_BENCH_GEMM", ROOT / "build" / "release" / "bench_gemm"))
TORCH_PYTHON = os.environ.get("KILN_TORCH_PYTHON", "/usr/bin/python3")     # Debian's python3-torch belongs to this one
THREADS = 2


@dataclass(frozen=True)
class Model:
    name: str
    title: str
    n_layer: int
    n_head: int
    n_embd: int
    context_length: int
    batch: int
    vocab_size: int
    bias: bool
    steps: int                          # of one run; the first `skip` warm up and are left out
    skip: int
    torch_threads: tuple[int, ...]


NANOGPT = Model("nanogpt", "nanoGPT's CPU config", n_layer=4, n_head=4, n_embd=128, context_length=64, batch=12,
                vocab_size=65, bias=False, steps=80, skip=20, torch_threads=(1, 2))
GPT2 = Model("gpt2", "GPT-2 124M, batch 4 x 64", n_layer=12, n_head=12, n_embd=768, context_length=64, batch=4,
             vocab_size=50257, bias=True, steps=7, skip=2, torch_threads=(2,))
MODELS = {m.name: m for m in (NANOGPT, GPT2)}
TORCH_BUDGET_S = 12.0       # a PyTorch run stops here even before `steps`: the reference BLAS takes a minute per step


def write_synthetic_shard(directory: Path, m: Model) -> str:
    rng = random.Random(m.vocab_size)
    tokens = array("H", (rng.randrange(m.vocab_size) for _ in range(100_000)))
    path = directory / f"synthetic_random_tokens_{m.name}.bin"
    path.write_bytes(struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + tokens.tobytes())
    return str(path)


def kiln_config(m: Model, shard: str, out_dir: Path) -> str:
    return f"""\
run: {{name: {m.name}, out_dir: {json.dumps(str(out_dir))}}}
device: {{kind: cpu, dtype: fp32, threads: {THREADS}}}
model: {{n_layer: {m.n_layer}, n_head: {m.n_head}, n_embd: {m.n_embd}, context_length: {m.context_length},
        vocab_size: {m.vocab_size}, dropout: 0, bias: {str(m.bias).lower()}}}
data: {{train: [{json.dumps(shard)}], shuffle: false}}
train: {{max_steps: {m.steps}, global_batch_size: {m.batch}, micro_batch_size: {m.batch}, grad_clip: 1.0}}
optimizer: {{name: adamw, learning_rate: 0.001}}
"""


# ---- one run of one side --------------------------------------------------------------------------------------------

def run_child(command: list[str], env: dict[str, str]) -> tuple[str, float]:
    """Standard output and peak resident MiB of a process (of all its threads; of none of its children)."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **env}, cwd=ROOT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        if child.returncode != 0:
            sys.exit(f"{' '.join(command)}\nexited with {child.returncode}:\n{out.read()[-2000:]}{err.read()[-2000:]}")
        return out.read(), usage.ru_maxrss / 1024


def sample(step_ms: list[float], skip: int, rss: float) -> dict:
    """A run too slow to get past its warm-up within the budget counts with its last step: its warm-up is negligible."""
    kept = step_ms[skip:] or step_ms[-1:]
    return {"median_step_ms": median(kept), "step_ms": [round(x, 3) for x in kept], "peak_rss_mib": round(rss, 1),
            "load_1min": round(os.getloadavg()[0], 2)}


def run_kiln(m: Model, shard: str, tmp: Path) -> dict:
    config = tmp / f"{m.name}.yaml"
    config.write_text(kiln_config(m, shard, tmp / "runs"))
    _, rss = run_child([str(TRAIN), "--config", str(config), "--overwrite"], {})
    records = [json.loads(line) for line in (tmp / "runs" / m.name / "metrics.jsonl").read_text().splitlines()]
    return {**sample([r["step_ms"] for r in records if r["type"] == "step"], m.skip, rss),
            "run": next(r for r in records if r["type"] == "run")}


def run_torch(m: Model, shard: str, threads: int, blas_dir: str | None) -> dict:
    env = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    if blas_dir:
        env["LD_LIBRARY_PATH"] = blas_dir
    out, rss = run_child([TORCH_PYTHON, __file__, "torch-side", m.name, str(threads), shard], env)
    child = json.loads(out)
    return {**sample(child["step_ms"], m.skip, rss), "blas": child["blas"], "torch": child["torch"]}


def run_gemm(m: Model) -> dict:
    sizes = {"--batch": m.batch, "--context": m.context_length, "--layers": m.n_layer, "--embd": m.n_embd,
             "--vocab": m.vocab_size}
    command = [str(BENCH_GEMM), *(str(word) for option in sizes.items() for word in option)]
    times: dict = json.loads(run_child(command, {"OMP_NUM_THREADS": str(THREADS)})[0])
    return times


def torch_side(m: Model, threads: int, shard: str) -> None:
    """The child process that trains the PyTorch twin, eager, and prints its step times as JSON."""
    import torch

    import gpt2_torch
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    config = gpt2_torch.GPT2Config(m.n_layer, m.n_head, m.n_embd, m.context_length, m.vocab_size, m.bias)
    model = gpt2_torch.GPT2(config)
    data, optimizer = gpt2_torch.Shards(shard, m.context_length), gpt2_torch.make_optimizer(model)
    step_ms: list[float] = []
    begin = time.perf_counter()
    while len(step_ms) < m.steps and (not step_ms or time.perf_counter() - begin < TORCH_BUDGET_S):
        start = time.perf_counter()
        gpt2_torch.train_step(model, optimizer, [data.batch(len(step_ms) * m.batch, m.batch)], 1e-3)
        step_ms.append(1e3 * (time.perf_counter() - start))
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = {os.path.realpath(line.split()[-1]) for line in maps if "/" in line}
    blas = sorted(p for p in mapped if any(word in os.path.basename(p) for word in ("blas", "blis", "mkl_")))
    json.dump({"step_ms": step_ms, "blas": blas, "torch": torch.__version__}, sys.stdout)


# ---- rounds, results, goals -----------------------------------------------------------------------------------------

def report_run(m: Model, round_of: str, side: str, ms: float) -> None:
    print(f"  {m.name} round {round_of}  {side:30} {ms:10.2f} ms/step", flush=True)


def measure(m: Model, rounds: int, blas_dirs: dict[str, str | None], tmp: Path) -> dict:
    shard = write_synthetic_shard(tmp, m)
    sides: dict[str, list[dict]] = {}
    gemms: list[dict] = []
    for n in range(rounds):
        runs: dict[str, Callable[[], dict]] = {"kiln": partial(run_kiln, m, shard, tmp)}
        for blas, directory in blas_dirs.items():
            for t in m.torch_threads:
                runs[f"torch {blas}, {t} thread{'s'[:t - 1]}"] = partial(run_torch, m, shard, t, directory)
        for name, run in runs.items():
            sides.setdefault(name, []).append(run())
            report_run(m, f"{n + 1}/{rounds}", name, sides[name][-1]["median_step_ms"])
        if m is GPT2:
            gemms.append(run_gemm(m))
            report_run(m, f"{n + 1}/{rounds}", "GEMMs alone, native oneDNN", gemms[-1]["native_ms_total"])
    result: dict = {"config": asdict(m), "data": "synthetic random tokens", "sides": {}}
    for name, samples in sides.items():
        ms = [s["median_step_ms"] for s in samples]
        result["sides"][name] = {"step_ms": median(ms), "step_ms_range": [min(ms), max(ms)],
                                 "steps_per_s": 1e3 / median(ms),
                                 "peak_rss_mib": median(s["peak_rss_mib"] for s in samples), "samples": samples}
    if gemms:
        flop = sum(2 * g["M"] * g["N"] * g["K"] * g["count"] for g in gemms[0]["gemms"])
        result["gemm"] = {"native_ms": median(g["native_ms_total"] for g in gemms), "gflop": flop / 1e9,
                          "kiln_ms": median(g["kiln_ms_total"] for g in gemms), "samples": gemms}
    return result


def goal(text: str, value: float, limit: float, at_least: bool) -> dict:
    met = value >= limit if at_least else value <= limit
    return {"goal": f"{text} {'>=' if at_least else '<='} {limit}", "value": value, "met": met}


def judge(results: dict[str, dict], blas_names: list[str]) -> list[dict]:
    goals = []
    for blas in blas_names:
        if "nanogpt" in results:
            sides = results["nanogpt"]["sides"]
            best = max(s["steps_per_s"] for name, s in sides.items() if name.startswith(f"torch {blas},"))
            goals.append(goal(f"nanoGPT config: kiln's steps/s over PyTorch's ({blas})",
                              sides["kiln"]["steps_per_s"] / best, 3, at_least=True))
        if "gpt2" in results:
            kiln = results["gpt2"]["sides"]["kiln"]
            torch = results["gpt2"]["sides"][f"torch {blas}, 2 threads"]
            goals.append(goal(f"124M: kiln's step over PyTorch's ({blas})",
                              kiln["step_ms"] / torch["step_ms"], 0.25, at_least=False))
            goals.append(goal(f"124M: kiln's peak memory over PyTorch's ({blas})",
                              kiln["peak_rss_mib"] / torch["peak_rss_mib"], 1, at_least=False))
    if "gpt2" in results:
        gemm, step = results["gpt2"]["gemm"], results["gpt2"]["sides"]["kiln"]["step_ms"]
        goals.append(goal("124M: kiln's step over native oneDNN's GEMMs alone",
                          step / gemm["native_ms"], 1.5, at_least=False))
        goals.append(goal("124M: kiln's GEMM rate over native oneDNN's",
                          gemm["native_ms"] / gemm["kiln_ms"], 0.8, at_least=True))
    return goals


def shell(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:
        return ""


def environment() -> dict:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    cpu = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {"commit": shell("git", "rev-parse", "--verify", "HEAD"),
            "uncommitted_changes": bool(shell("git", "status", "--porcelain")),
            "machine": {"cpu": cpu[0] if cpu else platform.machine(), "cores": len(os.sched_getaffinity(0)),
                        "memory_gib": round(memory_kib / 2**20, 1), "kernel": platform.release(),
                        "isa": [f for f in ("avx2", "avx512f", "amx_tile") if f in cpuinfo.split()]},
            "versions": {"onednn": shell("dpkg-query", "-Wf", "${Version}", "libdnnl2"),
                         "compiler": shell("c++", "-dumpfullversion"), "python": platform.python_version()},
            "load_1min_at_start": round(os.getloadavg()[0], 2)}


def print_table(results: dict[str, dict], goals: list[dict]) -> None:
    for r in results.values():
        print(f"\n{r['config']['title']:32} {'ms/step':>10} {'(min .. max)':>22} {'steps/s':>9} {'peak MiB':>9}")
        for name, s in r["sides"].items():
            low, high = s["step_ms_range"]
            print(f"  {name:30} {s['step_ms']:10.2f} {f'({low:.2f} .. {high:.2f})':>22} {s['steps_per_s']:9.3f} "
                  f"{s['peak_rss_mib']:9.0f}")
        if "gemm" in r:
            g, step = r["gemm"], r["sides"]["kiln"]["step_ms"]
            kiln_rate, native_rate = (1e3 * g["gflop"] / g[key] for key in ("kiln_ms", "native_ms"))
            print(f"  GEMMs alone: kiln {g['kiln_ms']:.1f} ms, {kiln_rate:.0f} GFLOP/s, {g['kiln_ms'] / step:.0%} of "
                  f"its step; native oneDNN, {THREADS} threads: {g['native_ms']:.1f} ms, {native_rate:.0f} GFLOP/s")
    print()
    for g in goals:
        print(f"  {'met    ' if g['met'] else 'NOT MET'}  {g['goal']}: {g['value']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--openblas", metavar="DIR", help="folder of OpenBLAS's libblas.so.3")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/cpu-<date>.json")
    args = parser.parse_args()
    for program in (TRAIN, BENCH_GEMM) if args.only != "nanogpt" else (TRAIN,):
        if not program.exists():
            sys.exit(f"{program} is missing; build it first: make bench")
    installed = [args.openblas] if args.openblas else sorted(glob.glob("/usr/lib/*/openblas-*/"))
    if args.openblas and not (Path(args.openblas) / "libblas.so.3").exists():
        sys.exit(f"{args.openblas} holds no libblas.so.3")
    blas_dirs: dict[str, str | None] = {"as installed": None}
    if installed:
        blas_dirs["OpenBLAS"] = installed[0]
    else:
        print("OpenBLAS not found: PyTorch runs with the machine's own BLAS only (--help says how to get it)")
    if os.getloadavg()[0] > 0.5:
        print(f"warning: the machine is not idle (load {os.getloadavg()[0]:.1f}): two threads that wait for each other "
              "lose far more than their share; above 1 docs/performance.md judges no goal")
    chosen = [MODELS[args.only]] if args.only else list(MODELS.values())
    report = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), **environment(),
              "rounds": args.rounds, "threads": THREADS, "blas_folders": blas_dirs}
    with tempfile.TemporaryDirectory(prefix="kiln-bench-") as tmp:
        results = {m.name: measure(m, args.rounds, blas_dirs, Path(tmp)) for m in chosen}
    goals = judge(results, list(blas_dirs))
    print_table(results, goals)
    out = args.out or ROOT / "benchmarks" / "results" / f"cpu-{report['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**report, "goals": goals, "results": results}, indent=1) + "\n")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["torch-side"]:
        torch_side(MODELS[sys.argv[2]], int(sys.argv[3]), sys.argv[4])
    else:
        main()
