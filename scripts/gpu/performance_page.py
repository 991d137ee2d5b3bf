#!/usr/bin/env python3
"""Writes docs/performance.md and its pictures from the files of benchmarks/results/ (make performance-page).

    python3 scripts/gpu/performance_page.py             writes
    python3 scripts/gpu/performance_page.py --check     exit code 1 where what is there is not what would be written

The files of gpu_check.py --bench give the page's GPUs, the newest of each, the newest GPU first; the files of
scripts/pytorch/bench_cpu.py give its CPUs. The page says "not measured" where no file has a figure; bounds are computed
from the device's peaks (roofline.py) and are called so. Exit code: 0 done, 1 --check has found a difference, 2 usage.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import goals
from gpu_speed import OPS, SDPA
from gpu_stages import BATCHES, SIZES
from performance_pictures import Bar, Pass, Point, roofline_svg, step_svg
from roofline import H200, Device, Op, Shape, bound_ms, step_ops

ROOT = Path(__file__).resolve().parents[2]
MISSING = "not measured"
BUSY = 1.0                                                      # load before a bench, above which nothing counts
MFU = ("MFU: PaLM's FLOP of a token, 6 N + 12 L C T, over the vendor's peak where the run knows it, else over the one "
       "that it measured.\n")
Result = dict[str, Any]


class Gpu(NamedTuple):
    """One file; none of it where no GPU has been reached."""
    file: str
    results: Result

    def data(self, stage: str) -> Result:
        return goals.of_one_build(self.results).get(stage, {}).get("data") or {}

    def device(self, size: str) -> Device:
        """With the peaks that ./train bench has measured; without, as the vendor says of an H200."""
        peaks = [p for at in (size, *OPS) for p in self.data(f"ops-{at}").get("peak") or []]
        if not peaks:
            return H200
        peak = peaks[0]
        name = self.results["environment"]["gpu"]
        return Device(name, peak["tflop_per_s"], peak["gb_per_s"], "measured in the same run")


def number(x: float | None, form: str = ",.0f") -> str:
    return MISSING if x is None else format(x, form)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shape_of(size: str) -> Shape:
    L, NH, C = SIZES[size]
    return Shape(L, NH, C, B=BATCHES[size])


def goals_table(gpu: Gpu) -> str:
    rows = [[v.goal.text + (" (stretch)" if v.goal.stretch else ""), "" if v.value is None else goals.number(v.value),
             v.result] for v in goals.judge(gpu.results)]
    return table(["goal", "value", "result"], rows)


def end_to_end(gpu: Gpu) -> str:
    rows = []
    for size in SIZES:
        runs = {sdpa: gpu.data(f"pytorch-{size}" + ("" if sdpa == "default" else f"-{sdpa}")) for sdpa in SDPA}
        cudnn = runs["cudnn"]
        z = shape_of(size)._replace(B=cudnn.get("B", BATCHES[size]))
        bound = bound_ms(step_ops(z), gpu.device(size))
        rows.append([f"{size.upper()} B{cudnn.get('B', BATCHES[size])}", number(cudnn.get("kiln_tokens_per_s")),
                     number(cudnn.get("kiln_mfu"), ".1%"), number(1e3 * z.B * z.T / bound),
                     *(cell for sdpa in ("cudnn", "flash") for cell in (
                         number(runs[sdpa].get("pytorch_tokens_per_s")), number(runs[sdpa].get("ratio"), ".2f"))),
                     number(cudnn.get("rounds"))])
    return table(["T1024, bf16", "kiln, tokens/s", "MFU", "bound, tokens/s", "PyTorch with cuDNN SDPA", "kiln / it",
                  "PyTorch with flash SDPA", "kiln / it", "rounds"], rows)


def rate(o: Op, us: float | None, d: Device) -> str:
    if us is None:
        return MISSING
    return f"{o.flop / us / 1e6:.0f} TFLOP/s" if o.by_flop(d) else f"{o.n_bytes / us / 1e3:,.0f} GB/s"


def ops_table(gpu: Gpu, size: str) -> str:
    d, measured = gpu.device(size), {r["op"]: r for r in gpu.data(f"ops-{size}").get("ops", [])}
    rows = []
    for o in step_ops(shape_of(size)):
        row = measured.get(o.op, {})
        us = row.get("us")
        rows.append([o.op, str(o.calls), number(o.bound_us(d), ",.1f"), number(us, ",.1f"), rate(o, us, d),
                     MISSING if us is None else f"{o.bound_us(d) / us:.0%}", number(row.get("pytorch_us"), ",.1f"),
                     number(row.get("ratio"), ".2f")])
    return table(["op", "calls", "bound, us", "us", "rate", "of the bound", "PyTorch, us", "PyTorch / kiln"], rows)


def bars(gpu: Gpu, size: str) -> list[Bar]:
    """The step by parts, ms: at the device's peaks, and as measured."""
    d, ops = gpu.device(size), step_ops(shape_of(size))
    measured = {r["op"]: r["us"] for r in gpu.data(f"ops-{size}").get("ops", [])}

    def by_part(us: Callable[[Op], float]) -> dict[str, float]:
        parts: dict[str, float] = {}
        for o in ops:
            parts[o.part] = parts.get(o.part, 0.0) + o.calls * us(o) / 1e3
        return parts

    found = [Bar(f"{size.upper()} B{BATCHES[size]}: bound, not measured", by_part(lambda o: o.bound_us(d)))]
    if all(o.op in measured for o in ops):
        found.append(Bar(f"{size.upper()} B{BATCHES[size]}: measured, ops in a row", by_part(lambda o: measured[o.op])))
    return found


def points(gpu: Gpu, size: str) -> list[Point]:
    measured = {r["op"]: r["us"] for r in gpu.data(f"ops-{size}").get("ops", [])}
    d = gpu.device(size)
    return [Point(o.op, o.part, o.flop / o.n_bytes, o.flop / o.bound_us(d) / 1e6,
                  o.flop / measured[o.op] / 1e6 if o.op in measured else None)
            for o in step_ops(shape_of(size)) if o.flop]


def passes(gpu: Gpu, size: str) -> list[Pass]:
    measured = {r["op"]: r["us"] for r in gpu.data(f"ops-{size}").get("ops", [])}
    return [Pass(o.op, o.part, o.n_bytes / measured[o.op] / 1e3 if o.op in measured else None)
            for o in step_ops(shape_of(size)) if not o.flop]


def gpu_section(gpu: Gpu) -> str:
    if not gpu.file:
        return ("No file of a GPU is there yet: everything about speed on a GPU is not measured. `make bench-gpu` on a "
                f"machine with one writes it. The bounds are those of one {H200.name}: {H200.tflop_per_s:,.0f} TFLOP/s "
                f"and {H200.gb_per_s:,.0f} GB/s, {H200.source}.\n")
    e = gpu.results["environment"]
    stages = goals.of_one_build(gpu.results)
    failed = [f"{name} ({r['result']})" for name, r in stages.items() if r["result"] != "passed"]
    others = [name for name in gpu.results["stages"] if name not in stages]
    rows = [[key, str(e.get(key))] for key in ("gpu", "driver", "driver_cuda", "cublaslt", "nccl", "torch", "commit")]
    d = gpu.device("124m")
    return (table([f"`{gpu.file}`", ""], rows) + f"\nBounds of one {d.name}: {d.tflop_per_s:,.0f} TFLOP/s and "
            f"{d.gb_per_s:,.0f} GB/s, {d.source}. Stages that have not passed: {', '.join(failed) or 'none'}."
            + (f" Left out, of another GPU or build: {', '.join(others)}." if others else "") + "\n")


def cpu_section(name: str, r: Result) -> str:
    m = r["machine"]
    load = r["load_1min_at_start"]
    busy = load > BUSY
    rows = [[g["goal"], f"{g['value']:.3g}", "not judged" if busy else "met" if g["met"] else "not met"]
            for g in r["goals"]]
    return (f"`{name}`: commit {r['commit'][:12]}, {m['cores']} cores of {m['cpu']}, {r['threads']} threads, medians "
            f"of {r['rounds']}." + (f" Not judged: other programs were running (load {load})." if busy else "") + "\n\n"
            + table(["goal", "value", "result"], rows))


def page(gpus: Sequence[Gpu], cpus: Sequence[tuple[str, Result]]) -> dict[str, str]:
    """File in docs/ -> text. The pictures are of the newest GPU."""
    main = gpus[-1]
    text = ["# Performance\n",
            "Written by `make performance-page` from the files in `benchmarks/results/`; do not edit. A bound is what "
            "the device's peaks allow an op, or a step of such ops in a row: computed, not measured "
            "(`scripts/gpu/roofline.py`).\n"]
    for gpu in reversed(gpus):
        text += [f"## {gpu.results['environment']['gpu'] if gpu.file else 'On a GPU'}\n", gpu_section(gpu)]
        text += ["### Goals, for one H200\n", goals_table(gpu), "### Training, beside PyTorch\n", end_to_end(gpu),
                 MFU]
        for size in OPS:
            text += [f"### Ops of a step, {size.upper()} B{BATCHES[size]} T1024 bf16\n", ops_table(gpu, size)]
    text += ["## Where a step goes\n", "![bars of a step's parts](step.svg)\n", "## Roofline\n",
             "![each op of a step under the roofline](roofline.svg)\n"]
    if cpus:
        text += ["## On a CPU, beside PyTorch and oneDNN\n", *(cpu_section(*c) for c in cpus)]
    d = main.device("124m")
    return {"performance.md": "\n".join(text),
            "step.svg": step_svg([bars(main, size) for size in OPS]),
            "roofline.svg": roofline_svg(points(main, "124m"), passes(main, "124m"), d,
                                         f"124M B{BATCHES['124m']} T1024 on one {d.name}")}


def load(folder: Path) -> tuple[list[Gpu], list[tuple[str, Result]]]:
    files = [(path.name, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    gpus: dict[str, Gpu] = {}                                   # the newest file of each, oldest GPU first
    for name, results in sorted((f for f in files if "stages" in f[1]), key=written):
        gpus.pop(results["environment"]["gpu"], None)
        gpus[results["environment"]["gpu"]] = Gpu(name, results)
    return list(gpus.values()) or [Gpu("", {})], [f for f in files if "stages" not in f[1]]


def written(file: tuple[str, Result]) -> str:
    """When its last stage ended, UTC."""
    return max((r.get("time", "") for r in file[1]["stages"].values()), default="")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    a = parser.parse_args()
    for name, text in page(*load(a.results)).items():
        path = a.docs / name
        if not a.check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            print(f"{path} is out of date; make performance-page rewrites it", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
