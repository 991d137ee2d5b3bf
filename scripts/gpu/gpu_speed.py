"""The stages of gpu_check.py that measure speed and quality, beside PyTorch where it can do the same.

goals.py judges their figures. A figure that could not be taken is None in the data, with the reason.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from gpu_stages import (
    BATCHES,
    OUT_OF_MEMORY,
    ROOT,
    SCRIPTS,
    SIZES,
    Data,
    Failed,
    Skipped,
    Stage,
    flat,
    last_json,
    option,
    read_config,
    reason,
    torch_python,
    write_tokens,
)

SDPA = ("default", "cudnn", "flash")
CONTEXT, VOCABULARY = 1024, 50257                               # of the runs whose speed is measured
OPS = ("124m", "1558m")                                         # sizes whose ops are timed
STEPS = {"124m": 60, "350m": 40, "774m": 30, "1558m": 24}       # of a run; the first third is left out
SEEDS = (1, 2, 3)
MODE_ROUNDS = 5
GAP_STEPS = {64: 60, 4: 300}                                    # of a run at this batch: seconds of work
TEXT = Path(os.environ.get("TEXT") or ROOT / "data" / "tinyshakespeare.txt")


def time_left(s: Stage) -> float:
    """For a stage's next program, seconds; a few stay for reading what it has written."""
    return s.left() - 5


# ---- attention, ops -------------------------------------------------------------------------------------------------

def attention(s: Stage, shapes: Sequence[str] = (), sdpas: Sequence[str] = SDPA) -> tuple[str, Data]:
    """All attention kernels of ours and the library's in one process, then PyTorch's at the same shapes; without
    `shapes`, at those of the goals."""
    path = s.work / "attention.jsonl"
    chosen = [word for shape in shapes for word in ("--shape", shape)]
    code, text = s.run([s.program("bench_attention"), "--json", path, *chosen], 240)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    data: Data = {"run": rows[:1]} | {key: [r for r in rows if r["type"] == kind] for key, kind in
                                      (("kernels", "kernel"), ("attention", "attention"), ("goals", "goal"))}
    if code != 0:
        raise Failed(f"bench_attention: {reason(code, text)}", data)
    ours = [r for r in data["attention"] if not r["kernel"].startswith("cudnn")]
    shapes = list(dict.fromkeys(r["shape"] for r in ours))      # that were measured
    data |= {"pytorch": [], "beside_pytorch": [], "pytorch_failed": {}}
    for sdpa in sdpas if shapes else ():
        command = [torch_python(), SCRIPTS / "pytorch" / "bench_pytorch.py", "--sdpa", sdpa]
        code, text = s.run([*command, *(word for shape in shapes for word in ("--attention", shape))], 70,
                           dict(os.environ))
        if code != 0:
            data["pytorch_failed"][sdpa] = reason(code, text)
            continue
        data["pytorch"] += last_json(text)["attention"]
    data["beside_pytorch"] = [
        {"shape": r["shape"], "way": r["way"], "kernel": r["kernel"], "sdpa": t["sdpa"],
         "ratio": t[f"{r['way']}_us"] / r["us"]}
        for r in ours for t in data["pytorch"] if t["shape"] == r["shape"]]
    return attention_headline(data, ours), data


def attention_headline(data: Data, ours: list[Data]) -> str:
    """The first shape, by the kernels that `device.attention: auto` takes."""
    goals = data["goals"]
    met = f"{sum(g['result'] == 'met' for g in goals)} of {len(goals)} goals met"
    if missing := sum(g["result"] == "not measured" for g in goals):
        met += f", {missing} not measured"
    if not ours:
        return f"nothing measured; {met}"
    kernel = "sm90" if any(r["kernel"] == "sm90" for r in ours) else "portable"
    shape = ours[0]["shape"]
    parts = []
    for r in ours:
        if (r["kernel"], r["shape"]) == (kernel, shape):
            beside = [f"{b['ratio']:.2f}x {b['sdpa']}" for b in data["beside_pytorch"]
                      if all(b[key] == r[key] for key in ("shape", "way", "kernel"))]
            parts.append(f"{r['way']} {r['tflop_per_s']:.0f} TFLOP/s"
                         + (f" ({', '.join(beside)} of PyTorch)" if beside else ""))
    torch = "" if data["beside_pytorch"] else "; no PyTorch"
    return f"{kernel} at {shape}: {', '.join(parts)}{torch}; {met}"


def ops(s: Stage, size: str, only: Sequence[str] = ()) -> tuple[str, Data]:
    """Every op of a step of one micro-batch by `./train bench`, then PyTorch's at the same shapes. With `only`: the ops
    whose names contain one of its words."""
    path = s.work / "ops.jsonl"
    batch = BATCHES[size]
    chosen = [word for name in only for word in ("--only", name)]
    settings = [f"train.{key}={batch}" for key in ("global_batch_size", "micro_batch_size")]
    code, text = s.run([s.program("train"), "bench", "--config", ROOT / "configs" / f"gpt2-{size}.yaml", "--json", path,
                        *(word for setting in settings for word in ("--set", setting)), *chosen], 240)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    of = {kind: [r for r in rows if r["type"] == kind] for kind in ("run", "peak", "op", "step")}
    data: Data = {"size": size, "B": batch, "run": of["run"], "peak": of["peak"], "ops": of["op"], "step": of["step"]}
    if code != 0:
        raise Failed(f"train bench: {reason(code, text)}", data)
    command = [torch_python(), SCRIPTS / "pytorch" / "bench_pytorch.py", "--ops", "--size", size, "--batch", str(batch),
               *chosen]
    code, text = s.run(command, time_left(s), dict(os.environ))
    if code == 0:
        data["pytorch"] = last_json(text)
        theirs = {r["op"]: r["us"] for r in data["pytorch"]["ops"] if r["us"]}
        failed = [r["op"] for r in data["pytorch"]["ops"] if r.get("failed")]
        said = f"; PyTorch failed at {', '.join(failed)}" if failed else ""
        for row in of["op"]:
            row["pytorch_us"] = theirs.get(row["op"])
            row["ratio"] = row["pytorch_us"] / row["us"] if row["pytorch_us"] else None
    else:
        data["pytorch_failed"] = reason(code, text)
        said = f"; PyTorch: {data['pytorch_failed']}"
    steps = ", ".join(f"{r['step_ms']:.1f} ms, at the device's peaks {r['bound_ms']:.1f} ms" for r in of["step"])
    return f"{size} B{batch}: a step's ops in a row {steps or 'not complete'}{said}", data


# ---- whole steps ----------------------------------------------------------------------------------------------------

def speed_config(s: Stage, size: str, batch: int, steps: int) -> Data:
    """Training on random tokens: speed does not depend on the text."""
    layers, heads, width = SIZES[size]
    shard = s.work / "random.bin"
    if not shard.exists():
        write_tokens(shard, 1 << 21, VOCABULARY)
    return flat({"device": {"kind": "cuda", "dtype": "bf16"},
                 "model": {"n_layer": layers, "n_head": heads, "n_embd": width, "context_length": CONTEXT,
                           "vocab_size": VOCABULARY},
                 "data": {"train": [str(shard)]}, "optimizer": {"learning_rate": 1e-4},
                 "train": {"max_steps": steps, "global_batch_size": batch, "micro_batch_size": batch}})


def kiln_speed(s: Stage, size: str, batch: int, settings: Data | None = None, steps: int = 0,
               env: dict[str, str] | None = None) -> Data:
    """One run of kiln: median step, phases, the weights it ends with."""
    n = steps or STEPS[size]
    records = s.train("speed", speed_config(s, size, batch, n) | (settings or {}), limit_s=time_left(s), env=env)
    taken = [r for r in records if r["type"] == "step"][n // 3:]
    run = next(r for r in records if r["type"] == "run")
    events = {r["event"]: r for r in records if r["type"] == "event"}
    memory = events.get("memory", {})
    ms = median(r["step_ms"] for r in taken)
    log = s.work / "runs" / "speed" / "train.log"
    weights = re.findall(r"weights ([0-9a-f]{16})", log.read_text()) if log.exists() else []
    return {"step_ms": ms, "tokens_per_s": 1e3 * batch * CONTEXT / ms,
            "step_ms_all": [round(r["step_ms"], 4) for r in taken],
            "phase_ms": {p: median(r["phase_ms"][p] for r in taken) for p in taken[0]["phase_ms"]},
            "mfu": median(known) if (known := [r["mfu"] for r in taken if r.get("mfu") is not None]) else None,
            **{key: run.get(key) for key in ("flops_per_token", "attention", "gemm_choices", "memory", "peak")},
            "graph": run.get("graph") and "graph" not in events,    # the event: recording it has failed
            "memory_taken": memory.get("taken"), "memory_named": memory.get("named"),
            "gpu": taken[-1].get("gpu"), "weights": weights[-1] if weights else None}


def pytorch(s: Stage, size: str, sdpa: str) -> tuple[str, Data]:
    """kiln and PyTorch in turn, so that a change of clocks hits both; the figures are medians."""
    data: Data = {"size": size, "T": 1024, "sdpa": sdpa, "kiln": [], "pytorch": []}
    steps = STEPS[size]

    def torch(batch: int) -> bool:
        command = [torch_python(), SCRIPTS / "pytorch" / "bench_pytorch.py", "--size", size, "--batch", str(batch),
                   "--sdpa", sdpa, "--steps", str(steps * 2 // 3), "--window", "5"]
        code, text = s.run(command, time_left(s), dict(os.environ))  # what it has compiled before it keeps in its cache
        if code == OUT_OF_MEMORY and batch > 1 and not data["pytorch"]:
            raise MemoryError(f"PyTorch: {reason(code, text)}")
        if code != 0:
            data["pytorch_failed"] = reason(code, text)
            return False
        data["pytorch"].append(last_json(text))
        return True

    batch = option("BATCH") or BATCHES[size]
    while True:                                                 # a batch that does not fit one is not for the other
        start = time.monotonic()
        try:
            data["kiln"] = [kiln_speed(s, size, batch)]
            there = torch(batch)
            break
        except MemoryError as e:
            if batch == 1:
                raise Failed(str(e), data) from e
            data["halved_because"] = str(e)
            batch //= 2
    data["B"] = batch
    longest = 0.0
    for _ in range(option("ROUNDS") - 1):
        # The first may have compiled, and a later one is shorter then; after one of them its length is known.
        if time_left(s) < (1.3 * longest or time.monotonic() - start):
            break                                               # a round more would be cut off
        start = time.monotonic()
        try:
            data["kiln"].append(kiln_speed(s, size, batch))
        except (Failed, MemoryError) as e:                      # what has been measured stays
            data["later_round_failed"] = str(e)
            break
        there = there and torch(batch)
        longest = max(longest, time.monotonic() - start)
    data["rounds"] = len(data["kiln"])
    ours = median(r["tokens_per_s"] for r in data["kiln"])
    data["kiln_tokens_per_s"] = ours
    headline = f"{size} B{batch} T1024 bf16: kiln {ours:,.0f} tokens/s"
    peak = (data["kiln"][0]["peak"] or {}).get
    if flops := peak(f"{peak('used')}_flops"):
        data["kiln_mfu"] = ours * data["kiln"][0]["flops_per_token"] / flops
        headline += f" ({data['kiln_mfu']:.1%} of {flops / 1e12:.0f} TFLOP/s)"
    if not data["pytorch"]:
        return f"{headline}; PyTorch: {data.get('pytorch_failed', 'not run')}", data
    theirs = median(r["tokens_per_s"] for r in data["pytorch"])
    data |= {"pytorch_tokens_per_s": theirs, "ratio": ours / theirs}
    return f"{headline}, PyTorch ({sdpa} SDPA) {theirs:,.0f}: {ours / theirs:.2f}x, {data['rounds']} round(s)", data


def modes(s: Stage) -> tuple[str, Data]:
    """The kernels of training, which repeat their bits, in turn with the fastest: cuDNN's attention, whose backward
    pass uses atomics. The other kernels have one form only, and matrix products are chosen among those that repeat
    their bits. All runs with the kernels of training must end with the same weights."""
    size, batch = "124m", BATCHES["124m"]
    fastest = {"device.attention": "cudnn"}
    data: Data = {"compared": "device.attention: auto against cudnn_fastest", "B": batch, "auto": [], "fastest": []}
    longest = 0.0
    for _ in range(MODE_ROUNDS):
        if time_left(s) < 1.3 * longest:
            break
        start = time.monotonic()
        data["auto"].append(kiln_speed(s, size, batch))
        if "fastest_failed" not in data:
            try:
                data["fastest"].append(kiln_speed(s, size, batch, fastest, env={"KILN_CUDNN_FASTEST": "1"}))
            except Failed as e:
                data["fastest_failed"] = str(e)
        longest = max(longest, time.monotonic() - start)
    hashes = {r["weights"] for r in data["auto"]}
    data |= {"weights": sorted(h or "none" for h in hashes), "cost": None,
             "same_weights": len(hashes) == 1 and None not in hashes if len(data["auto"]) > 1 else None}
    if data["fastest"]:
        data["cost"] = median(r["step_ms"] for r in data["auto"]) / median(r["step_ms"] for r in data["fastest"]) - 1
    if data["same_weights"] is False:
        raise Failed(f"runs of one config end with other weights: {', '.join(data['weights'])}", data)
    cost = f"{data['cost']:+.1%} of the fastest's step" if data["fastest"] else f"fastest: {data['fastest_failed']}"
    return f"{len(data['auto'])} runs, the same weights; deterministic takes {cost}", data


def busy_ms(report: Path, n_steps: int, step_ms: float) -> float:
    """How long the GPU works on a step, of the middle half of a run's. `report`: what Nsight Systems has exported as
    SQLite; step_ms: a step's length in that very run, whose steps are the last that the GPU did."""
    with sqlite3.connect(report) as db:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        kinds = [f"CUPTI_ACTIVITY_KIND_{kind}" for kind in ("KERNEL", "MEMCPY", "MEMSET")]
        spans = sorted(span for table in kinds if table in tables
                       for span in db.execute(f"SELECT start, end FROM {table}"))
    end_ns = max(end for _, end in spans)
    half_ns = 0.5e6 * n_steps * step_ms
    spans = [(begin, end) for begin, end in spans if end_ns - 1.5 * half_ns <= begin and end <= end_ns - 0.5 * half_ns]
    first, last, busy = spans[0][0], spans[0][0], 0
    for begin, end in spans:
        busy += max(0, end - max(begin, last))
        last = max(last, end)
    return float(busy / (last - first) * step_ms)


def gaps(s: Stage) -> tuple[str, Data]:
    """The cost of launches: steps of 64 and of 4 sequences, with a CUDA graph and without. Where Nsight Systems is
    installed, also the GPU's idle time: the length of a step minus the time that kernels ran, as the profiler reports
    it. The length comes from a run without the profiler, because the profiler delays each launch."""
    nsys = shutil.which("nsys") or next(iter(sorted(Path("/opt/nvidia").glob("nsight-systems/*/bin/nsys"))), None)
    data: Data = {"size": "124m", "runs": [], "profiler": str(nsys) if nsys else None}
    for batch in GAP_STEPS:
        for graph in ("on", "off"):
            row: Data = {"B": batch, "graph": graph, "step_ms": None, "idle": None}
            data["runs"].append(row)
            try:
                row["step_ms"] = kiln_speed(s, "124m", batch, {"device.graph": graph}, GAP_STEPS[batch])["step_ms"]
                if nsys:
                    out = s.work / f"{batch}-{graph}"
                    config = s.work / "speed.yaml"              # as the run before has left it
                    profile = [nsys, "profile", "-t", "cuda", "--cuda-graph-trace=node", "-o", out, "--export=sqlite"]
                    code, text = s.run([*profile, s.program("train"), "--config", config, "--overwrite"], time_left(s))
                    if code != 0:
                        raise Failed(f"nsys: {reason(code, text)}")
                    steps = [r["step_ms"] for r in s.records("speed") if r["type"] == "step"]
                    row["profiled_step_ms"] = median(steps[len(steps) // 3:])
                    row["busy_ms"] = busy_ms(out.with_suffix(".sqlite"), len(steps), row["profiled_step_ms"])
                    if row["busy_ms"] > row["step_ms"]:
                        raise Failed(f"the profiler's {row['busy_ms']:.3f} ms of work are more than the step")
                    row["idle"] = 1 - row["busy_ms"] / row["step_ms"]
            except (Failed, MemoryError, sqlite3.Error, ValueError, IndexError) as e:
                row["failed"] = f"{type(e).__name__}: {e}"
    if all(r["step_ms"] is None for r in data["runs"]):
        raise Failed(data["runs"][0]["failed"], data)
    shown = [f"B{r['B']} graph {r['graph']} " + (f"{r['step_ms']:.2f} ms" if r["step_ms"] else "not measured")
             + (f", idle {r['idle']:.1%}" if r["idle"] is not None else "") for r in data["runs"]]
    return "; ".join(shown) + ("" if nsys else "; idle time: no nsys"), data


def seconds_to_first_step(s: Stage, config: Data) -> float | None:
    """From the command to the first step's record; a run whose record nobody saw in time has none."""
    metrics = s.work / "runs" / "speed" / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    begin, done, seen = time.monotonic(), threading.Event(), []

    def watch() -> None:
        while not done.wait(0.01):
            if metrics.exists() and '"type":"step"' in metrics.read_text().replace(" ", ""):
                seen.append(time.monotonic() - begin)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        s.train("speed", config, limit_s=time_left(s))
    finally:
        done.set()
        watcher.join()
    return round(seen[0], 2) if seen else None


def start(s: Stage) -> tuple[str, Data]:
    """The second run has warm caches: of files, and of choices made by timing."""
    config = speed_config(s, "124m", BATCHES["124m"], 20)
    first, warm = (seconds_to_first_step(s, config) for _ in range(2))
    return f"124m: first step after {first} s, then after {warm} s", {"first_s": first, "warm_s": warm}


# ---- quality --------------------------------------------------------------------------------------------------------

def missing_text() -> str:
    return f"{TEXT} is missing; TEXT=FILE names tiny Shakespeare"


def prepare_text(s: Stage) -> tuple[Path, Data]:
    """The config, whose data then lies where it looks."""
    if not TEXT.exists():
        raise Skipped(missing_text())
    out = s.work / "data" / "shards" / "shakespeare-char"
    s.checked("data", [sys.executable, SCRIPTS / "prepare_data.py", TEXT, "--chars", "--out", out], 60)
    config = ROOT / "configs" / "shakespeare-char.yaml"
    return config, {"text": hashlib.sha256(TEXT.read_bytes()).hexdigest(),
                    "steps": read_config(config)["train.max_steps"]}


def kiln_quality(s: Stage, config: Path, seed: int, dtype: str) -> Data:
    begin = time.monotonic()
    settings = {"run.seed": seed, "device.kind": "cuda", "device.dtype": dtype}
    records = s.train(dtype, settings, config=config, limit_s=time_left(s))
    evals = [[r["step"], r["val_loss"]] for r in records if r["type"] == "eval"]
    return {"best_val_loss": min(v for _, v in evals), "seconds": round(time.monotonic() - begin, 1), "evals": evals}


def quality(s: Stage, seed: int) -> tuple[str, Data]:
    """configs/shakespeare-char.yaml by kiln in bf16, and by PyTorch's twin."""
    config, data = prepare_text(s)
    data |= {"seed": seed, "kiln": kiln_quality(s, config, seed, "bf16"), "pytorch": None}
    command = [torch_python(), SCRIPTS / "pytorch" / "train_pytorch.py", "--config", config, "--seed", str(seed)]
    code, text = s.run(command, time_left(s), dict(os.environ))
    shown = f"seed {seed}: best val loss {data['kiln']['best_val_loss']:.4f} in {data['kiln']['seconds']:.0f} s"
    if code != 0:
        data["pytorch_failed"] = reason(code, text)
        return f"{shown}; PyTorch: {data['pytorch_failed']}", data
    data["pytorch"] = last_json(text)
    return f"{shown}, PyTorch {data['pytorch']['best_val_loss']:.4f} in {data['pytorch']['seconds']:.0f} s", data


def quality_fp32(s: Stage) -> tuple[str, Data]:
    """The first seed's run again, in fp32."""
    config, data = prepare_text(s)
    data |= {"seed": SEEDS[0], "kiln": kiln_quality(s, config, SEEDS[0], "fp32")}
    return (f"seed {SEEDS[0]} in fp32: best val loss {data['kiln']['best_val_loss']:.4f} in "
            f"{data['kiln']['seconds']:.0f} s"), data


# ---- all of them ----------------------------------------------------------------------------------------------------

def stages() -> dict[str, Callable[[Stage], tuple[str, Data]]]:
    """By the name of the result's file."""
    all_of: dict[str, Callable[[Stage], tuple[str, Data]]] = {
        "attention": attention, "modes": modes, "gaps": gaps, "start": start}
    for size in OPS:
        all_of[f"ops-{size}"] = partial(ops, size=size)
    for size in SIZES:
        for sdpa in SDPA:
            all_of[pytorch_stage(size, sdpa)] = partial(pytorch, size=size, sdpa=sdpa)
    for seed in SEEDS:
        all_of[f"quality-{seed}"] = partial(quality, seed=seed)
    return all_of | {"quality-fp32": quality_fp32}


def pytorch_stage(size: str, sdpa: str) -> str:
    return f"pytorch-{size}" + ("" if sdpa == "default" else f"-{sdpa}")


QUALITY = [*(f"quality-{seed}" for seed in SEEDS), "quality-fp32"]
# The stages of `make bench-gpu`, the most telling first: the machine may be taken away.
BENCH = ["pytorch-124m-cudnn", "ops-124m", "attention", "modes", "start", "gaps", "pytorch-1558m-cudnn", "ops-1558m",
         *QUALITY, "pytorch-350m-cudnn", "pytorch-774m-cudnn",
         *(f"pytorch-{size}-flash" for size in SIZES)]
