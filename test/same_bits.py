#!/usr/bin/env python3
"""Proves that a change of structure alters no bits: records the numbers of short runs, and compares two records.

    python3 test/same_bits.py record --build DIR --out before.txt --keep CHECKPOINTS      before the change
    python3 test/same_bits.py record --build DIR --out after.txt --load CHECKPOINTS       after it
    python3 test/same_bits.py compare before.txt after.txt

DIR holds `train` and `train-emulated`: a checkout after `make all emulated`, or its build/release.  Both records must
come from one machine, because another instruction set gives other bits.  A record has the digits of every loss,
gradient norm and evaluation, the hashes of weights and checkpoints, and generated text; it has no time, path or commit.

With --load, the commands that read a checkpoint (eval, generate, resume) read the one that --keep saved.  Equal records
then also prove that checkpoints of before the change load after it.

This script imports nothing from the tests: an edit of a test must not change a record.
"""

from __future__ import annotations

import argparse
import array
import hashlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

CORES = len(os.sched_getaffinity(0))
MPIRUN = os.environ.get("MPIRUN") or shutil.which("mpirun.mpich") or "mpirun"
TIMEOUT_S = 120  # of one command
Settings = dict[str, object]

# M = global_batch_size / micro_batch_size = 12 = 2^2 * 3 micro-batches: `ordered` sums runs of 3, on up to 4 ranks.
BASE: Settings = {
    "run.seed": 7,
    "device.threads": 2,
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 32,
    "model.context_length": 16,
    "model.vocab_size": 257,
    "data.train": ["data/train_*.bin"],
    "data.val": ["data/val.bin"],
    "data.tokenizer": "data/tokenizer.json",
    "train.max_steps": 10,
    "train.global_batch_size": 24,
    "train.micro_batch_size": 2,
    "optimizer.learning_rate": 1e-2,
    "eval.interval": 5,
    "eval.tokens": 400,
    "checkpoint.interval": 10,
}
GPU: Settings = {"device.kind": "cuda", "train.max_steps": 3, "train.global_batch_size": 8, "eval.interval": 3}
BF16: Settings = {"device.dtype": "bf16"}
# Large enough that the CPU's threads share the work of every op.
WIDE: Settings = {"model.n_head": 4, "model.n_embd": 128, "model.context_length": 64, "train.micro_batch_size": 4}
# Heads of 64 columns, which sm90 needs, and two tiles of 128 queries.
HEADS: Settings = BF16 | {"model.n_layer": 1, "model.n_embd": 128, "model.context_length": 192,
                          "train.global_batch_size": 2, "train.micro_batch_size": 1}  # fmt: skip
DECAY: Settings = {"schedule.warmup_steps": 3, "schedule.decay_steps": 15}

# The commands that read the checkpoint of a run.
AFTER: dict[str, list[str]] = {
    "eval": ["eval"],
    "generate": ["generate", "--prompt", "ab", "--max-tokens", "48", "--temperature", "0.8", "--seed", "7"],
    "resume": ["--resume"],  # to twice the steps
}
ALL = tuple(AFTER)
# The fields of metrics.jsonl that a record holds, by type of line.
FIELDS = {
    "step": ("loss", "grad_norm"),
    "eval": ("val_loss", "perplexity", "accuracy", "tokens"),
    "sample": ("prompt", "text"),
}


@dataclass(frozen=True)
class Case:
    """A run to record, and the commands of AFTER that follow it."""

    name: str
    settings: Settings = field(default_factory=dict)
    np: int = 1
    gpus: int = 0  # emulated; 0: the run is on the CPU
    after: tuple[str, ...] = ()

    def config(self) -> Settings:
        return BASE | ({"device.kind": "cpu"} if self.gpus == 0 else GPU) | self.settings


def by(allreduce: str) -> Settings:
    return {"parallel.allreduce": allreduce}


CASES = (
    Case("cpu-1", {"eval.sample_prompts": ["ab", ""]}, after=ALL),
    Case("cpu-2-ordered", by("ordered"), np=2, after=("eval", "resume")),
    Case("cpu-4-ordered", by("ordered"), np=4),
    Case("cpu-2-mpi", by("mpi"), np=2, after=("resume",)),
    Case("cpu-4-mpi", by("mpi"), np=4),
    Case("cpu-2-ring", by("ring"), np=2),
    Case("cpu-4-ring", by("ring"), np=4, after=("resume",)),
    Case("cpu-3-auto", np=3),
    Case("cpu-dropout", {"model.dropout": 0.1}, np=2, after=ALL),
    Case("cpu-recompute-gelu", {"train.recompute": "gelu", "model.dropout": 0.1}),
    Case("cpu-recompute-block", {"train.recompute": "block", "model.dropout": 0.1}),
    Case("cpu-adam-cosine", DECAY | {"optimizer.name": "adam", "schedule.name": "cosine"}, after=("resume",)),
    Case("cpu-sgd-linear", DECAY | {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "schedule.name": "linear"},
         after=("resume",)),
    Case("cpu-wsd-no-clip", {"schedule.name": "wsd", "schedule.decay_steps": 4, "train.grad_clip": 0}),
    Case("cpu-no-bias", {"model.bias": False}, after=ALL),
    Case("cpu-two-epochs", {"train.global_batch_size": 48, "data.shuffle": False}, np=2),
    Case("cpu-wide", WIDE | {"train.max_steps": 3, "model.dropout": 0.1}),
    Case("gpu-fp32-1", gpus=1, after=ALL),
    Case("gpu-fp32-2-nccl", by("nccl"), np=2, gpus=2, after=("eval",)),
    Case("gpu-fp32-2-shared", by("ordered"), np=2, gpus=1),
    Case("gpu-fp32-sgd", {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "model.bias": False}, gpus=1),
    Case("gpu-bf16-1", BF16, gpus=1, after=ALL),
    Case("gpu-bf16-2-nccl", BF16 | by("nccl"), np=2, gpus=2, after=("resume",)),
    Case("gpu-bf16-2-ordered", BF16 | by("ordered"), np=2, gpus=2, after=("eval", "resume")),
    Case("gpu-bf16-dropout-gelu", BF16 | {"model.dropout": 0.1, "train.recompute": "gelu"}, gpus=1),
    Case("gpu-bf16-adam-block", BF16 | {"optimizer.name": "adam", "train.recompute": "block", "model.bias": False},
         gpus=1),
    Case("gpu-bf16-no-graph", BF16 | {"device.graph": "off"}, gpus=1),
    Case("gpu-portable", HEADS | {"device.attention": "portable"}, gpus=1),
    Case("gpu-sm90", HEADS | {"device.attention": "sm90"}, gpus=1, after=ALL),
)  # fmt: skip


def shard(n_tokens: int, seed: int) -> bytes:
    """Letters and spaces, in the layout of llm.c's shards."""
    r = random.Random(seed)
    tokens = [r.randrange(97, 123) if r.random() < 0.8 else 32 for _ in range(n_tokens)]
    return struct.pack("<256i", 20240520, 1, n_tokens, *[0] * 253) + array.array("H", tokens).tobytes()


def write_data(folder: Path) -> None:
    folder.mkdir()
    (folder / "train_0.bin").write_bytes(shard(4000, 1))
    (folder / "train_1.bin").write_bytes(shard(3001, 2))
    (folder / "val.bin").write_bytes(shard(601, 3))
    (folder / "tokenizer.json").write_text('{"type": "bytes", "vocab_size": 257, "end_of_text": 256}')


def config_text(settings: Settings) -> str:
    """{"a.b": value} as nested JSON, which is YAML too."""
    sections: dict[str, Settings] = {}
    for key, value in settings.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return json.dumps(sections, indent=1)


class Recorder:
    """Runs cases in a folder of its own.  Paths in configs are relative to it: a resume refuses another data.train."""

    def __init__(self, root: Path, train: Path, emulated: Path, keep: Path | None, load: Path | None) -> None:
        self.root, self.train, self.emulated, self.keep, self.load = root, train, emulated, keep, load
        write_data(root / "data")

    def command(self, case: Case, flags: Sequence[str], settings: Settings, np: int) -> bytes:
        """Runs the program and returns its standard output."""
        config = self.root / f"{case.name}.yaml"
        config.write_text(config_text(settings | {"run.name": case.name}))
        launcher = [MPIRUN, "-np", str(np)] if np > 1 else []
        command = [*launcher, str(self.emulated if case.gpus else self.train), *flags, "--config", config.name]
        # Matrix products are chosen by timing: on the emulator's own clock, and with a cache that only this case has.
        env = {k: v for k, v in os.environ.items() if not k.startswith("KILN_")} | {
            "OMP_WAIT_POLICY": "passive",
            "XDG_CACHE_HOME": str(self.root / "cache" / case.name),
            "KILN_EMULATOR_CLOCK": "1",
            "KILN_EMULATOR_DEVICES": str(case.gpus),
        }
        p = subprocess.run(command, env=env, cwd=self.root, capture_output=True, timeout=TIMEOUT_S,
                           stdin=subprocess.DEVNULL)  # fmt: skip
        if p.returncode != 0:
            error = p.stderr.decode(errors="replace")
            raise SystemExit(f"{case.name}: exit {p.returncode}, expected 0, of {' '.join(command)}\n{error}")
        return p.stdout

    def record(self, case: Case) -> str:
        """Trains, then runs the commands of `after`; returns a section of the record for each."""
        settings = case.config()
        steps = int(str(settings["train.max_steps"]))
        checkpoints = self.root / "runs" / case.name / "checkpoints"
        self.command(case, [], settings, case.np)
        text = section(case.name, trained(checkpoints.parent, after_step=0))
        if self.keep and case.after:
            shutil.copytree(checkpoints, self.keep / case.name, symlinks=True)
        if self.load and case.after:
            shutil.rmtree(checkpoints)
            shutil.copytree(self.load / case.name, checkpoints, symlinks=True)
        for name in case.after:
            more = {"train.max_steps": 2 * steps} if name == "resume" else {}
            out = self.command(case, AFTER[name], settings | more, 1 if name == "generate" else case.np)
            lines = trained(checkpoints.parent, steps) if name == "resume" else printed(name, out)
            text += section(f"{case.name}, {name}", lines)
        return text


def section(name: str, lines: Sequence[str]) -> str:
    return "\n".join([f"[{name}]", *lines, "", ""])


def printed(command: str, out: bytes) -> list[str]:
    """The lines of a record for a command that prints its result."""
    if command == "generate":
        return [f"text {out!r}"]
    (line,) = re.findall(r"val loss .*", out.decode())
    return [line]


def trained(run: Path, after_step: int) -> list[str]:
    """The lines of a record for the steps of a run after this one."""
    lines = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        r = json.loads(line, parse_float=str, parse_int=str)  # numbers as they stand in the file
        if r["type"] in FIELDS and int(r["step"]) > after_step:
            values = [f"{name} {r[name]}" for name in FIELDS[r["type"]]]
            lines.append(" ".join([r["type"], r["step"], *values]).encode("unicode_escape").decode())
    lines.append(re.findall(r"complete at step \d+, weights \w+", (run / "train.log").read_text())[-1])
    last = max((run / "checkpoints").glob("step_*"), key=lambda p: int(p.name.removeprefix("step_")))
    for file in ("model.safetensors", "optimizer.safetensors"):
        lines.append(f"{last.name}/{file} {hashlib.sha256((last / file).read_bytes()).hexdigest()}")
    return lines


def record(args: argparse.Namespace) -> int:
    train, emulated = args.train or args.build / "train", args.emulated or args.build / "train-emulated"
    for program in (train, emulated):
        if not os.access(program, os.X_OK):
            raise SystemExit(f"{program}: no such program; build it (make all emulated), or give --train, --emulated")
    if args.keep and args.keep.exists():
        raise SystemExit(f"--keep {args.keep}: exists; give a new folder")
    with tempfile.TemporaryDirectory(prefix="kiln-same-bits-") as root:
        paths = [p and p.resolve() for p in (train, emulated, args.keep, args.load)]
        recorder = Recorder(Path(root), *paths)
        with ThreadPoolExecutor(CORES) as pool:
            sections = list(pool.map(recorder.record, CASES))
    args.out.write_text("".join(sections))
    print(f"{args.out}: {sum(1 + len(case.after) for case in CASES)} runs")
    return 0


def sections_of(path: Path) -> dict[str, list[str]]:
    """Name of a run -> its lines."""
    sections: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("["):
            lines = sections.setdefault(line, [])
        elif line:
            lines.append(line)
    return sections


def compare(args: argparse.Namespace) -> int:
    a, b = sections_of(args.a), sections_of(args.b)
    if not a or not b:
        raise SystemExit(f"{args.b if a else args.a}: holds no run; expected a record, which `record` writes")
    n_different = 0
    for name in a | b:
        if a.get(name) == b.get(name):
            continue
        n_different += 1
        both = [[*sections.get(name, []), "(nothing)"] for sections in (a, b)]
        first, second = next((x, y) for x, y in zip(*both, strict=False) if x != y)
        print(f"{name}\n  {args.a}: {first}\n  {args.b}: {second}")
    print(f"{len(a | b)} runs, {f'{n_different} differ' if n_different else 'the same bits'}")
    return 1 if n_different else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    r = commands.add_parser("record", help="run the cases and write a record")
    r.add_argument("--build", type=Path, default=Path("."), help="folder of train and train-emulated")
    r.add_argument("--train", type=Path, help="instead of BUILD/train")
    r.add_argument("--emulated", type=Path, help="instead of BUILD/train-emulated")
    r.add_argument("--out", type=Path, required=True, help="the record to write")
    r.add_argument("--keep", type=Path, help="new folder, for the checkpoints that eval, generate and resume read")
    r.add_argument("--load", type=Path, help="read those of this folder, which --keep made")
    r.set_defaults(run=record)
    c = commands.add_parser("compare", help="exit 0 when two records are equal, else 1")
    c.add_argument("a", type=Path)
    c.add_argument("b", type=Path)
    c.set_defaults(run=compare)
    args = parser.parse_args()
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
