"""The stages of gpu_check.py that are right or wrong, and what all stages work with; gpu_speed.py has those that
measure speed. gpu_check.py says what each stage is, runs them and keeps their results.

Programs come from bin/ in a bundle and from build/release/ (KILN_BUILD) in a checkout. A stage returns its headline and
its data; where a check does not hold it raises Failed, with what it has measured until then.
"""
from __future__ import annotations

import array
import functools
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
BUNDLE = (ROOT / "bin" / "train").exists()
BIN = ROOT / "bin" if BUNDLE else Path(os.environ.get("KILN_BUILD", ROOT / "build" / "release"))


@functools.cache
def cuda_libraries() -> str:
    """The folders of CUDA's libraries, joined by colons: KILN_CUDA_LIBRARIES, or looked for once. cuda_libraries.sh
    names on stderr the library that is missing; the stages then report the failure."""
    known = os.environ.get("KILN_CUDA_LIBRARIES")
    if known is not None:
        return known
    return subprocess.run([SCRIPTS / "gpu" / "cuda_libraries.sh"], stdout=subprocess.PIPE, text=True).stdout.strip()


STAGE_SECONDS = float(os.environ.get("STAGE_SECONDS", 470))
# GPT-2's layers, heads, width; scripts/pytorch/bench_pytorch.py takes them from here.
SIZES = {"124m": (12, 12, 768), "350m": (24, 16, 1024), "774m": (36, 20, 1280), "1558m": (48, 25, 1600)}
BATCHES = {"124m": 64, "350m": 32, "774m": 32, "1558m": 16}    # sequences of a step where speed is measured
OPTIONS = {"BATCH": 0, "ROUNDS": 5, "DEMO_STEPS": 1500}         # numbers from the environment, and their defaults
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZERS = ("/usr/local/cuda/bin/compute-sanitizer",)         # where it is when neither PATH nor CUDA_HOME has it
# The sanitizers run the tests of ops, which are small; tests of whole models are not.
OP_TESTS = "*test/kernels/*"                                    # source files
# Left out: two that ask for memory that no machine has, an error on purpose; two that run hundreds of times what others
# run once.
NOT_SANITIZED = ("backend: no memory is an error*", "backend: no pinned memory is an error*",
                 "attention sm90: random shapes*", "attention sm90: the same bits 100 times*")
# Almost nothing but the library's products, which only memcheck looks at.
PRODUCTS = ("linear forward: every backend*", "linear backward: every backend*")
DOCTEST = re.compile(r"test cases:\s*\d+ \|\s*(\d+) passed \|\s*(\d+) failed")
FAILING = re.compile(r"TEST CASE:\s*(.*)")
OUT_OF_MEMORY = 7
Data = dict[str, Any]


class Failed(Exception):
    """A stage's check did not hold; the text is its headline."""


class TimedOut(Exception):
    """The stage's time was over before it was done, and nothing wrong was seen until then."""


class Skipped(Exception):
    """The stage cannot run here, which is no fault of kiln's."""


class Gpu(NamedTuple):
    name: str
    capability: str
    memory_bytes: int
    driver_cuda: str                                            # the newest CUDA that the driver knows
    why: str                                                    # it cannot be used; empty where it can


# ---- running programs -----------------------------------------------------------------------------------------------

def option(name: str) -> int:
    return int(os.environ.get(name) or OPTIONS[name])


def torch_python() -> str:
    return os.environ.get("KILN_TORCH_PYTHON", sys.executable)


def kiln_env() -> dict[str, str]:
    """For our programs alone: PyTorch brings its own libraries."""
    path = ":".join(filter(None, (cuda_libraries(), os.environ.get("LD_LIBRARY_PATH", ""))))
    return {**os.environ, "LD_LIBRARY_PATH": path} if path else dict(os.environ)


class Stage:
    """The means of a running stage: a log, a folder that is removed after the stage, a deadline."""

    def __init__(self, name: str, gpu: Gpu, log: Path, work: Path, seconds: float = STAGE_SECONDS) -> None:
        self.name, self.gpu, self.log, self.work = name, gpu, log, work
        self.seconds, self.deadline = seconds, time.monotonic() + seconds

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, command: Sequence[object], limit_s: float,
            env: dict[str, str] | None = None) -> tuple[int, str]:
        """Exit code and output of a command; 124 where it ran past limit_s or the stage's end. It dies with all that
        it has started."""
        words = [str(w) for w in command]
        limit = max(1.0, min(limit_s, self.left()))
        with open(self.log, "a+") as out:
            out.write(f"$ {' '.join(words)}\n")
            out.flush()
            start = out.tell()
            try:
                child = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                         cwd=self.work, env=env or kiln_env(), start_new_session=True)
            except OSError as e:
                raise Failed(f"{words[0]}: {e.strerror}") from e
            try:
                code = child.wait(limit)
            except subprocess.TimeoutExpired:
                code = 124
            finally:
                end(child)
            out.seek(start)
            text = out.read()
            out.write(f"[exit {code}]\n")
        return code, text

    def program(self, name: str) -> Path:
        path = BIN / name
        if not path.exists():
            raise Failed(f"{path} is missing; build it first: make gpu-check")
        return path

    def mpirun(self, n: int) -> list[str]:
        bundled = BIN / "mpirun"
        found = str(bundled) if BUNDLE else (os.environ.get("MPIRUN") or shutil.which("mpirun.mpich")
                                             or shutil.which("mpirun") or "mpirun")
        return [found, "-np", str(n)]

    def checked(self, what: str, command: Sequence[object], limit_s: float) -> str:
        code, text = self.run(command, limit_s)
        if code != 0:
            raise Failed(f"{what}: {reason(code, text)}")
        return text

    def train(self, name: str, settings: Data, ranks: int = 1, config: Path | None = None,
              limit_s: float = 300, env: dict[str, str] | None = None) -> list[Data]:
        """The records of a training run."""
        if config is None:
            config = self.work / f"{name}.yaml"
            sections: dict[str, Data] = {"run": {"name": name}}
            for key, value in settings.items():
                section, _, field = key.partition(".")
                sections.setdefault(section, {})[field] = value
            config.write_text("\n".join(f"{s}: {json.dumps(v)}" for s, v in sections.items()))
            words: list[str] = []
        else:
            words = [w for k, v in ({"run.name": name} | settings).items() for w in ("--set", f"{k}={v}")]
        launch = self.mpirun(ranks) if ranks > 1 else []
        code, text = self.run([*launch, self.program("train"), "--config", config, "--overwrite", *words], limit_s,
                              kiln_env() | (env or {}))
        if code != 0:
            error = MemoryError if code == OUT_OF_MEMORY else Failed
            raise error(f"train {name}: {reason(code, text)}")
        return self.records(name)

    def records(self, run: str) -> list[Data]:
        return [json.loads(line) for line in (self.work / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def end(child: subprocess.Popen) -> None:
    for s in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, s)
        except ProcessLookupError:
            break
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def reason(code: int, text: str) -> str:
    if code == 124:
        return "ran out of time"
    errors = [line.strip() for line in text.splitlines() if "error" in line.lower()]
    last = [line.strip() for line in text.splitlines() if line.strip()][-1:]
    return f"exit {code}: {(errors[-1:] or last or ['no output'])[0][:300]}"


def quietly(*command: str, env: dict[str, str] | None = None) -> str:
    """Standard output, or nothing where the command fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
        return done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        return ""


def last_json(text: str) -> Data:
    """The last line of a program's output that is a JSON object: warnings may follow it."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                found: Data = json.loads(line)
                return found
            except ValueError:
                continue
    raise Failed(f"no result in the output, which ends {text[-200:]!r}")


# ---- stages: each returns (headline, data) --------------------------------------------------------------------------

def suite(s: Stage, data: Data, bad: list[str], name: str, program: str, limit_s: float, launch: Sequence[str] = (),
          arguments: Sequence[str] = ()) -> None:
    """Runs a program of tests: its counts go into data[name], and why it has not passed into `bad`."""
    try:
        code, text = s.run([*launch, s.program(program), *arguments], limit_s)
    except Failed as e:
        bad.append(f"{name}: {e}")
        return
    counts = [(int(passed), int(failed)) for passed, failed in DOCTEST.findall(text)]     # one line of each rank
    failing = sorted(set(FAILING.findall(text)))
    data[name] = {"exit": code, "passed": sum(c[0] for c in counts), "failed": sum(c[1] for c in counts),
                  "failing": failing[:50]}
    if code != 0 or not data[name]["passed"]:
        bad.append(f"{name}: {f'{len(failing)} failed' if failing else reason(code, text)}")


def tests(s: Stage) -> tuple[str, Data]:
    data: Data = {}
    bad: list[str] = []
    # Hopper's own instructions exist only in code for 9.0a, which no other GPU runs.
    suite(s, data, bad, "instructions", "test_isa_sm90_native" if s.gpu.capability == "9.0" else "test_isa_native", 60)
    suite(s, data, bad, "ops and model", "test_native", 330)
    suite(s, data, bad, "communication, 2 ranks", "test_mpi_native", 120, s.mpirun(2))
    try:
        data["2 ranks on one GPU"] = two_ranks(s)
    except (Failed, MemoryError) as e:
        bad.append(str(e))
    if bad:
        raise Failed("; ".join(bad), data)
    return f"{sum(v.get('passed', 0) for v in data.values())} passed; 2 ranks on one GPU as 1 rank", data


def tiny(s: Stage) -> Data:
    shard = write_tokens(s.work / "tiny.bin", 40_000, 257)
    return {"device": {"kind": "cuda", "dtype": "bf16"},
            "model": {"n_layer": 2, "n_head": 2, "n_embd": 64, "context_length": 64, "vocab_size": 257, "dropout": 0.1},
            "data": {"train": [shard]}, "train": {"max_steps": 20, "global_batch_size": 8, "micro_batch_size": 2},
            "optimizer": {"learning_rate": 1e-3}, "parallel": {"allreduce": "ordered"}}


def two_ranks(s: Stage) -> Data:
    """The promise of the ordered reduction: the loss does not depend on the number of ranks, not in one bit."""
    config = flat(tiny(s))
    losses: dict[int, list[float]] = {}
    for ranks in (1, 2, 2):
        records = s.train(f"ranks{ranks}", config, ranks, limit_s=90)
        now = [r["loss"] for r in records if r["type"] == "step"]
        if losses.setdefault(ranks, now) != now:
            raise Failed("two ranks on one GPU: a repeated run has another loss", {"losses": [losses[ranks], now]})
    if losses[1] != losses[2]:
        raise Failed(f"two ranks on one GPU: loss {losses[2][-1]} where one rank has {losses[1][-1]}")
    return {"steps": len(losses[1]), "last_loss": losses[1][-1]}


def flat(sections: dict) -> Data:
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def read_config(path: Path, overrides: Sequence[str] = ()) -> Data:
    """A config of kiln's configs/ as {"section.key": value}: sections of keys, each with one value on its line."""

    def value(text: str) -> Any:
        text = text.strip()
        if text.startswith("["):
            return [value(part) for part in text[1:-1].split(",")]
        words = {"true": True, "false": False}
        for kind in (words.__getitem__, int, float):
            try:
                return kind(text)
            except (KeyError, ValueError):
                continue
        return text.strip("'\"")

    found, section = {}, ""
    for line in path.read_text().splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).rstrip()
        if match := re.fullmatch(r"(\w+):", line):
            section = match[1]
        elif match := re.fullmatch(r"  (\w+): *(.+)", line):
            found[f"{section}.{match[1]}"] = value(match[2])
        elif line:
            raise ValueError(f"{path}: not understood: {line}")
    for override in overrides:
        key, _, text = override.partition("=")
        found[key] = value(text)
    return found


def write_tokens(path: Path, n: int, vocabulary: int) -> str:
    """A shard of random tokens: speed does not depend on the text."""
    r = random.Random(vocabulary)
    path.write_bytes(struct.pack("<256i", 20240520, 1, n, *[0] * 253)
                     + array.array("H", r.choices(range(vocabulary), k=n)).tobytes())
    return str(path)


def sanitize(s: Stage, tool: str) -> tuple[str, Data]:
    places = (os.environ.get("CUDA_HOME", "") + "/bin/compute-sanitizer", *SANITIZERS)
    sanitizer = shutil.which("compute-sanitizer") or next((p for p in places if Path(p).exists()), None)
    if not sanitizer:
        raise Skipped("compute-sanitizer is not on the PATH nor in CUDA_HOME/bin")
    known = quietly(sanitizer, "--help")
    command = [sanitizer, "--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
    if "--report-api-errors" in known:                          # kiln checks each call itself, and some are to fail
        command += ["--report-api-errors", "no"]
    # The libraries' own kernels are not ours to check, and slow; out of bounds they would be our mistake.
    if tool != "memcheck" and "--kernel-name" in known:
        command += ["--kernel-name", "kns=_kernel"]
    left_out = NOT_SANITIZED if tool == "memcheck" else NOT_SANITIZED + PRODUCTS
    tests = [f"-sf={OP_TESTS}", f"-tce={','.join(left_out)}", "-d"]
    code, text = s.run([*command, s.program("test_native"), *tests], s.left())
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    counts = DOCTEST.findall(text)
    report = re.findall(r"^=========(?! COMPUTE-SANITIZER).*", text, re.M)
    data: Data = {"exit": code, "summary": summary[-1:], "passed": sum(int(c[0]) for c in counts),
                  "seconds_of": {name: float(sec) for sec, name in re.findall(r"^([\d.]+) s: (.*)", text, re.M)}}
    if code != 0:
        data["first"] = report[:8]
    if "Device not supported" in text:
        raise Skipped("compute-sanitizer does not support this device", data)
    if code == 124 and not report:
        raise TimedOut(f"{tool}: not done after {s.seconds:.0f} s; nothing found until then", data)
    if code != 0 or not summary or not data["passed"]:
        said = summary[-1] if code == 9 and summary else "no test was run" if code == 0 else reason(code, text)
        raise Failed(f"{tool}: {said}" + (f"; found {report[0]}" if code == 124 else ""), data)
    return f"{tool}: nothing found in {data['passed']} test cases", data


def train(s: Stage) -> tuple[str, Data]:
    """The demo on the CPU and on the GPU. fp32 follows the CPU step by step at first, then rounding makes the runs
    diverge as another order of summation would; bf16 rounds each activation to 2^-8. At the end all must have learnt
    the same: 0.05 nats is what another seed changes."""
    steps = option("DEMO_STEPS")
    s.checked("data", [sys.executable, SCRIPTS / "prepare_data.py", "--python-stdlib", "--out",
                       s.work / "runs" / "demo-data"], 120)
    config = ROOT / "configs" / "demo.yaml"
    common: Data = {"train.max_steps": steps, "checkpoint.interval": 0, "device.dtype": "fp32"}
    runs = {"cpu fp32": {"device.kind": "cpu"}, "gpu fp32": {"device.kind": "cuda"},
            "gpu bf16": {"device.kind": "cuda", "device.dtype": "bf16"},
            "gpu bf16 again": {"device.kind": "cuda", "device.dtype": "bf16"}}
    data: Data = {"steps": steps}
    loss: dict[str, list[float]] = {}
    val: dict[str, float] = {}
    text: dict[str, list[str]] = {}
    for name, settings in runs.items():
        records = s.train(name.replace(" ", "-"), common | settings, config=config)
        of = [r for r in records if r["type"] == "step"]
        loss[name] = [float(r["loss"]) for r in of]
        text[name] = [repr(r["loss"]) for r in of]
        evals = [[r["step"], r["val_loss"]] for r in records if r["type"] == "eval"]
        val[name] = evals[-1][1]
        data[name] = {"loss_at": [[i + 1, loss[name][i]] for i in (*range(20), *range(99, steps, 100)) if i < len(of)],
                      "val": evals, "median_step_ms": median(r["step_ms"] for r in of[len(of) // 2:])}
    bad = []
    for name, early in (("gpu fp32", 1e-3), ("gpu bf16", 2e-2)):
        far = max(abs(a - b) for a, b in zip(loss[name][:20], loss["cpu fp32"][:20], strict=True))
        gap = abs(val[name] - val["cpu fp32"])
        data[name] |= {"first_20_differ_by": far, "val_differs_by": gap}
        if not far <= early:
            bad.append(f"{name}: a loss of the first 20 steps is {far:.2g} from the CPU's")
        if not gap <= 0.05:
            bad.append(f"{name}: val loss {val[name]:.4f}, CPU {val['cpu fp32']:.4f}")
    if text["gpu bf16"] != text["gpu bf16 again"]:
        bad.append("gpu bf16: a repeated run has another loss")
    if bad:
        raise Failed("; ".join(bad), data)
    return "val loss " + ", ".join(f"{n} {val[n]:.4f}" for n in list(runs)[:3]) + "; repeated run identical", data


def stages() -> dict[str, Callable[[Stage], tuple[str, Data]]]:
    """By the name of the result's file."""
    all_of: dict[str, Callable[[Stage], tuple[str, Data]]] = {"tests": tests, "train": train}
    return all_of | {f"sanitize-{tool}": functools.partial(sanitize, tool=tool) for tool in TOOLS}
