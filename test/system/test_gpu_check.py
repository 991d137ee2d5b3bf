"""scripts/gpu/gpu_check.py without a GPU: it says that there is none; with programs that stand in: what it does with
results. Also cuda_libraries.sh.  Seen to fail: a result kept after another commit, build or option, a failed, skipped
or dirty result kept, a stage that outlives its limit, one stage's crash that ends the others, a sanitizer without time
that passes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import REPO, TRAIN, Result, run
from pretended_gpu import HERE, Check, bench_writes, beside, executable

SCRIPT = REPO / "scripts" / "gpu" / "gpu_check.py"


def test_every_stage_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    stages = ["tests", "sanitize", "train", "attention", "ops-124m", "pytorch-124m"]
    done = run([SCRIPT], {"OUT": tmp_path, "STAGE": " ".join(stages), "CUDA_VISIBLE_DEVICES": ""})
    assert done.code == 1, done.err
    *table, path = done.out.split("headline\n")[1].splitlines()
    table.append(path)
    assert "not measured" not in done.out  # no goals: nothing could be
    assert re.fullmatch("error: no usable GPU: .*; without one: make test, make emulated", done.err.splitlines()[-1])
    stages[1:2] = [f"sanitize-{tool}" for tool in ("memcheck", "racecheck", "synccheck", "initcheck")]
    assert sorted(line.split()[0] for line in table[:-1]) == sorted(stages)
    assert all(line.split()[1] == "failed" and "no usable GPU: " in line for line in table[:-1])
    merged = json.loads(Path(table[-1]).read_text())
    assert set(merged["stages"]) == set(stages)
    for stage in stages:
        assert json.loads((tmp_path / f"{stage}.json").read_text())["headline"].startswith("no usable GPU")
    assert "Traceback" not in done.err


def test_whether_there_is_a_gpu_is_known_before_anything_is_built(tmp_path: Path) -> None:
    none = {"OUT": tmp_path, "CUDA_VISIBLE_DEVICES": ""}
    done = run([SCRIPT, "--gpu"], none)
    assert done.code == 1 and done.err.startswith("error: no usable GPU: ") and not list(tmp_path.iterdir())
    for target in ("gpu-check", "bench-gpu"):
        commands = run(["make", "--no-print-directory", "-C", REPO, "-n", "NVCC=nvcc", "DEPS=0", target], none).out
        assert "gpu_check.py --gpu" in commands.splitlines()[0], commands[:400]


def test_its_options_are_in_its_help(tmp_path: Path) -> None:
    shown = run([SCRIPT, "--help"], {"OUT": tmp_path})
    assert shown.code == 0 and "STAGE=sanitize scripts/gpu/gpu_check.py" in shown.out and "--publish" in shown.out
    done = run([SCRIPT, "--stage"], {"OUT": tmp_path})
    assert done.code == 2 and "unrecognized arguments: --stage" in done.err


def test_without_a_stage_it_is_tests_attention_and_124m(tmp_path: Path) -> None:
    done = run([SCRIPT], {"OUT": tmp_path, "STAGE": "", "CUDA_VISIBLE_DEVICES": ""})
    assert done.code == 1
    written = sorted(p.stem for p in tmp_path.glob("[!n]*.json"))
    assert written == ["attention", "ops-124m", "pytorch-124m", "tests"]


def test_an_unknown_stage_or_option_is_refused(tmp_path: Path) -> None:
    refused: tuple[tuple[dict[str, object], str], ...] = (
        ({"STAGE": "tests,pytorch-7b"}, "STAGE=pytorch-7b; known are tests, sanitize"),
        ({"STAGE": "tests", "SDPA": "math"}, "SDPA=math; known are default, cudnn, flash"),
        ({"STAGE": "tests", "BATCH": "many"}, "'many'"))
    for env, error in refused:
        done = run([SCRIPT], {"OUT": tmp_path} | env)
        assert done.code == 2 and error in done.err
    assert not list(tmp_path.iterdir())


def counted(check: Check, stage: str = "ops-124m") -> Callable[[], bool]:
    """Runs the stage; whether its program was started for that."""
    count = check.out.parent / "count"
    check.shell("train", f"echo x >> {count}\n" + bench_writes('{"type": "run"}'))

    def again() -> bool:
        count.write_text("")
        assert check.run(stage) == 0
        return bool(count.read_text())

    return again


def test_what_has_passed_is_not_run_again(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    again = counted(check)
    assert again() and not again()
    monkeypatch.setattr(check.module, "FORCE", True)
    assert again()
    monkeypatch.setattr(check.module, "FORCE", False)
    assert not again()
    for key in ("commit", "gpu", "driver", "cublaslt", "nccl", "torch"):
        monkeypatch.setattr(check.module, "environment", lambda gpu, key=key: HERE | {key: "another"})
        assert again() and not again(), key
    assert check.merged()["environment"]["torch"] == "another"


def test_another_build_of_the_same_commit_is_run_again(check: Check) -> None:
    again = counted(check)
    assert again() and not again()
    check.shell("test_native", "true")
    assert again() and not again()
    check.shell("test_native", "tru")
    assert again() and not again()


def test_a_dirty_trees_result_is_not_kept(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    again = counted(check)
    monkeypatch.setattr(check.module, "environment", lambda gpu: HERE | {"commit": "abc-dirty"})
    assert again() and again()


def test_a_skipped_result_is_not_kept(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    again = counted(check)
    assert again()
    result = check.result("ops-124m") | {"result": "skipped"}
    (check.out / "ops-124m.json").write_text(json.dumps(result))
    assert again() and not again()


def test_other_options_are_run_again(check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = beside(check, monkeypatch, tmp_path)

    def again(stage: str = "pytorch-124m") -> str:
        calls.write_text("")
        assert check.run(stage) == 0
        return calls.read_text().replace("\n", " ")

    assert again() == 5 * "kiln 64 torch 64 " and again() == ""
    monkeypatch.setenv("BATCH", "8")
    assert again() == 5 * "kiln 8 torch 8 " and again() == ""
    monkeypatch.setenv("ROUNDS", "1")
    assert again() == "kiln 8 torch 8 " and again() == ""
    assert again("pytorch-350m") == "kiln 8 torch 8 " and again() == ""
    monkeypatch.setenv("SDPA", "cudnn")
    assert again() == "kiln 8 torch 8 cudnn " and again() == ""
    assert check.result("pytorch-124m-cudnn")["data"]["sdpa"] == "cudnn"
    assert check.result("pytorch-124m")["data"]["sdpa"] == "default"
    assert {"pytorch-124m", "pytorch-124m-cudnn", "pytorch-350m"} == set(check.merged()["stages"])
    monkeypatch.setenv("DEMO_STEPS", "7")
    assert again() == "" and check.module.options("train") == {"DEMO_STEPS": 7}


def test_what_has_failed_is_run_again_and_stops_nothing(check: Check, capsys: pytest.CaptureFixture) -> None:
    check.shell("train", "echo 'error: layernorm forward: no such kernel'; exit 70")
    summary = 'echo "[doctest] test cases: 9 | 8 passed | 1 failed | 0 skipped"; exit 1'
    check.shell("test_isa_sm90_native", f"echo TEST CASE:  isa: wgmma; {summary}")
    check.shell("test_native", summary)
    assert check.run("tests ops-124m") == 1
    tests = check.result("tests")
    assert tests["result"] == "failed" and "instructions: 1 failed" in tests["headline"]
    assert tests["data"]["instructions"]["failing"] == ["isa: wgmma"]
    assert tests["data"]["ops and model"]["failed"] == 1
    assert f"communication, 2 ranks: {check.programs}/test_mpi_native is missing" in tests["headline"]
    assert "no such kernel" in check.result("ops-124m")["headline"]
    assert set(check.merged()["stages"]) == {"tests", "ops-124m"}
    check.shell("train", bench_writes('{"type": "run"}'))
    assert check.run("ops-124m") == 0
    assert check.merged()["stages"]["ops-124m"]["result"] == "passed"
    assert "tests" in capsys.readouterr().out


def test_a_stage_ends_at_its_limit_with_all_it_has_started(check: Check, tmp_path: Path) -> None:
    check.patch.setattr(check.module, "STAGE_SECONDS", 1.5)
    check.shell("train", f"(sleep 4; touch {tmp_path}/outlived) & sleep 60")
    start = time.monotonic()
    assert check.run("ops-124m") == 1
    assert time.monotonic() - start < 20
    assert check.result("ops-124m")["headline"] == "train bench: ran out of time"
    time.sleep(max(0.0, 5 - (time.monotonic() - start)))
    assert not (tmp_path / "outlived").exists()


def test_output_that_is_not_as_expected_is_a_failure(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    check.shell("train", bench_writes("{"))
    assert check.run("ops-124m") == 1
    assert check.result("ops-124m")["headline"].startswith("JSONDecodeError")


def test_no_sanitizer_is_skipped_in_words(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.stages.shutil, "which", lambda name: None)
    monkeypatch.setattr(check.stages, "SANITIZERS", ())
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert check.run("sanitize") == 0
    assert check.result("sanitize-synccheck")["result"] == "skipped"
    assert "compute-sanitizer is not on the PATH" in check.merged()["stages"]["sanitize-memcheck"]["headline"]


def sanitizer(check: Check, tmp_path: Path, racecheck: str, passed: int = 5) -> Path:
    """Stands in for compute-sanitizer: racecheck does what is asked for, the others find nothing."""
    calls = tmp_path / "calls"
    text = f"""case "$*" in
--help) echo "--kernel-name arg --report-api-errors arg"; exit ;;
esac
echo "========= COMPUTE-SANITIZER"
echo "$2 $*" >> {calls}
echo "0.500000 s: gelu: every backend"
echo "[doctest] test cases: {passed} | {passed} passed | 0 failed | 90 skipped"
case "$*" in
*racecheck*) {racecheck} ;;
*) echo "========= ERROR SUMMARY: 0 errors" ;;
esac"""
    tool = executable(tmp_path / "compute-sanitizer", f"#!/bin/bash\n{text}\n")
    check.patch.setattr(check.stages.shutil, "which", lambda name: str(tool))
    check.shell("test_native", "true")
    return calls


def tools_run(calls: Path) -> list[str]:
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.write_text("")
    return [line.split()[0] for line in lines]


NOTHING = 'echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"'


def test_the_sanitizers_findings_fail_the_stage(check: Check, tmp_path: Path) -> None:
    summary = "RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"
    calls = sanitizer(check, tmp_path, f'echo "========= {summary}"; exit 9')
    assert check.run("sanitize") == 1
    assert tools_run(calls) == list(check.stages.TOOLS)
    results = {tool: check.result(f"sanitize-{tool}") for tool in check.stages.TOOLS}
    assert [r["result"] for r in results.values()] == ["passed", "failed", "passed", "passed"]
    assert results["racecheck"]["headline"] == f"racecheck: {summary}"
    assert results["memcheck"]["headline"] == "memcheck: nothing found in 5 test cases"
    assert results["memcheck"]["data"]["seconds_of"] == {"gelu: every backend": 0.5}
    assert check.run("sanitize-memcheck") == 0 and tools_run(calls) == []
    sanitizer(check, tmp_path, NOTHING)
    assert check.run("sanitize") == 0
    assert tools_run(calls) == ["racecheck"]  # the others have passed


def test_a_sanitizer_out_of_time_has_not_passed(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = sanitizer(check, tmp_path, "sleep 60")
    monkeypatch.setattr(check.module, "STAGE_SECONDS", 4)
    start = time.monotonic()
    assert check.run("sanitize") == 1
    assert time.monotonic() - start < 15 and tools_run(calls) == list(check.stages.TOOLS)  # each has its share
    result = check.result("sanitize-racecheck")
    assert result["result"] == "timed out" and "racecheck: not done after 1 s; nothing found" in result["headline"]
    assert check.result("sanitize-initcheck")["result"] == "passed"
    assert check.run("sanitize") == 1 and tools_run(calls) == ["racecheck"]
    assert "not done after 4 s" in check.result("sanitize-racecheck")["headline"]  # alone it has all of the time
    sanitizer(check, tmp_path, 'echo "========= Error: Race reported between Write and Read"; sleep 60')
    assert check.run("sanitize-racecheck") == 1
    result = check.result("sanitize-racecheck")
    assert result["result"] == "failed" and "ran out of time; found ========= Error: Race" in result["headline"]


def test_a_sanitizer_that_ran_no_test_has_not_passed(check: Check, tmp_path: Path) -> None:
    sanitizer(check, tmp_path, NOTHING, passed=0)
    assert check.run("sanitize") == 1
    assert check.result("sanitize-racecheck")["headline"] == "racecheck: no test was run"


def test_what_the_sanitizers_run(check: Check, tmp_path: Path) -> None:
    """Every test of test/kernels, but for calls that fail on purpose and hundreds of calls; not whole models, and not
    the peak, which is the library's largest product."""
    program = TRAIN.resolve().parent / "test"
    if not program.exists():
        pytest.skip(f"make {program.relative_to(REPO)} builds it")
    calls = sanitizer(check, tmp_path, NOTHING)
    assert check.run("sanitize-memcheck sanitize-racecheck") == 0
    memcheck, racecheck = calls.read_text().splitlines()
    assert all("--report-api-errors no" in line for line in (memcheck, racecheck))
    assert "--kernel-name kns=_kernel" in racecheck and "--kernel-name" not in memcheck

    def cases(line: str) -> set[str]:
        """The tests that the C++ program runs with the flags of this line."""
        flags = re.findall(r" (-(?:sf|tc|tce)=.*?)(?= -|$)", line)
        listed = subprocess.run([program, "--list-test-cases", "--no-intro", *flags],
                                check=True, capture_output=True, text=True).stdout
        return {name for name in listed.splitlines() if not name.startswith(("[doctest]", "==="))}

    kernels = cases(" -sf=*test/kernels/*")
    checked = cases(memcheck)
    left_out = kernels - checked
    no_memory = {"backend: no memory is an error that says how much was asked for",
                 "backend: no pinned memory is an error too"}
    long = {"attention sm90: random shapes against fp32", "attention sm90: the same bits 100 times"}
    assert left_out == no_memory | long
    assert len(checked) > 80 and checked < kernels
    products = checked - cases(racecheck)
    assert len(products) == 2 and all(name.startswith("linear ") for name in products)


def test_two_ranks_of_the_emulated_program_are_as_one(check: Check, tmp_path: Path) -> None:
    emulated = TRAIN.resolve().parent / "train-emulated"
    if not emulated.exists():
        pytest.skip("make emulated builds it")
    (check.programs / "train").symlink_to(emulated)
    check.patch.setenv("KILN_EMULATOR_DEVICES", "1")
    tiny = check.stages.tiny

    def tinier(s: object) -> dict:
        config: dict = tiny(s)
        config["model"] |= {"n_layer": 1, "n_embd": 32, "context_length": 16}
        config["train"] |= {"max_steps": 3, "global_batch_size": 4, "micro_batch_size": 1}
        return config

    check.patch.setattr(check.stages, "tiny", tinier)
    (tmp_path / "log").write_text("")
    stage = check.stages.Stage("tests", check.module.find_gpu(), tmp_path / "log", tmp_path)
    assert check.stages.two_ranks(stage)["steps"] == 3, (tmp_path / "log").read_text()


def test_where_cuda_is_looked_for(tmp_path: Path) -> None:
    """Each place alone; what this machine has is kept out of sight."""
    folders = ("home/lib64", "path", "system", "toolkit/lib64", "toolkit/bin", "site/nvidia/cu13/lib",
               "site/nvidia/nccl/lib", "bin")
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    for tool in ("awk", "bash", "dirname", "env", "readlink"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or "/missing")
    executable(tmp_path / "bin" / "python3", f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')  # no packages of its own
    nowhere = {"CUDA_HOME": "", "LD_LIBRARY_PATH": "", "PYTHONPATH": "", "KILN_CUDA_SYSTEM": "",
               "PATH": tmp_path / "bin"}

    def found(**env: object) -> Result:
        return run([REPO / "scripts" / "gpu" / "cuda_libraries.sh"], nowhere | env)

    for folder in ("home/lib64", "path", "system", "toolkit/lib64"):
        for library in ("libcublasLt.so.13", "libnccl.so.2"):
            (tmp_path / folder / library).touch()
    none = found()
    assert none.code == 1 and none.out == "\n"
    assert "libcublasLt.so.13 not found" in none.err and "libnccl.so.2 not found" in none.err
    assert found(CUDA_HOME=tmp_path / "home").out == f"{tmp_path}/home/lib64\n"
    assert found(LD_LIBRARY_PATH=f"/nowhere:{tmp_path}/path").out == f"{tmp_path}/path\n"
    assert found(KILN_CUDA_SYSTEM=f"/nowhere:{tmp_path}/system").out == f"{tmp_path}/system\n"
    executable(tmp_path / "toolkit/bin/nvcc", "")
    beside = found(PATH=f"{tmp_path}/bin:{tmp_path}/toolkit/bin").out
    assert Path(beside.strip()).resolve() == tmp_path / "toolkit/lib64"

    site = {"PYTHONPATH": tmp_path / "site"}
    (tmp_path / "site/nvidia/cu13/lib/libcublasLt.so.13").touch()
    one = found(**site)
    assert one.code == 1 and one.out == f"{tmp_path}/site/nvidia/cu13/lib\n"
    assert "libnccl.so.2 not found" in one.err and "libcublasLt" not in one.err
    (tmp_path / "site/nvidia/nccl/lib/libnccl.so.2").touch()
    both = found(**site)
    assert both.code == 0 and both.out == f"{tmp_path}/site/nvidia/cu13/lib:{tmp_path}/site/nvidia/nccl/lib\n"
    assert found(CUDA_HOME=tmp_path / "home", **site).out == f"{tmp_path}/home/lib64\n"  # before the packages
    (tmp_path / "site/nvidia/cudnn/lib").mkdir(parents=True)
    (tmp_path / "site/nvidia/cudnn/lib/libcudnn.so.9").touch()
    assert found(**site).out == both.out.strip() + f":{tmp_path}/site/nvidia/cudnn/lib\n"
