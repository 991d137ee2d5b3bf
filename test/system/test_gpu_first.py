"""STAGE=first of scripts/gpu/gpu_check.py, rehearsed whole on the emulated device at tiny sizes; a part that fails, a
part that hangs, and a run that is cut off.  Seen to fail: a failed part that ends the others, a part that takes the
next one's time, other weights of the second run that pass, a merged file without the parts that had ended.
"""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import EMULATED, REPO
from pretended_gpu import Check, beside, executable

BUILT = REPO / "build" / "release"
TORCH = """#!{python}
import json, sys
given = sys.argv[1:]
if "-c" in given:
    print("2.99")
elif "--attention" in given:
    shape = given[given.index("--attention") + 1]
    print(json.dumps({{"attention": [{{"shape": shape, "sdpa": given[given.index("--sdpa") + 1], "forward_us": 1.0,
                                     "backward_us": 2.0}}]}}))
elif "--ops" in given:
    names = [given[i + 1] for i, word in enumerate(given) if word == "--only"]
    print(json.dumps({{"ops": [{{"op": name, "us": 1.0}} for name in names]}}))
else:
    print(json.dumps({{"tokens_per_s": 1000.0, "given": given}}))
"""
CONFIG = """model:
  n_layer: 1
  n_head: 2
  n_embd: 128
  context_length: 64
  vocab_size: 300
device:
  kind: cuda
  dtype: bf16
"""


@pytest.fixture
def first(check: Check, tmp_path: Path) -> Check:
    """kiln's programs on the emulated device, at sizes that it computes in seconds."""
    module = sys.modules["gpu_first"]
    for name, target in (("train", EMULATED), ("test_native", BUILT / "test"),
                         ("bench_attention", BUILT / "bench_attention-emulated")):
        (check.programs / name).symlink_to(target)
    for name in ("test_isa_native", "test_isa_sm90_native"):
        check.shell(name, f"exec {BUILT / 'test_emulator'} -sf=*emulator/test/test_isa.cu")
    check.patch.setattr(module, "OP_TESTS", "*test_gelu.cpp,*test_attention_sm90.cpp")
    check.patch.setattr(module, "SHAPES", ("1x2x128x64",))
    for key, value in (("WEIGHTS_BATCH", 1), ("WEIGHTS_STEPS", 3), ("FIRST_STEPS", 3)):
        check.patch.setattr(module, key, value)
    check.patch.setattr(check.speed, "CONTEXT", 64)
    check.patch.setattr(check.speed, "VOCABULARY", 300)
    check.patch.setitem(check.stages.SIZES, "124m", (1, 2, 128))
    check.patch.setitem(check.stages.BATCHES, "124m", 2)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "gpt2-124m.yaml").write_text("run:\n  name: tiny\ndata:\n  train: [none.bin]\ntrain:\n"
                                                         "  max_steps: 1\n  global_batch_size: 2\n"
                                                         "optimizer:\n  learning_rate: 1e-3\n" + CONFIG)
    check.patch.setattr(check.speed, "ROOT", tmp_path)
    torch = executable(tmp_path / "torch_python", TORCH.format(python=sys.executable))
    check.patch.setenv("KILN_TORCH_PYTHON", str(torch))
    check.patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return check


def results(check: Check) -> dict[str, str]:
    return {name: r["result"] for name, r in check.merged()["stages"].items()}


def test_the_whole_of_it_on_the_emulated_device(first: Check) -> None:
    module = sys.modules["gpu_first"]
    assert first.run("first") == 0, {name: r["headline"] for name, r in first.merged()["stages"].items()}
    assert results(first) == dict.fromkeys(module.FIRST, "passed")
    assert first.result("first-instructions")["data"]["instructions of 9.0a"]["passed"] > 10
    assert first.result("first-ops")["data"]["ops"]["passed"] > 0
    assert first.result("first-attention")["data"]["attention"]["passed"] > 0
    a, b = first.result("first-weights")["data"]["weights"]
    assert a == b and len(a) == 16
    step = first.result("first-124m")["data"]
    assert step["ratio"] == pytest.approx(step["kiln_tokens_per_s"] / 1000)
    assert step["pytorch"][0]["given"][-8:] == ["--batch", "2", "--sdpa", "cudnn", "--steps", "2", "--window", "5"]
    sdpa = first.result("first-sdpa")["data"]
    assert {(r["kernel"], r["way"]) for r in sdpa["beside_pytorch"]} >= {("sm90", "forward"), ("sm90", "backward")}
    ops = {r["op"]: r for r in first.result("first-memory")["data"]["ops"]}
    assert ops["adamw"]["pytorch_us"] == 1.0 and ops["adamw"]["us"] > 0 and "fc forward" not in ops


def test_a_part_that_fails_leaves_the_others(first: Check) -> None:
    said = r"TEST CASE:  isa: wgmma\ntest cases: 2 | 1 passed | 1 failed |\n"
    first.shell("test_isa_native", f"printf '{said}'; exit 1")
    first.patch.setattr(sys.modules["gpu_first"], "FIRST", {"first-instructions": 1, "first-sdpa": 1})
    assert first.run("first") == 1
    assert results(first) == {"first-instructions": "failed", "first-sdpa": "passed"}
    assert "instructions of 8.0: 1 failed" in first.result("first-instructions")["headline"]


def test_a_part_that_hangs_takes_its_own_time_alone(first: Check) -> None:
    first.shell("test_isa_native", "sleep 60")
    first.patch.setattr(sys.modules["gpu_first"], "FIRST", {"first-instructions": 1, "first-sdpa": 9})
    first.patch.setattr(sys.modules["gpu_first"], "SECONDS", 30)
    begin = time.monotonic()
    assert first.run("first") == 1 and time.monotonic() - begin < 30
    assert results(first) == {"first-instructions": "failed", "first-sdpa": "passed"}
    assert "ran out of time" in first.result("first-instructions")["headline"]


def test_the_rest_of_the_quarter_of_an_hour(check: Check, tmp_path: Path) -> None:
    """Each part of STAGE=more is known, runs, and leaves a result."""
    beside(check, check.patch, tmp_path)
    check.patch.setattr(sys.modules["gpu_first"], "MORE_SECONDS", 60)
    check.run("more")
    assert list(results(check)) and set(results(check)) == set(sys.modules["gpu_first"].MORE)
    assert results(check)["modes"] == results(check)["start"] == "passed"


def test_a_warning_behind_pytorchs_result_loses_nothing(first: Check, tmp_path: Path) -> None:
    text = TORCH.format(python=sys.executable) + "print('Warning: too late', file=sys.stderr)\n"
    first.patch.setenv("KILN_TORCH_PYTHON", str(executable(tmp_path / "noisy", text)))
    assert first.run("first-124m") == 0
    assert first.result("first-124m")["data"]["ratio"] > 0
    first.patch.setenv("KILN_TORCH_PYTHON", str(executable(tmp_path / "silent", "#!/bin/bash\necho nothing\n")))
    first.patch.setattr(first.module, "FORCE", True)
    assert first.run("first-124m") == 0
    data = first.result("first-124m")["data"]
    assert data["kiln_tokens_per_s"] > 0 and "no result" in data["pytorch_failed"]


def test_other_weights_of_the_second_run_fail(first: Check, tmp_path: Path) -> None:
    (first.programs / "train").unlink()
    beside(first, first.patch, tmp_path)
    first.patch.setenv("WEIGHTS", f"{'a' * 16} {'b' * 16}")
    assert first.run("first-weights") == 1
    assert f"other weights: {'b' * 16}, {'a' * 16}" in first.result("first-weights")["headline"]


def test_a_run_that_is_cut_off_keeps_what_had_ended(tmp_path: Path) -> None:
    programs, out = tmp_path / "programs", tmp_path / "out"
    programs.mkdir()
    for name in ("test_isa_native", "test_isa_sm90_native"):
        executable(programs / name, "#!/bin/bash\necho 'test cases: 3 | 3 passed | 0 failed |'\n")
    executable(programs / "test_native", f"#!/bin/bash\necho $$ >{tmp_path}/pid\nexec sleep 100\n")
    driver = ("import gpu_check\n"
              "gpu_check.find_gpu = lambda: gpu_check.Gpu('NVIDIA Pretended', '9.0', 1 << 37, '13.0', '')\n"
              "gpu_check.cuda_libraries = lambda: '/nowhere'\ngpu_check.main([])\n")
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO / "scripts" / "gpu"), "KILN_BUILD": str(programs),
           "OUT": str(out), "STAGE": "first"}
    running = subprocess.Popen([sys.executable, "-c", driver], env=env, stdout=subprocess.DEVNULL,
                               start_new_session=True)
    ended, end = out / "first-instructions.json", time.monotonic() + 60
    while not (ended.exists() and (tmp_path / "pid").exists()) and time.monotonic() < end:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # in a session of its own
    assert json.loads(ended.read_text())["result"] == "passed" and not (out / "first-ops.json").exists()
    (merged,) = out.glob("nvidia-pretended-*.json")
    assert list(json.loads(merged.read_text())["stages"]) == ["first-instructions"]
