"""The whole GPU program on emulated GPUs: every kernel, stream and NCCL call that training makes, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from conftest import EMULATED, REPO, Lab, Run, run

sys.path.insert(0, str(REPO / "scripts"))
import parity_case  # noqa: E402
from parity_case import BOUNDS, CASES, Case  # noqa: E402

STEPS = 5
SMALL: dict[str, object] = {
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 16,
    "train.max_steps": STEPS,
    "checkpoint.interval": STEPS,
    "device.kind": "cuda",
    "device.dtype": "bf16",
}


@pytest.fixture
def gpus(lab: Lab) -> Lab:
    """A lab whose runs are on emulated GPUs, one for each rank."""
    lab.program = EMULATED
    lab.defaults |= SMALL
    return lab


def numbers(r: Run) -> list[float]:
    return [float(x) for row in r.losses() for x in row[1:]]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ordered_gives_the_same_bits_on_any_ranks_and_schedules(gpus: Lab, dtype: str) -> None:
    """Shards moved by NCCL (a GPU each), through host memory (two ranks on one GPU), and not at all (one rank); on each,
    warps and streams in the plainest order, and in twenty random ones."""
    seen: dict[tuple[object, ...], str] = {}
    places = ((1, 1), (2, 2), (4, 4), (2, 1))
    runs = [(place, None) for place in places] + [(places[seed % 4], seed) for seed in range(1, 21)]
    for (np, devices), seed in runs:
        name = f"np{np}-devices{devices}-seed{seed}"
        env: dict[str, object] = {"KILN_EMULATOR_DEVICES": devices}
        if seed is not None:
            env |= {"KILN_EMULATOR_ORDER": "random", "KILN_EMULATOR_SEED": seed, "KILN_EMULATOR_STREAMS": "random"}
        gpus.train(name, {"parallel.allreduce": "ordered", "device.dtype": dtype, "train.max_steps": 3,
                          "checkpoint.interval": 3}, np, env=env)
        run = gpus.run(name)
        assert len(run.losses()) == 3
        seen.setdefault((tuple(run.losses()), run.hashes(3)), name)
    assert len(seen) == 1, f"these differ: {list(seen.values())}"


def test_nccl_agrees_with_ordered(gpus: Lab) -> None:
    gpus.train("ordered", {"parallel.allreduce": "ordered"}, 2)
    for np in (2, 3):
        settings: dict[str, object] = {"parallel.allreduce": "nccl", "train.global_batch_size": 8 if np == 2 else 9}
        gpus.train(f"nccl{np}", settings, np)
        assert "nccl" in gpus.run(f"nccl{np}").records("run")[0]["allreduce"]
        if np == 2:  # another order of summation: a few roundings of the gradient
            assert numbers(gpus.run("nccl2")) == pytest.approx(numbers(gpus.run("ordered")), rel=1e-6)


def test_auto_takes_nccl_with_a_gpu_each_and_host_memory_on_a_shared_one(gpus: Lab) -> None:
    for devices, expected in ((2, "nccl"), (1, "ordered")):
        name = f"auto{devices}"
        result = gpus.train(name, {"device.kind": "auto"}, 2, env={"KILN_EMULATOR_DEVICES": devices})
        record = gpus.run(name).records("run")[0]
        assert record["allreduce"] == expected
        assert record["device"] != "cpu" and record["dtype"] == "bf16"
        assert ("share 1 GPU" in result.out + result.err) == (devices == 1)


def test_losses_follow_the_cpu(gpus: Lab) -> None:
    gpus.train("cpu", {"device.kind": "cpu", "device.dtype": "fp32"})
    for dtype, bound in (("fp32", 1e-4), ("bf16", 1e-2)):  # parity's bound; 1 % of the loss for bf16 activations
        gpus.train(dtype, {"device.dtype": dtype})
        losses = [float(row[1]) for row in gpus.run(dtype).losses()]
        assert losses == pytest.approx([float(row[1]) for row in gpus.run("cpu").losses()], rel=bound)


def test_a_run_moves_between_cpu_and_gpu(gpus: Lab) -> None:
    """Saved on one, resumed on the other: the file format is the same, and so is the training."""
    fp32: dict[str, object] = {"device.dtype": "fp32"}
    gpus.train("moved", fp32 | {"device.kind": "cpu", "checkpoint.interval": 2, "train.max_steps": 2})
    gpus.train("moved", fp32 | {"checkpoint.interval": 2}, flags=["--resume"])
    gpus.train("stayed", fp32)
    assert numbers(gpus.run("moved")) == pytest.approx(numbers(gpus.run("stayed")), rel=1e-4)


def test_evaluation_and_generation_on_the_gpu(gpus: Lab, data: Path) -> None:
    gpus.defaults |= {"data.tokenizer": f"{data}/tokenizer.json", "eval.interval": STEPS, "model.context_length": 16}
    gpus.train("base", np=2)
    assert len(gpus.run("base").val_losses()) == 1
    config = gpus.config("base")
    text = run([EMULATED, "generate", "--config", config, "--prompt", "ab", "--max-tokens", "8", "--seed", "1"])
    assert text.code == 0, text.err
    assert text.out.startswith("ab") and len(text.out) > 2
    again = run([EMULATED, "generate", "--config", config, "--prompt", "ab", "--max-tokens", "8", "--seed", "1"])
    assert again.out == text.out


@pytest.mark.parametrize("np", [1, 2])
def test_every_step_agrees_with_pytorch(np: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same golden numbers as for the CPU; fp32 has no tensor-core path, so odd sizes are allowed."""
    case: Case = CASES[1]
    parity_case.write_case(case, tmp_path)
    monkeypatch.setenv("KILN_TRAIN", str(EMULATED))
    kiln = parity_case.run_kiln(case, tmp_path, np, ("--set", "device.kind=cuda"))
    want = parity_case.json.loads(parity_case.golden_path(case).read_text())["float32"]
    for key, (deviation, step) in parity_case.worst(kiln, want).items():
        assert deviation <= BOUNDS[key], f"{key} at step {step}"


# What the user is told.


def test_no_device_is_said_and_never_silent(gpus: Lab) -> None:
    none = {"KILN_EMULATOR_DEVICES": 0}
    refused = gpus.train("refused", expect=2, env=none)
    assert "device.kind: cuda, but no GPU" in refused.error()
    refused = gpus.train("bf16", {"device.kind": "auto"}, expect=2, env=none)
    assert "device.dtype: bf16 needs a GPU" in refused.error()
    result = gpus.train("cpu", {"device.kind": "auto", "device.dtype": "fp32"}, env=none)
    assert "device.kind: auto uses the CPU; no GPU" in result.out
    assert gpus.run("cpu").records("run")[0]["device"] == "cpu"


def test_nccl_on_a_shared_gpu_is_refused(gpus: Lab) -> None:
    refused = gpus.train("refused", {"parallel.allreduce": "nccl"}, 2, expect=2, env={"KILN_EMULATOR_DEVICES": 1})
    assert "parallel.allreduce: nccl needs a GPU of its own for every rank" in refused.error()


def test_head_sizes_that_bf16_cannot_do_are_refused_before_a_step(gpus: Lab) -> None:
    refused = gpus.train("refused", {"model.n_embd": 24, "model.n_head": 2}, expect=2)
    assert "model.n_embd" in refused.error() and "multiple of 8" in refused.error()
    assert not (gpus.run("refused").path / "checkpoints").exists()


def test_a_model_too_large_for_the_device_is_exit_7(gpus: Lab) -> None:
    large: dict[str, object] = {"model.n_embd": 256, "model.n_layer": 4}  # about 60 MB, and the workspace takes 64 MiB
    refused = gpus.train("refused", large, expect=7, env={"KILN_EMULATOR_MEMORY": 100 << 20})
    assert "micro_batch_size" in refused.error()


def test_this_binary_without_a_driver(lab: Lab) -> None:
    """./train as built here, with CUDA where nvcc was found: a machine without a GPU uses the CPU and says so."""
    result = lab.train("auto", {"train.max_steps": 2, "device.kind": "auto"})
    assert "device.kind: auto uses the CPU" in result.out
    refused = lab.train("cuda", {"train.max_steps": 2, "device.kind": "cuda"}, expect=2)
    assert "device.kind: cuda" in refused.error()
