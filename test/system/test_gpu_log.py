"""Power, clocks and memory of the GPU in the step records: NVML's stand-in beside the emulated GPU."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from conftest import EMULATED, REPO, Lab, Run

SOURCE = REPO / "test" / "system" / "nvml_stand_in.c"
FIRST_GPU = "0000:01:00.0"  # the emulator's
CALM = {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "temperature_c": 61.0, "memory_bytes": 98765432109, "utilization": 97.0}
NOTHING = "the GPU's power and clocks are not recorded: "
Env = dict[str, object]
STEPS = 10


@pytest.fixture
def gpus(lab: Lab) -> Lab:
    lab.program = EMULATED
    lab.defaults |= {"device.kind": "cuda", "train.max_steps": STEPS, "checkpoint.interval": 0, "model.n_layer": 1,
                     "model.n_embd": 16, "train.global_batch_size": 2}
    return lab


def library(folder: Path, *flags: str) -> Env:
    """The environment in which a program finds the stand-in."""
    folder.mkdir(exist_ok=True)
    out = folder / "libnvidia-ml.so.1"
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wall", "-Werror", *flags, SOURCE, "-o", out],
                   check=True)
    return {"LD_LIBRARY_PATH": folder, "KILN_NVML_GPU": FIRST_GPU}


def samples(run: Run) -> list[dict]:
    return [step["gpu"] for step in run.records("step") if "gpu" in step]


def test_the_newest_sample_is_in_each_step(gpus: Lab, tmp_path: Path) -> None:
    """About one a second, in a run of three; the first is there long before the last step, and no step waits."""
    gpus.train("run", {"train.max_steps": 100000, "run.max_minutes": 0.05}, env=library(tmp_path / "nvml"), expect=85)
    run = gpus.run("run")
    steps, seen = run.records("step"), samples(run)
    assert "gpu" in steps[-1]
    for gpu in seen:
        assert gpu.items() >= CALM.items() and len(gpu) == len(CALM) + 1
    watts = [gpu["power_w"] for gpu in seen]
    assert watts == sorted(watts) and watts[0] == 300.5
    seconds = sum(step["step_ms"] for step in steps) / 1e3
    assert 2 <= len(set(watts)) <= seconds + 2


def test_only_rank_0_looks(gpus: Lab, tmp_path: Path) -> None:
    """Each looks for its own GPU; the second is unknown, and nothing is said of it."""
    result = gpus.train("run", {}, 2, env=library(tmp_path / "nvml") | {"KILN_EMULATOR_DEVICES": 2})
    assert NOTHING not in result.out + result.err
    assert samples(gpus.run("run"))


@pytest.mark.parametrize("flags, env, gone", [
    (["-DWITHOUT_POWER"], {}, {"power_w"}),
    ([], {"KILN_NVML_FAIL": "nvmlDeviceGetPowerUsage"}, {"power_w"}),
    ([], {"KILN_NVML_FAIL": "nvmlDeviceGetClockInfo"}, {"sm_mhz", "memory_mhz"}),
    ([], {"KILN_NVML_FAIL": "nvmlDeviceGetTemperature nvmlDeviceGetMemoryInfo"}, {"temperature_c", "memory_bytes"}),
    ([], {"KILN_NVML_FAIL": "nvmlDeviceGetUtilizationRates"}, {"utilization"}),
    ([], {"KILN_NVML_FAIL": "nvmlDeviceGetPowerUsage nvmlDeviceGetClockInfo nvmlDeviceGetTemperature "
                            "nvmlDeviceGetMemoryInfo nvmlDeviceGetUtilizationRates"}, None),
])
def test_what_a_gpu_does_not_tell_is_left_out(gpus: Lab, tmp_path: Path, flags: list[str], env: Env,
                                              gone: set[str] | None) -> None:
    gpus.train("run", env=library(tmp_path / "nvml", *flags) | env)
    seen = samples(gpus.run("run"))
    if gone is None:  # everything: then there is no sample
        assert not seen
    else:
        assert seen and all(set(gpu) == (set(CALM) | {"power_w"}) - gone for gpu in seen)


@pytest.mark.parametrize("flags, env, why", [
    ([], {"KILN_NVML_FAIL": "nvmlInit_v2"}, "nvmlInit_v2: stand-in's error 999"),
    ([], {"KILN_NVML_GPU": "0000:09:00.0"}, f"nvmlDeviceGetHandleByPciBusId_v2: Not Found ({FIRST_GPU})"),
    (["-DWITHOUT_HANDLE"], {}, "libnvidia-ml.so.1 has no nvmlDeviceGetHandleByPciBusId_v2"),
])
def test_without_nvml_one_line_says_why_and_the_run_is_the_same(gpus: Lab, tmp_path: Path, flags: list[str], env: Env,
                                                                why: str) -> None:
    result = gpus.train("run", env=library(tmp_path / "nvml", *flags) | env)
    assert result.out.count(NOTHING) == 1 and NOTHING + why in result.out
    assert not result.err
    run = gpus.run("run")
    assert len(run.records("step")) == STEPS and not samples(run)


def test_a_library_that_cannot_be_loaded_is_like_none(gpus: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "nvml"
    folder.mkdir()
    (folder / "libnvidia-ml.so.1").write_text("no library")
    result = gpus.train("run", env={"LD_LIBRARY_PATH": folder})
    assert result.out.count(NOTHING) == 1 and "libnvidia-ml.so.1" in result.out
    assert not samples(gpus.run("run"))


@pytest.mark.parametrize("function", ["nvmlInit_v2", "nvmlDeviceGetPowerUsage", "nvmlShutdown"])
def test_a_driver_that_hangs_holds_up_neither_the_steps_nor_the_end(gpus: Lab, tmp_path: Path, function: str) -> None:
    """It sleeps for a minute at a time."""
    result = gpus.train("run", env=library(tmp_path / "nvml") | {"KILN_NVML_HANG": function})
    assert result.seconds < 30
    assert gpus.run("run").status()["state"] == "complete"


def test_a_run_on_the_cpu_does_not_look(gpus: Lab, tmp_path: Path) -> None:
    env = library(tmp_path / "nvml") | {"KILN_NVML_FAIL": "nvmlInit_v2"}
    result = gpus.train("run", {"device.kind": "cpu"}, env=env)
    assert NOTHING not in result.out
    assert not samples(gpus.run("run"))
