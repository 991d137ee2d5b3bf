"""A run that is killed, loses power or meets a full disk at any write, fsync, rename, mkdir, symlink or unlink goes on
from a valid checkpoint to the same bits as an undisturbed run."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import REPO, TRAIN, Lab, Result, Run, run

STEPS, INTERVAL = 4, 2  # two saves: the second has an older checkpoint to keep until it is complete, then to remove
# As few tensors as a model can have: a write each.
SETTINGS: dict[str, object] = {
    "model.n_layer": 1,
    "model.bias": False,
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "train.max_steps": STEPS,
    "checkpoint.interval": INTERVAL,
    "checkpoint.keep": 1,
    "data.val": None,
}
Call = tuple[int, str, str]  # number, call, path below runs/


@pytest.fixture(scope="module")
def shim() -> Path:
    subprocess.run(["make", "-s", "-C", REPO, "DEPS=0", "build/release/fault_shim.so"], check=True)
    return REPO / "build" / "release" / "fault_shim.so"


class Bench:
    """An undisturbed run, the calls it made, and runs like it that are disturbed at one of them."""

    def __init__(self, lab: Lab, shim: Path) -> None:
        self.lab = lab
        self.shim = shim
        log = lab.root / "calls"
        assert self.train("base", {"KILN_FAULT_LOG": log}).code == 0
        pattern = re.compile(rf"(\d+) (\w+) {re.escape(str(lab.root))}/base(\S*)")
        self.calls = [(int(n), call, path) for n, call, path in pattern.findall(log.read_text())]
        assert [n for n, *_ in self.calls] == list(range(1, len(self.calls) + 1)) and len(self.calls) > 80
        self.losses, self.hashes = self.dir("base").losses(), self.dir("base").hashes(STEPS)

    def dir(self, name: str) -> Run:
        return Run(self.lab.root / name / "run")

    def train(self, name: str, env: dict[str, object], *flags: str) -> Result:
        out_dir = self.lab.root / name  # made by the run: its name must be durable too
        config = self.lab.config("run", SETTINGS | {"run.out_dir": str(out_dir)}, file=name)
        preload = {"LD_PRELOAD": self.shim, "KILN_FAULT_UNDER": out_dir} if env else {}
        return run([TRAIN, "--config", config, *flags], env | preload)

    def disturb(self, call: Call, action: str, check: Callable[[Call, Run, Result], None]) -> str:
        """The faults of a disturbed run and its resumption; empty: none."""
        n, kind, path = call
        name = f"{action}{n}"
        try:
            check(call, self.dir(name), self.train(name, {"KILN_FAULT_AT": n, "KILN_FAULT_DO": action}))
            done = any(c[1] == "rename" and c[2].endswith(f"/step_{INTERVAL}") for c in self.calls[: n - 1])
            result = self.train(name, {}, "--resume")
            assert result.code == 0, result.err
            assert "not used" not in result.err, "a checkpoint under a good name was damaged"
            # Between the rename and the fsync after it either answer is right.
            renaming = next(c[0] for c in self.calls if c[1] == "rename" and c[2].endswith(f"/step_{INTERVAL}"))
            assert ("resuming from" in result.out) == done or n <= renaming + 2, result.out
            run_ = self.dir(name)
            assert run_.losses() == self.losses, "metrics.jsonl has other records"
            assert run_.hashes(STEPS) == self.hashes, "other weights"
            # No half or damaged one.  After the last rename no other save comes that would remove the older one.
            left = {p.name for p in run_.checkpoints.iterdir()} - {"latest", f"step_{INTERVAL}"}
            assert left == {f"step_{STEPS}"}, left
        except AssertionError as e:
            return f"{action} at call {n}, {kind} {path}: {e}"
        shutil.rmtree(self.lab.root / name)
        return ""

    def sweep(self, calls: Iterable[Call], action: str, check: Callable[[Call, Run, Result], None]) -> None:
        with ThreadPoolExecutor(2) as pool:
            wrong = [text for text in pool.map(lambda call: self.disturb(call, action, check), calls) if text]
        assert not wrong, "\n".join([f"{len(wrong)} wrong", *wrong[:5]])

    def second_save(self) -> list[Call]:
        first = next(n for n, call, path in self.calls if call == "mkdir" and f"step_{STEPS}.tmp" in path)
        return self.calls[first - 1 :]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, data: Path, shim: Path) -> Bench:
    return Bench(Lab(tmp_path_factory.mktemp("faults"), data), shim)


def was_killed(call: Call, run_: Run, result: Result) -> None:
    assert result.code == -signal.SIGKILL, f"exit {result.code}: {result.err}"


def ended_with_5(call: Call, run_: Run, result: Result) -> None:
    """...or went on, where it was only an old checkpoint that could not be removed."""
    _, kind, path = call
    if kind in ("unlink", "rmdir") or (kind == "rename" and f"step_{INTERVAL}.tmp" in path):
        assert result.code == 0, result.err
        return
    assert result.code == 5 and str(run_.path.parent) in result.error(), f"exit {result.code}: {result.err}"
    if f"step_{STEPS}.tmp" in path:
        assert run_.steps_saved() == [INTERVAL], "the older checkpoint must outlive a failed save"
        assert not list(run_.checkpoints.glob("*.tmp-*")), "a failed save must clean up"


def test_the_save_protocol(bench: Bench) -> None:
    """The order of a save: files, directory, metrics.jsonl, rename, parent; only then the old one is removed."""
    calls = [(call, re.sub(r"-[0-9a-f]{8}", "", path.removeprefix("/run/"))) for _, call, path in bench.second_save()]
    order = [c for c in calls if c[0] != "write" and c[0] != "open"]
    files = ["model.safetensors", "config.json", "optimizer.safetensors", "state.json", "manifest.json"]
    expected = [
        *((("fsync", f"checkpoints/step_4.tmp/{f}")) for f in files),
        ("fsync", "checkpoints/step_4.tmp"),
        ("fsync", "metrics.jsonl"),
        ("rename", "checkpoints/step_4"),
        ("fsync", "checkpoints"),
        ("rename", "checkpoints/step_2.tmp"),
    ]
    at = order.index(expected[0])
    assert order[at : at + len(expected)] == expected
    assert ("rename", "checkpoints/latest") in order[at + len(expected) :]


def test_killed_at_every_call_of_a_save(bench: Bench) -> None:
    bench.sweep(bench.second_save(), "kill", was_killed)


def test_power_lost_at_every_call_of_a_run(bench: Bench) -> None:
    """Harder than a kill: what was not fsynced is gone."""
    bench.sweep(bench.calls, "power", was_killed)


@pytest.mark.parametrize("error, part", [("ENOSPC", 0), ("EIO", 1)])
def test_a_call_of_a_save_fails(bench: Bench, error: str, part: int) -> None:
    bench.sweep(bench.second_save()[part::2], error, ended_with_5)
