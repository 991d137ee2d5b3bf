#!/usr/bin/env python3
"""Two ranks: what overlap hides and what it costs, and ZeRO-1 beside whole updates.  Writes OUT/two-ranks-<date>.json.

    python3 scripts/cluster/bench_parallel.py          a few minutes; needs root and iproute2, as cluster.sh does

Runs alternate in rounds; the figures are medians over rounds of each run's median step.  Without a limit both ranks
are on this machine; with one they are two hosts of cluster.sh. `fits` is the communication of a step without overlap,
or the backward pass where this is shorter; `hidden` the part of `fits` that overlap takes out of phase_ms.exposed.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import parallel_table as four
from parallel_table import CLUSTER, ROOT, TRAIN, cluster

# 1.7 million parameters; a micro-batch of 12 sequences of 64 for each rank.
SETTINGS = {"model.n_layer": 8, "train.micro_batch_size": 12, "checkpoint.interval": 0, "eval.interval": 0,
            "device.kind": "cpu", "device.threads": 1, "parallel.allreduce": "ordered", "schedule.warmup_steps": 5}
WAYS: dict[str, dict[str, object]] = {"all-reduce": {}, "overlap": {"parallel.overlap": "true"},
                                      "ZeRO-1": {"parallel.zero": 1}}


def run(launch: list[str], way: str, steps: int, folder: Path) -> dict[str, float]:
    settings = SETTINGS | WAYS[way] | {
        "run.name": "run", "run.out_dir": folder, "train.max_steps": steps, "data.val": "[]",
        "data.train": f"[{folder}/data/train_*.bin]", "data.tokenizer": folder / "data" / "tokenizer.json"}
    words = [w for key, value in settings.items() for w in ("--set", f"{key}={value}")]
    subprocess.run([*launch, "-np", "2", TRAIN, "--config", ROOT / "configs" / "demo.yaml", "--overwrite", *words],
                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    taken = [r for r in map(json.loads, lines) if r["type"] == "step"][four.WARM_UP:]
    return {"step_ms": median(r["step_ms"] for r in taken),
            **{phase: median(r["phase_ms"][phase] for r in taken) for phase in ("backward", "exposed")}}


def rounds(launch: list[str], n_rounds: int, steps: int, folder: Path) -> dict[str, dict[str, float]]:
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for i in range(n_rounds):
        for way in WAYS if i % 2 == 0 else reversed(WAYS):
            taken[way].append(run(launch, way, steps, folder))
    return {way: {key: median(r[key] for r in all_runs) for key in all_runs[0]} for way, all_runs in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", default="1gbit", help="of the two hosts' links")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "parallel")
    args = parser.parse_args()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    cpu = next(line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    results: dict[str, Any] = {"date": datetime.date.today().isoformat(), "commit": commit.stdout.strip(), "cpu": cpu,
                               "cores": os.cpu_count(), "load_before": os.getloadavg()[0], "rounds": args.rounds,
                               "steps": args.steps, "settings": SETTINGS}
    with tempfile.TemporaryDirectory(prefix="kiln-parallel-") as name:
        folder = Path(name)
        subprocess.run([sys.executable, ROOT / "scripts" / "prepare_data.py", "--python-stdlib", "--out",
                        folder / "data"], check=True, stdout=subprocess.DEVNULL)
        results["no limit"] = rounds([os.environ.get("MPIRUN", "mpirun")], args.rounds, args.steps, folder)
        os.environ["CLUSTER"] = f"{folder}/hosts"
        cluster("up", 2, args.rate)
        try:
            results[args.rate] = rounds([str(CLUSTER), "run"], args.rounds, args.steps, folder)
        finally:
            cluster("down")
    for link in ("no limit", args.rate):
        ways = results[link]
        plain, overlap = ways["all-reduce"], ways["overlap"]
        fits = min(plain["exposed"], plain["backward"])
        ways["ratios"] = {"overlap to all-reduce": overlap["step_ms"] / plain["step_ms"],
                          "ZeRO-1 to all-reduce": ways["ZeRO-1"]["step_ms"] / plain["step_ms"],
                          "hidden of what fits": (plain["exposed"] - overlap["exposed"]) / fits}
        print(link, json.dumps(ways, indent=1))
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"two-ranks-{results['date']}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
