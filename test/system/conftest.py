"""Shared by the system tests: a tiny data set and config, a way to run ./train, readers of what a run leaves."""

from __future__ import annotations

import array
import atexit
import hashlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import xxhash

from hosts import hosts  # noqa: F401  a fixture
from pretended_gpu import check  # noqa: F401  a fixture

REPO = Path(__file__).resolve().parents[2]
TRAIN = REPO / "train"
EMULATED = REPO / "train-emulated"  # the GPU program over the emulator
MPIRUN = os.environ.get("MPIRUN") or shutil.which("mpirun.mpich") or "mpirun"
# Threads that wait must sleep: the tests run more threads and ranks than there may be cores.
# Matrix products are chosen by timing: on a clock of the emulator's own, and never into the user's cache.
CACHE = tempfile.mkdtemp(prefix="kiln-cache-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
ENV = {k: v for k, v in os.environ.items() if not k.startswith(("KILN_", "NCCL_"))} | {
    "OMP_WAIT_POLICY": "passive",
    "XDG_CACHE_HOME": CACHE,
    "KILN_EMULATOR_CLOCK": "1",
}
TIMEOUT_S = 120
T = 16  # context_length of the tiny config
Settings = Mapping[str, object]
WORDS = ("all", "auto")

TINY: dict[str, object] = {
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 32,
    "model.context_length": T,
    "model.vocab_size": 257,
    "model.dropout": 0.1,
    "train.max_steps": 20,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 1,
    "optimizer.learning_rate": 1e-2,
    "checkpoint.interval": 10,
    "device.kind": "cpu",
    "device.threads": 1,
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: measures a short time; test/run.py runs it when nothing else runs")


def shard_bytes(tokens: Sequence[int], *, magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    """A token shard in llm.c's layout; `count` overrides what the header states."""
    header = struct.pack("<256i", magic, version, len(tokens) if count is None else count, *[0] * 253)
    return header + array.array("H", tokens).tobytes()


def some_tokens(n: int, seed: int = 0) -> list[int]:
    """Letters and spaces: something to learn, different in every sequence."""
    r = random.Random(seed)
    return [r.randrange(97, 123) if r.random() < 0.8 else 32 for _ in range(n)]


def yaml_text(settings: Settings) -> str:
    """{"a.b": value} as a config; JSON's values are YAML's, but `all` and `auto` go without quotes."""
    sections: dict[str, list[str]] = {}
    for key, value in settings.items():
        section, name = key.split(".")
        sections.setdefault(section, []).append(f"  {name}: {value if value in WORDS else json.dumps(value)}")
    return "".join(f"{section}:\n" + "\n".join(lines) + "\n" for section, lines in sections.items())


@dataclass
class Result:
    code: int
    out: str
    err: str
    seconds: float

    def error(self) -> str:
        """The one error message of a job, whatever the number of ranks."""
        found: list[str] = re.findall(r"error: (.*)", self.err)
        assert len(found) == 1, f"expected one error message:\n{self.err}"
        return found[0]


def run(command: Sequence[object], env: Settings | None = None, cwd: Path | None = None) -> Result:
    start = time.monotonic()
    p = subprocess.run(
        [str(c) for c in command],
        env=ENV | {k: str(v) for k, v in (env or {}).items()},
        cwd=cwd,
        text=True,
        errors="replace",
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=TIMEOUT_S,
    )
    return Result(p.returncode, p.stdout, p.stderr, time.monotonic() - start)


def program(path: Path, text: str) -> None:
    """A shell script in the place of a program."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def bound_by_modes() -> list[str]:
    """A prefix for a command, so that it cannot read files of mode 000, which root could."""
    if os.geteuid() != 0:
        return []
    prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if not shutil.which("setpriv") or run([*prefix, "true"]).code != 0:
        pytest.skip("root that cannot give up its power to read all files")
    return prefix


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path: Path, at: int, bit: int = 0) -> None:
    """One wrong bit in a file; `at` < 0 counts from its end."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def seal(checkpoint: Path, edit: Callable[[dict], object]) -> None:
    """Changes a manifest and gives it the checksum it must then have, computed here by the rule in the format's words:
    XXH3 of the compact text of the object without its "xxh3", keys as in the file."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    del manifest["xxh3"]
    text = json.dumps(manifest, separators=(",", ":"), ensure_ascii=False)
    manifest["xxh3"] = xxhash.xxh3_64_hexdigest(text.encode())
    path.write_text(json.dumps(manifest, indent=2))


class Run:
    """The directory of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    def lines(self, kind: str) -> list[str]:
        text = (self.path / "metrics.jsonl").read_text()
        return [line for line in text.splitlines() if json.loads(line)["type"] == kind]

    def records(self, kind: str) -> list[dict]:
        return [json.loads(line) for line in self.lines(kind)]

    def losses(self) -> list[tuple[str, ...]]:
        """(step, loss, grad_norm) of each step as the text in the file: equal only if every bit is."""
        pattern = r'"step":(\d+),.*"loss":([^,]+),"grad_norm":([^,]+),'
        return [re.search(pattern, line).groups() for line in self.lines("step")]  # type: ignore[union-attr]

    def val_losses(self) -> list[str]:
        return [re.search(r'"val_loss":([^,]+),', line).group(1) for line in self.lines("eval")]  # type: ignore[union-attr]

    def steps_saved(self) -> list[int]:
        names = [re.fullmatch(r"step_(\d+)", p.name) for p in self.checkpoints.glob("step_*")]
        return sorted(int(m.group(1)) for m in names if m)

    def hashes(self, step: int) -> tuple[str, str]:
        """Weights and optimizer state, every byte."""
        at = self.checkpoints / f"step_{step}"
        return sha256(at / "model.safetensors"), sha256(at / "optimizer.safetensors")

    def status(self) -> dict:
        status: dict = json.loads((self.path / "status.json").read_text())
        return status

    def snapshot(self) -> dict[str, str]:
        """Every file of the run below checkpoints/ with its content."""
        return {name: content for name, content in self.everything().items() if name.startswith("checkpoints/")}

    def everything(self) -> dict[str, str]:
        """Every file of the run with its content, but for the lock, which names the last process that held it."""
        files = [p for p in self.path.rglob("*") if p.is_file()]
        return {str(p.relative_to(self.path)): sha256(p) for p in files if p.name != "lock"}


class Lab:
    """A folder with a data set, configs and runs."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root = root
        self.data = data
        self.program = TRAIN
        self.defaults = TINY | {
            "run.out_dir": str(root / "runs"),
            "data.train": [f"{data}/train_*.bin"],
            "data.val": [f"{data}/val.bin"],
        }

    def settings(self, name: str, settings: Settings | None = None) -> dict[str, object]:
        merged = {"run.name": name} | self.defaults | dict(settings or {})
        return {k: v for k, v in merged.items() if v is not None}  # None takes a default away

    def config(self, name: str, settings: Settings | None = None, file: str | None = None) -> Path:
        path = self.root / f"{file or name}.yaml"
        path.write_text(yaml_text(self.settings(name, settings)))
        return path

    def run(self, name: str) -> Run:
        return Run(self.root / "runs" / name)

    def command(self, name: str, settings: Settings | None = None, np: int = 1, flags: Sequence[str] = ()) -> list[str]:
        launcher = [MPIRUN, "-np", str(np)] if np > 1 else []
        return [*launcher, str(self.program), *flags, "--config", str(self.config(name, settings))]

    def train(
        self,
        name: str,
        settings: Settings | None = None,
        np: int = 1,
        flags: Sequence[str] = (),
        expect: int = 0,
        env: Settings | None = None,
    ) -> Result:
        """Runs ./train (np = 1: without mpirun) and checks its exit code."""
        result = run(self.command(name, settings, np, flags), env)
        assert result.code == expect, f"exit {result.code}, expected {expect}\n{result.out}\n{result.err}"
        return result

    def start(self, name: str, settings: Settings | None = None, np: int = 1) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(name, settings, np),
            env=ENV,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def wait_for_step(self, name: str, step: int, process: subprocess.Popen[str]) -> None:
        """Returns once a run in the background has recorded that step."""
        metrics = self.run(name).path / "metrics.jsonl"
        end = time.monotonic() + TIMEOUT_S
        while not metrics.exists() or f'"step":{step},' not in metrics.read_text():
            assert process.poll() is None and time.monotonic() < end, f"no step {step}"
            time.sleep(0.02)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """436 training sequences in two shards; 13 validation sequences.  Tests that spoil data make their own."""
    path = tmp_path_factory.mktemp("data")
    (path / "train_0.bin").write_bytes(shard_bytes(some_tokens(4000, 1)))
    (path / "train_1.bin").write_bytes(shard_bytes(some_tokens(3001, 2)))
    (path / "val.bin").write_bytes(shard_bytes(some_tokens(13 * T + 1, 3)))
    (path / "tokenizer.json").write_text('{"type": "bytes", "vocab_size": 257, "end_of_text": 256}')
    return path


@pytest.fixture
def lab(tmp_path: Path, data: Path) -> Lab:
    return Lab(tmp_path, data)


@pytest.fixture
def own_data(tmp_path: Path, data: Path) -> Path:
    """A copy of the data set that a test may spoil."""
    return Path(shutil.copytree(data, tmp_path / "data"))


@pytest.fixture
def own_lab(tmp_path: Path, own_data: Path) -> Lab:
    return Lab(tmp_path, own_data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Lab:
    """Run `base`: twenty steps on one rank, evaluated and saved at 10 and 20.  Tests copy it before they change it."""
    lab = Lab(tmp_path_factory.mktemp("trained"), data)
    lab.defaults |= {"eval.interval": 10, "data.tokenizer": f"{data}/tokenizer.json"}
    lab.train("base")
    return lab


@pytest.fixture
def base(trained: Lab, lab: Lab) -> Lab:
    """A lab with a copy of the run `base`, saved at steps 10 and 20."""
    shutil.copytree(trained.run("base").path, lab.run("base").path, symlinks=True)
    lab.defaults |= {k: v for k, v in trained.defaults.items() if k != "run.out_dir"}
    return lab
