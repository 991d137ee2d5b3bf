"""Model FLOP utilisation: each record recomputed from what the run's own records say."""

from __future__ import annotations

import re

import pytest

from conftest import EMULATED, Lab, Run

SHORT: dict[str, object] = {"train.max_steps": 3, "checkpoint.interval": 0}


def check_arithmetic(run: Run) -> dict:
    """mfu * peak = flops_per_token * tokens/s in every step; returns the run record's peak."""
    record = run.records("run")[0]
    peak = record["peak"]
    used = peak[f"{peak['used']}_flops"]
    steps = run.records("step")
    assert len(steps) == 3
    for step in steps:
        if step["mfu"] is None:  # other programs had the processors as the peak was measured
            assert record["flops_per_token"] * step["tokens_per_s"] > used
            continue
        # Three roundings to double on either side.
        assert step["mfu"] * used == pytest.approx(record["flops_per_token"] * step["tokens_per_s"], rel=1e-15)
        tokens = step["tokens"] / step["step"]
        assert step["tokens_per_s"] == pytest.approx(tokens / step["step_ms"] * 1e3, rel=1e-15)
    assert peak["formula"] == "PaLM: 6 N + 12 L C T"
    return dict(peak)


@pytest.mark.parametrize("np", [1, 2])
def test_the_cpu_s_mfu_is_of_the_measured_peak_of_all_ranks(lab: Lab, np: int) -> None:
    out = lab.train("run", SHORT | {"parallel.allreduce": "ordered"}, np).out
    peak = check_arithmetic(lab.run("run"))
    assert peak["used"] == "measured" and peak["vendor_flops"] is None and peak["devices"] == np
    assert 1e8 < peak["measured_flops"] < 1e15
    last = lab.run("run").records("step")[-1]
    shown = re.findall(r"step 3/3 .* ([\d.]+)% MFU", out)
    assert shown == ([] if last["mfu"] is None else [f"{100 * last['mfu']:.1f}"])


def test_flops_per_token_is_palm_s_formula(lab: Lab) -> None:
    """By hand for the tiny model: N = 257*32 + 16*32 + 2 * (12*32*32 + 13*32) + 2*32."""
    lab.train("run", SHORT)
    n = 257 * 32 + 16 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32
    record = lab.run("run").records("run")[0]
    assert record["parameters"] == n
    assert record["flops_per_token"] == 6 * n + 12 * 2 * 32 * 16


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_gpu_that_ranks_share_counts_once(lab: Lab, devices: int, dtype: str) -> None:
    """Seen to fail where every rank counted."""
    lab.program = EMULATED
    lab.train("run", SHORT | {"device.kind": "cuda", "device.dtype": dtype}, 2, env={"KILN_EMULATOR_DEVICES": devices})
    peak = check_arithmetic(lab.run("run"))
    assert peak["devices"] == devices
    assert peak["used"] == "measured" and peak["vendor_flops"] is None  # nobody sells emulated GPUs


def test_a_run_without_memory_for_the_measurement_goes_on(lab: Lab) -> None:
    """The smallest product and its numbers take just over 1024 KiB in fp32. The run takes 224, beside its workspace,
    and has to leave 1/128 of the GPU to libraries."""
    lab.program = EMULATED
    lab.defaults |= SHORT | {"device.kind": "cuda", "model.n_layer": 1, "model.n_embd": 16}
    lab.train("roomy")
    roomy = lab.run("roomy").records("run")[0]
    assert roomy["peak"]["measured_flops"]
    lab.train("tight", env={"KILN_EMULATOR_MEMORY": roomy["memory"]["workspace"] + 1020 * 2**10})
    tight = lab.run("tight")
    peak = tight.records("run")[0]["peak"]
    assert peak["measured_flops"] is None and peak["used"] is None
    assert [step["mfu"] for step in tight.records("step")] == [None] * 3
    assert tight.losses() == lab.run("roomy").losses()
