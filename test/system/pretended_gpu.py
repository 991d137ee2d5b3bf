"""scripts/gpu/gpu_check.py on a GPU that is pretended, with programs that stand in for kiln's and for PyTorch."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parents[2]
HERE = {"commit": "abc", "gpu": "NVIDIA Pretended"}

# Stands in for ./train: writes the metrics that the environment asks for, under the run's name.
FAKE_TRAIN = r"""#!{python}
import json, os, pathlib, re, sys, time
given = open(sys.argv[sys.argv.index("--config") + 1]).read() + " ".join(sys.argv)
batch = int(re.search('micro_batch_size"?: (\d+)', given).group(1))
fastest = '"attention": "cudnn"' in given and "KILN_CUDNN_FASTEST" in os.environ
with open("{calls}", "a") as f:
    f.write(f"kiln {{batch}}" + (" fastest" if fastest else "") + "\n")
if fastest and os.environ.get("NO_CUDNN"):
    print("error: no cuDNN")
    sys.exit(2)
if batch > int(os.environ.get("FITS", 99)):
    print("error: out of memory")
    sys.exit(7)
n = len(open("{calls}").readlines())
run = pathlib.Path("runs") / (re.search("run.name=(\S+)", given) or [0, "speed"])[1]
run.mkdir(parents=True, exist_ok=True)
weights = os.environ.get("WEIGHTS", "").split()
(run / "train.log").write_text("complete, weights " + (weights[n % len(weights)] if weights else 16 * "a"))
step = {{"type": "step", "loss": 1.0, "step_ms": 48.0 if fastest else 50.0, "phase_ms": {{"forward": 20.0}}}}
peak = {{"used": "vendor", "vendor_flops": 1e16}}
first = {{"type": "run", "flops_per_token": 8e8, "peak": peak, "memory": {{}}, "graph": True}}
events = [{{"type": "event", "event": "memory", "taken": 102, "named": 100}}]
if os.environ.get("NO_GRAPH"):
    events.append({{"type": "event", "event": "graph", "message": "which failed"}})
evals = [{{"type": "eval", "step": k, "val_loss": 3 + d}} for k, d in ((1, n / 100), (2, n / 200), (3, n / 50))]
with open(run / "metrics.jsonl", "w", buffering=1) as f:
    for record in [first] + 60 * [step] + events + evals:
        if record is step:
            time.sleep(float(os.environ.get("SLEEP", 0)) / 60)
        f.write(json.dumps(record) + "\n")
"""
FAKE_TORCH = """#!{python}
import sys
if "-c" in sys.argv:
    print("2.99")
    sys.exit()
if "--seed" in sys.argv:
    print('{{"best_val_loss": 3.25, "seconds": 7.0}}')
    sys.exit()
sdpa = sys.argv[sys.argv.index("--sdpa") + 1]
with open("{calls}", "a") as f:
    f.write("torch " + sys.argv[sys.argv.index("--batch") + 1] + (" " + sdpa if sdpa != "default" else "") + "\\n")
print("compiling")
print('{{"tokens_per_s": 200000.0}}')
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


class Check:
    """The script as a module, on a GPU that is pretended."""

    def __init__(self, module: ModuleType, stages: ModuleType, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.module, self.stages, self.patch = module, stages, patch
        self.speed, self.goals = sys.modules["gpu_speed"], sys.modules["goals"]
        self.out, self.programs = root / "out", root / "programs"
        self.programs.mkdir()

    def run(self, stage: str) -> int:
        os.environ["STAGE"] = stage
        code: int = self.module.main([])
        return code

    def result(self, stage: str) -> dict:
        result: dict = json.loads((self.out / f"{stage}.json").read_text())
        return result

    def merged(self) -> dict:
        merged: dict = json.loads(next(self.out.glob("nvidia-pretended-*.json")).read_text())
        return merged

    def shell(self, program: str, text: str) -> None:
        executable(self.programs / program, f"#!/bin/bash\n{text}\n")


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    for name in ("gpu_check", "gpu_first", "gpu_stages", "gpu_speed", "goals"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("STAGE", "FORCE", "BATCH", "ROUNDS", "SDPA", "DEMO_STEPS", "TEXT"):
        monkeypatch.setenv(name, "")
    stages, module = importlib.import_module("gpu_stages"), importlib.import_module("gpu_check")
    monkeypatch.setattr(module, "OUT", tmp_path / "out")
    monkeypatch.setattr(stages, "BIN", tmp_path / "programs")
    monkeypatch.setattr(module, "cuda_libraries", lambda: "/nowhere")
    monkeypatch.setattr(module, "find_gpu", lambda: module.Gpu("NVIDIA Pretended", "9.0", 1 << 37, "13.0", ""))
    monkeypatch.setattr(module, "environment", lambda gpu: dict(HERE))
    monkeypatch.setattr(module, "clocks", dict)
    return Check(module, stages, tmp_path, monkeypatch)


def bench_writes(text: str) -> str:
    """Stands in for ./train bench: writes the file that --json names."""
    return f"""while [ "$1" != --json ]; do shift; done
cat > "$2" <<'END'
{text}
END"""


def beside(check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    calls = tmp_path / "calls"
    executable(check.programs / "train", FAKE_TRAIN.format(python=sys.executable, calls=calls))
    python = executable(tmp_path / "torch_python", FAKE_TORCH.format(python=sys.executable, calls=calls))
    monkeypatch.setenv("KILN_TORCH_PYTHON", str(python))
    return calls
