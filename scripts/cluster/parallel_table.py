#!/usr/bin/env python3
"""Ways of training one model on four hosts, measured beside each other over links of two rates.

    python3 scripts/cluster/parallel_table.py                       measures (below 15 minutes), then writes the page
    python3 scripts/cluster/parallel_table.py --page                writes the page from the newest result alone
    python3 scripts/cluster/parallel_table.py --only DiLoCo --rates 1gbit --steps 5 --out /tmp/x        a short trial

The hosts are cluster.sh's: namespaces of this machine, which share its cores. Writes OUT/four-hosts-<date>.json
(benchmarks/parallel), and the table and the picture of docs/parallelism.md. A method that ./train does not have is in
the table as such. Exit code: 0 done, 1 a run has failed, 2 usage, 3 this machine cannot have such hosts.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts" / "gpu"))
from performance_pictures import INK, svg, text  # noqa: E402

CLUSTER = Path(__file__).with_name("cluster.sh")
TRAIN = Path(os.environ.get("KILN_TRAIN", ROOT / "train")).resolve()
PAGE = ROOT / "docs" / "parallelism.md"
HOSTS = 4
WARM_UP = 3                                                     # steps that are left out
RATES = {"1gbit": "1 Gbit/s", "100mbit": "100 Mbit/s"}
BEGIN, END = "<!-- parallel_table.py -->", "<!-- end -->"
BLUE, RED = "#0b63b0", "#d1570a"
Result = dict[str, Any]
# The model of configs/demo.yaml; a micro-batch for each of four ranks.
SETTINGS = {"train.micro_batch_size": 6, "checkpoint.interval": 0, "device.kind": "cpu",
            "device.threads": 1, "parallel.allreduce": "ordered"}
SERVER = {"parallel.method": "parameter_server", "parallel.servers": 4}
DILOCO = {"parallel.method": "diloco", "parallel.sync_interval": 20}


class Method(NamedTuple):
    name: str
    settings: dict[str, object]
    ranks: int = HOSTS                                          # dealt to the hosts in turn


METHODS = [
    Method("one rank", {}, 1),
    Method("all-reduce", {}),
    Method("all-reduce, overlap", {"parallel.overlap": "true"}),
    Method("ring", {"parallel.allreduce": "ring"}),
    Method("ZeRO-1", {"parallel.zero": 1}),
    Method("parameter server, sync", SERVER, HOSTS + 4),        # the last rank of each host serves
    Method("parameter server, async", SERVER | {"parallel.staleness": 4}, HOSTS + 4),
    Method("DiLoCo", DILOCO),
    Method("DiLoCo, int4, streaming", DILOCO | {"parallel.outer_dtype": "int4", "parallel.streaming": "true"}),
]


def cluster(*words: object) -> str:
    done = subprocess.run([CLUSTER, *map(str, words)], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return done.stdout


def bytes_sent() -> list[int]:
    """By each host, headers included."""
    return [int(line.split()[2]) for line in cluster("bytes").splitlines()]


class RankTimes(threading.Thread):
    """CPU seconds of each rank of a run, read from its first step to its end."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.over = threading.Event()
        self.seen: dict[int, list[tuple[float, float]]] = {}    # of each rank: (clock, CPU seconds)

    def run(self) -> None:
        name = f"run.name={self.folder.name}".encode()
        while not self.over.wait(0.1) and not self.has("status.json", '"complete"'):
            if not self.has("metrics.jsonl", '"step_ms"'):
                continue
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    command = (process / "cmdline").read_bytes().split(b"\0")
                    if command[0] != str(TRAIN).encode() or name not in command:
                        continue
                    rank = re.search(rb"(?:^|\0)PMI_RANK=(\d+)", (process / "environ").read_bytes())
                    ticks = sum(map(int, (process / "stat").read_text().rsplit(")", 1)[1].split()[11:13]))
                except OSError:                                 # it has ended
                    continue
                if rank:
                    times = self.seen.setdefault(int(rank[1]), [])
                    times.append((time.monotonic(), ticks / os.sysconf("SC_CLK_TCK")))

    def has(self, file: str, words: str) -> bool:
        path = self.folder / file
        return path.exists() and words in path.read_text()

    def shares(self) -> list[float]:
        """CPU seconds per second of each rank, from its first reading to its last."""
        self.over.set()
        self.join()
        return [(t[-1][1] - t[0][1]) / max(t[-1][0] - t[0][0], 1e-9) for _, t in sorted(self.seen.items())]


def measure(method: Method, steps: int, data: Path, runs: Path) -> Result | None:
    """None: this build does not have the method."""
    name = re.sub(r"\W+", "-", method.name)
    shutil.rmtree(runs / name, ignore_errors=True)
    settings = {
        "run.name": name, "run.out_dir": runs, "data.train": f"[{data}/train_*.bin]", "data.val": f"[{data}/val_*.bin]",
        "data.tokenizer": data / "tokenizer.json", "train.max_steps": steps, "eval.interval": steps,
        "schedule.warmup_steps": steps // 10,
    } | SETTINGS | method.settings
    words = [w for key, value in settings.items() for w in ("--set", f"{key}={value}")]
    config = ROOT / "configs" / "demo.yaml"
    before, times = bytes_sent(), RankTimes(runs / name)
    times.start()
    done = subprocess.run([CLUSTER, "run", "-np", str(method.ranks), TRAIN, "--config", config, *words],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    shares, sent = times.shares(), [now - then for now, then in zip(bytes_sent(), before, strict=True)]
    if done.returncode == 2 and "not available in this build" in done.stderr:
        return None
    if done.returncode != 0:
        sys.exit(f"{method.name}: exit {done.returncode}\n{done.stderr}")
    records = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    taken = [r for r in records if r["type"] == "step"]
    timed = taken[WARM_UP:] or taken
    return {"seconds": sum(r["step_ms"] for r in taken) / 1e3,
            "step_ms": mean(r["step_ms"] for r in timed),
            "exposed_ms": mean(r["phase_ms"]["exposed"] for r in timed),
            "bytes_sent": [n / steps for n in sent],            # by each host, per step
            "val_loss": [r["val_loss"] for r in records if r["type"] == "eval"][-1],
            "cpu": shares}


def measure_all(rates: Sequence[str], methods: Sequence[Method], steps: int) -> Result:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    results: Result = {"date": datetime.date.today().isoformat(), "commit": commit.stdout.strip(), "steps": steps,
                       "cores": os.cpu_count(), "load_before": os.getloadavg()[0], "hosts": HOSTS, "rates": {}}
    with tempfile.TemporaryDirectory(prefix="kiln-parallel-") as folder:
        data, runs = Path(folder, "data"), Path(folder, "runs")
        subprocess.run([sys.executable, ROOT / "scripts" / "prepare_data.py", "--python-stdlib", "--out", data],
                       check=True, stdout=subprocess.DEVNULL)
        os.environ["CLUSTER"] = f"{folder}/hosts"
        cluster("up", HOSTS)
        try:
            for rate in rates:
                for host in range(1, HOSTS + 1):
                    cluster("rate", host, rate)
                rows = results["rates"][rate] = {}
                for method in methods:
                    begin = time.monotonic()
                    rows[method.name] = measure(method, steps, data, runs)
                    print(f"{rate}  {method.name}: {time.monotonic() - begin:.1f} s", flush=True)
        finally:
            cluster("down")
    return results


def table(rows: dict[str, Result | None]) -> list[str]:
    lines = ["| method | ms per step | of these exposed communication | MB sent per step by each host | val loss "
             "| CPU of each rank |", "|---|--:|--:|--:|--:|---|"]
    for name, r in rows.items():
        if r is None:
            lines.append(f"| {name} | not in this build | | | | |")
            continue
        sent = sorted(n / 1e6 for n in r["bytes_sent"])
        spread = f"{sent[0]:.2f} to {sent[-1]:.2f}" if sent[-1] > 1.1 * sent[0] + 0.005 else f"{sent[-1]:.2f}"
        lines.append(f"| {name} | {r['step_ms']:,.1f} | {r['exposed_ms']:,.1f} | {spread} | {r['val_loss']:.3f} | "
                     + ", ".join(f"{share:.0%}" for share in r["cpu"]) + " |")
    return lines


def picture(results: Result) -> str:
    """A bar for each method, exposed communication at its end; each rate has a scale of its own."""
    left, wide, y, parts = 190, 520, 10, []
    for rate, rows in results["rates"].items():
        known = {name: r for name, r in rows.items() if r}
        longest = max(r["step_ms"] for r in known.values())
        parts.append(text(left, y + 14, f"{RATES.get(rate, rate)}: milliseconds of a step"))
        for name, r in known.items():
            y += 24
            exposed = wide * r["exposed_ms"] / longest
            compute = wide * r["step_ms"] / longest - exposed
            parts += [text(left - 8, y + 13, name, "end", 11),
                      f'<rect x="{left}" y="{y}" width="{compute:.1f}" height="17" fill="{BLUE}"/>',
                      f'<rect x="{left + compute:.1f}" y="{y}" width="{exposed:.1f}" height="17" fill="{RED}"/>',
                      text(left + compute + exposed + 6, y + 13, f"{r['step_ms']:,.0f}", size=11)]
        y += 40
    for x, colour, words in ((left, BLUE, "compute, and what it hides"), (left + 220, RED, "exposed communication")):
        parts += [f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}" stroke="{INK}" stroke-width="0"/>',
                  text(x + 17, y + 11, words)]
    return svg(800, y + 24, parts)


def write_page(results: Result, page: Path) -> None:
    """Replaces the part of the page between BEGIN and END; without a page, writes one."""
    body = [BEGIN, f"Measured on {results['date']} with {results['commit']}: the model of configs/demo.yaml, "
            f"{results['steps']} steps of 24 sequences, {results['hosts']} hosts that share {results['cores']} cores "
            "(scripts/cluster), on each a rank with one thread and, of the parameter servers' runs, a server, which is "
            "one of the last four ranks. Bytes are the interfaces' own count, headers and start included. CPU is the "
            "share of the time that a rank had a core, also for asking whether a message has come.\n",
            "![milliseconds of a step by method](parallelism.svg)\n"]
    for rate, rows in results["rates"].items():
        body += [f"### Links of {RATES.get(rate, rate)}\n", *table(rows), ""]
    old = page.read_text() if page.exists() else f"# Many devices, and the cost of each way\n\n{BEGIN}\n{END}\n"
    if BEGIN not in old or END not in old:
        sys.exit(f"{page}: no lines {BEGIN} and {END}, between which the table goes")
    head, rest = old.split(BEGIN, 1)
    page.write_text(head + "\n".join(body) + "\n" + END + rest.split(END, 1)[1])
    page.with_suffix(".svg").write_text(picture(results))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rates", nargs="+", default=list(RATES), metavar="RATE", help="as tc writes them")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="methods whose names contain one of these")
    parser.add_argument("--out", type=Path, help="also for the page; default: benchmarks/parallel and docs")
    args = parser.parse_args()
    out = args.out or ROOT / "benchmarks" / "parallel"
    out.mkdir(parents=True, exist_ok=True)
    if not args.page:
        methods = [m for m in METHODS if not args.only or any(name in m.name for name in args.only)]
        results = measure_all(args.rates, methods, args.steps)
        (out / f"four-hosts-{results['date']}.json").write_text(json.dumps(results, indent=1) + "\n")
    files = sorted(out.glob("four-hosts-*.json"))
    if not files:
        parser.error(f"no {out}/four-hosts-*.json yet; run without --page")
    write_page(json.loads(files[-1].read_text()), args.out / PAGE.name if args.out else PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
