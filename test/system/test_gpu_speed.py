"""scripts/gpu/gpu_speed.py: the stages that measure, with programs that stand in; and the programs that the stages
start, bench_attention and bench_pytorch.py, at tiny sizes. Seen to fail: a round begun that is cut off, a batch halved
on one side alone, a repeated run with other weights that passes, the first run's record taken for the second's, fp32's
loss taken for bf16's.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

import test_bench
from conftest import REPO, TRAIN, Lab, run
from pretended_gpu import Check, beside, executable

TORCH = "/usr/bin/python3"
BENCH = REPO / "scripts" / "pytorch" / "bench_pytorch.py"
TWIN = REPO / "scripts" / "pytorch" / "train_pytorch.py"


def test_kiln_and_pytorch_take_turns(check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = beside(check, monkeypatch, tmp_path)
    assert check.run("pytorch-124m") == 0, check.result("pytorch-124m")
    assert calls.read_text().split("\n")[:-1] == 5 * ["kiln 64", "torch 64"]
    data = check.result("pytorch-124m")["data"]
    assert data["kiln"][0]["graph"] is True and data["kiln"][0]["memory_taken"] == 102
    assert data["kiln_tokens_per_s"] == pytest.approx(64 * 1024 / 0.05) and data["rounds"] == 5
    assert data["ratio"] == pytest.approx(64 * 1024 / 0.05 / 200000)
    shown = "kiln 1,310,720 tokens/s (10.5% of 10000 TFLOP/s), PyTorch (default SDPA) 200,000: 6.55x, 5 round(s)"
    assert shown in check.result("pytorch-124m")["headline"]


def test_a_graph_that_could_not_be_recorded_is_not_said_to_be_used(check: Check, tmp_path: Path) -> None:
    beside(check, check.patch, tmp_path)
    check.patch.setenv("NO_GRAPH", "1")
    assert check.run("pytorch-124m") == 0
    assert check.result("pytorch-124m")["data"]["kiln"][0]["graph"] is False


def test_a_round_that_would_be_cut_off_is_not_begun(check: Check, monkeypatch: pytest.MonkeyPatch,
                                                     tmp_path: Path) -> None:
    calls = beside(check, monkeypatch, tmp_path)
    monkeypatch.setattr(check.module, "STAGE_SECONDS", 13)
    monkeypatch.setenv("SLEEP", "5")
    assert check.run("pytorch-124m") == 0, check.result("pytorch-124m")
    assert calls.read_text().split("\n")[:-1] == ["kiln 64", "torch 64"]
    assert check.result("pytorch-124m")["data"]["rounds"] == 1


def test_a_batch_that_does_not_fit_is_halved_for_both(check: Check, tmp_path: Path) -> None:
    calls = beside(check, check.patch, tmp_path)
    check.patch.setenv("FITS", "4")
    assert check.run("pytorch-1558m") == 0
    assert calls.read_text().split("\n")[:4] == ["kiln 16", "kiln 8", "kiln 4", "torch 4"]
    assert "out of memory" in check.result("pytorch-1558m")["data"]["halved_because"]
    assert check.result("pytorch-1558m")["data"]["B"] == 4
    check.patch.setenv("FITS", "0")
    assert check.run("pytorch-350m") == 1
    assert "out of memory" in check.result("pytorch-350m")["headline"]


def test_without_pytorch_kiln_is_measured_alone(check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    beside(check, monkeypatch, tmp_path)
    none = executable(tmp_path / "none", "#!/bin/bash\necho 'error: PyTorch is missing'; exit 2\n")
    monkeypatch.setenv("KILN_TORCH_PYTHON", str(none))
    assert check.run("pytorch-124m") == 0
    headline = check.result("pytorch-124m")["headline"]
    assert "kiln 1,310,720 tokens/s (10.5% of 10000 TFLOP/s); PyTorch: exit 2: error: PyTorch is missing" in headline


def test_training_is_set_beside_the_fastest_kernels(check: Check, tmp_path: Path) -> None:
    calls = beside(check, check.patch, tmp_path)
    assert check.run("modes") == 0, check.result("modes")
    assert calls.read_text().splitlines() == 5 * ["kiln 64", "kiln 64 fastest"]
    data = check.result("modes")["data"]
    assert data["cost"] == pytest.approx(50 / 48 - 1) and data["same_weights"] is True
    check.patch.setenv("NO_CUDNN", "1")
    check.patch.setattr(check.module, "FORCE", True)
    assert check.run("modes") == 0
    data = check.result("modes")["data"]
    assert data["cost"] is None and "no cuDNN" in data["fastest_failed"] and len(data["auto"]) == 5


def test_another_runs_other_weights_are_a_failure(check: Check, tmp_path: Path) -> None:
    beside(check, check.patch, tmp_path)
    check.patch.setenv("NO_CUDNN", "1")
    check.patch.setenv("WEIGHTS", f"{'a' * 16} {'a' * 16} {'b' * 16}")
    assert check.run("modes") == 1
    assert f"other weights: {'a' * 16}, {'b' * 16}" in check.result("modes")["headline"]


def test_what_time_allows_of_the_modes_is_kept(check: Check, tmp_path: Path) -> None:
    beside(check, check.patch, tmp_path)
    check.patch.setattr(check.module, "STAGE_SECONDS", 13)
    check.patch.setenv("SLEEP", "3")
    assert check.run("modes") == 0, check.result("modes")
    assert len(check.result("modes")["data"]["auto"]) == 1 and check.result("modes")["data"]["same_weights"] is None
    assert check.goals.table(check.merged()).count("not met") == 0  # one run shows nothing of repeating


def test_the_start_ends_with_the_first_step_of_each_run(check: Check, tmp_path: Path) -> None:
    beside(check, check.patch, tmp_path)
    check.patch.setenv("SLEEP", "3")  # 0.05 s before each of 60 steps
    assert check.run("start") == 0, check.result("start")
    data = check.result("start")["data"]
    assert all(0.05 <= data[key] < 2 for key in ("first_s", "warm_s")), data


def test_the_gpus_work_is_that_of_the_steps_alone(check: Check, tmp_path: Path) -> None:
    """Seconds of a start with long gaps, then 300 steps of 8 ms: kernels of 3.9 ms, the second of a pair overlapped by
    a copy, and 0.1 ms of nothing before each; then a hash."""
    ms = 1_000_000
    kernels = [(i * 500 * ms, i * 500 * ms + ms) for i in range(8)]
    copies, at = [], 4000 * ms
    for _ in range(300):
        for copied in (False, True):
            kernels.append((at + ms // 10, at + 4 * ms))
            if copied:
                copies.append((at + ms, at + 2 * ms))
            at += 4 * ms
    kernels.append((at + 3 * ms, at + 9 * ms))
    with sqlite3.connect(tmp_path / "x.sqlite") as db:
        for table, spans in (("KERNEL", kernels), ("MEMCPY", copies)):
            db.execute(f"CREATE TABLE CUPTI_ACTIVITY_KIND_{table} (start INTEGER, end INTEGER)")
            db.executemany(f"INSERT INTO CUPTI_ACTIVITY_KIND_{table} VALUES (?, ?)", spans)
    assert check.speed.busy_ms(tmp_path / "x.sqlite", 300, 8.0) == pytest.approx(2 * 3.9, rel=0.001)


def quality_text(check: Check, tmp_path: Path) -> None:
    beside(check, check.patch, tmp_path)
    (tmp_path / "text").write_text("to be, or not to be\n" * 200)
    check.patch.setattr(check.speed, "TEXT", tmp_path / "text")


def test_the_best_of_the_val_losses_counts(check: Check, tmp_path: Path) -> None:
    quality_text(check, tmp_path)
    assert check.run("quality-2 quality-fp32") == 0, check.result("quality-2")
    data = check.result("quality-2")["data"]
    assert data["kiln"]["best_val_loss"] == 3.005 and data["pytorch"]["best_val_loss"] == 3.25 and data["seed"] == 2
    assert check.result("quality-fp32")["data"]["kiln"]["best_val_loss"] == 3.01
    judged = {v.goal.name: v for v in check.goals.judge(check.merged())}
    assert judged["shakespeare-char: bf16 from fp32"].result == "not measured"  # of the first seed


def test_without_the_text_quality_is_skipped_in_words(check: Check, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture) -> None:
    check.patch.setattr(check.speed, "TEXT", tmp_path / "none")
    assert check.run("quality") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("quality will be skipped: ")  # before time is spent
    assert said[2].startswith("== quality-1")
    assert {check.result(f"quality-{name}")["result"] for name in (1, 2, 3, "fp32")} == {"skipped"}
    assert "TEXT=FILE names tiny Shakespeare" in check.result("quality-1")["headline"]


def attention_rows(*rows: tuple[str, str, str, float], goals: str = "") -> str:
    """The lines of bench_attention's file: shape, way, kernel, us; a letter for each goal."""
    results = {"m": "met", "n": "not met", "x": "not measured"}
    lines: list[dict] = [{"type": "run", "device": "NVIDIA Pretended"},
                         {"type": "kernel", "kernel": "sm90", "refusal": ""}]
    lines += [{"type": "attention", "shape": shape, "way": way, "kernel": kernel, "us": us, "tflop_per_s": 1e5 / us}
              for shape, way, kernel, us in rows]
    lines += [{"type": "goal", "result": results[g]} for g in goals]
    return "\n".join(map(json.dumps, lines))


def attention_bench(check: Check, text: str) -> None:
    check.shell("bench_attention", f'[ "$1" = --json ] && cat > "$2" <<END\n{text}\nEND')


def attention_torch(check: Check, tmp_path: Path) -> Path:
    """Stands in for python3 with PyTorch, whose flash attention does not run here."""
    calls = tmp_path / "calls"
    forward = {"default": 500, "cudnn": 250}
    answers = {sdpa: [{"shape": "64x12x1024x64", "sdpa": sdpa, "forward_us": us, "backward_us": 2 * us}]
               for sdpa, us in forward.items()}
    cases = "\n".join(f"*{sdpa}*) echo '{json.dumps({'attention': rows})}' ;;" for sdpa, rows in answers.items())
    python = executable(tmp_path / "torch_python", f"""#!/bin/bash
echo "$*" >> {calls}
case "$*" in
{cases}
*) echo "RuntimeError: no such error: flash"; exit 1 ;;
esac
""")
    check.patch.setenv("KILN_TORCH_PYTHON", str(python))
    return calls


def test_attention_is_set_beside_pytorch(check: Check, tmp_path: Path) -> None:
    shape = "64x12x1024x64"
    attention_bench(check, attention_rows((shape, "forward", "portable", 500.0), (shape, "forward", "sm90", 200.0),
                                          (shape, "forward", "cudnn", 100.0), (shape, "backward", "sm90", 400.0),
                                          ("4x16x4096x128", "forward", "sm90", 100.0), goals="mmnx"))
    calls = attention_torch(check, tmp_path)
    assert check.run("attention") == 0, check.result("attention")
    assert calls.read_text().splitlines() == [
        f"{BENCH} --sdpa {sdpa} --attention {shape} --attention 4x16x4096x128"
        for sdpa in ("default", "cudnn", "flash")]
    result = check.result("attention")
    assert result["headline"] == (
        f"sm90 at {shape}: forward 500 TFLOP/s (2.50x default, 1.25x cudnn of PyTorch), "
        "backward 250 TFLOP/s (2.50x default, 1.25x cudnn of PyTorch); 2 of 4 goals met, 1 not measured")
    data = result["data"]
    assert {(b["way"], b["kernel"], b["sdpa"], b["ratio"]) for b in data["beside_pytorch"]} == {
        ("forward", "portable", "default", 1.0), ("forward", "portable", "cudnn", 0.5),
        ("forward", "sm90", "default", 2.5), ("forward", "sm90", "cudnn", 1.25),
        ("backward", "sm90", "default", 2.5), ("backward", "sm90", "cudnn", 1.25)}
    assert "no such error: flash" in data["pytorch_failed"]["flash"] and len(data["goals"]) == 4


def test_attention_without_pytorch_or_hopper(check: Check, tmp_path: Path) -> None:
    check.patch.setenv("KILN_TORCH_PYTHON", "false")
    attention_bench(check, attention_rows(("64x12x1024x64", "forward", "portable", 500.0), goals="x"))
    assert check.run("attention") == 0
    assert check.result("attention")["headline"] == (
        "portable at 64x12x1024x64: forward 200 TFLOP/s; no PyTorch; 0 of 1 goals met, 1 not measured")
    check.shell("bench_attention", "echo 'error: 1 measurement(s) failed'; exit 70")
    assert check.run("attention") == 1
    assert check.result("attention")["headline"] == "bench_attention: exit 70: error: 1 measurement(s) failed"


def attention_times(tmp_path: Path, *flags: object, **env: object) -> tuple[str, list[dict]]:
    bench = TRAIN.resolve().parent / "bench_attention-emulated"
    if not bench.exists():
        pytest.skip(f"{bench.name} is not built")
    out = tmp_path / "attention.jsonl"
    done = run([bench, "--samples", 2, "--flush-mib", 1, "--json", out, *flags], env)
    assert done.code == 0, done.out + done.err
    return done.out, [json.loads(line) for line in out.read_text().splitlines()]


def test_attention_kernels_are_timed_side_by_side(tmp_path: Path) -> None:
    text, rows = attention_times(tmp_path)
    assert rows[0]["type"] == "run" and rows[0]["samples"] == 2
    refusals = {r["kernel"]: r["refusal"] for r in rows if r["type"] == "kernel"}
    assert list(refusals) == ["portable", "sm90", "cudnn", "cudnn_fastest"]
    there = [kernel for kernel, refusal in refusals.items() if not refusal]
    assert there[:2] == ["portable", "sm90"]
    assert all(f"without {kernel}: {refusal}" in text for kernel, refusal in refusals.items() if refusal)
    times = [r for r in rows if r["type"] == "attention"]
    assert [(r["shape"], r["way"], r["kernel"]) for r in times] == [
        (shape, way, kernel) for shape in ("1x2x160x64", "1x1x130x128") for way in ("forward", "backward")
        for kernel in there]
    for r in times:
        B, NH, T, HS = map(int, r["shape"].split("x"))
        assert r["flop"] == {"forward": 2, "backward": 5}[r["way"]] * B * NH * T * T * HS
        assert 0 < r["us_min"] <= r["us"] <= r["us_max"]
        assert r["tflop_per_s"] == pytest.approx(r["flop"] / r["us"] / 1e6)
        assert (r["beside_cudnn"] is None) == ("cudnn" not in there)
        assert r["clock_mhz"] == pytest.approx(1000, rel=0.01)  # the emulated cycles are nanoseconds
        peak = 4 * 4096 * r["clock_mhz"] * 1e6                  # of 4 emulated multiprocessors
        assert r["share_of_peak"] == pytest.approx(1e12 * r["tflop_per_s"] / peak)
    goals = [r for r in rows if r["type"] == "goal"]
    assert len(goals) > 10 and all(g["result"] == "not measured" and g["got"] is None for g in goals)  # of no H100


def test_attention_without_hopper_is_portable(tmp_path: Path) -> None:
    text, rows = attention_times(tmp_path, "--shape", "1x1x20x64", KILN_EMULATOR_CAPABILITY=80)
    assert {r["kernel"] for r in rows if r["type"] == "attention"} == {"portable"}
    assert "without sm90: the sm90 kernels are for compute capability 9.0 alone, this GPU has 8.0" in text


@pytest.mark.parametrize("flags, error", [
    (["--shape", "64x12x1024"], "--shape 64x12x1024: expected BxNHxTxHS"),
    (["--shape", "1x1x16x96"], "with HS 64 or 128"),
    (["--kernel", "sm90"], "--kernel sm90: the sm90 kernels are for compute capability 9.0 alone"),
])
def test_what_the_attention_bench_refuses(flags: list[str], error: str) -> None:
    bench = TRAIN.resolve().parent / "bench_attention-emulated"
    if not bench.exists():
        pytest.skip(f"{bench.name} is not built")
    done = run([bench, *flags], {"KILN_EMULATOR_CAPABILITY": 80})
    assert done.code == 2 and error in done.err


def test_the_pytorch_bench_runs_at_a_tiny_size(tmp_path: Path) -> None:
    if run([TORCH, "-c", "import torch"]).code != 0:
        pytest.skip("no PyTorch")
    bench = [TORCH, BENCH, "--tiny", "--device", "cpu"]
    done = run([*bench, "--json", tmp_path / "result.json"])
    assert done.code == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 4 and len(result["window_step_ms"]) == 2
    assert result["tokens_per_s"] == pytest.approx(1e3 * result["B"] * result["T"] / result["step_ms"])
    assert 4 < result["last_loss"] < 5.5  # ln 128 = 4.85
    done = run([*bench, "--attention", "2x2x32x16", "--attention", "1x1x8x8"])
    assert [a["shape"] for a in json.loads(done.out)["attention"]] == ["2x2x32x16", "1x1x8x8"], done.err


def test_pytorchs_ops_have_the_names_of_kilns() -> None:
    if run([TORCH, "-c", "import torch"]).code != 0:
        pytest.skip("no PyTorch")
    done = run([TORCH, BENCH, "--tiny", "--device", "cpu", "--ops"])
    assert done.code == 0, done.err
    ops = {r["op"]: r for r in json.loads(done.out.splitlines()[-1])["ops"]}
    # PyTorch has no op for the others; what stands alone in kiln's step is timed in both.
    assert set(ops) == set(test_bench.NAMES) - {"last layernorm backward", "row sum", "dropout", "dropout + residual",
                                                "add", "tree sum of 2", "cast", "hash"}
    assert all(r["us"] > 0 and "failed" not in r for r in ops.values())


def test_the_twin_trains_by_a_config_of_kiln(lab: Lab) -> None:
    if run([TORCH, "-c", "import torch"]).code != 0:
        pytest.skip("no PyTorch")
    config = lab.config("twin", {"train.max_steps": 30, "eval.interval": 10, "model.dropout": 0.1, "model.bias": False})

    def evals(*flags: object) -> list:
        done = run([TORCH, TWIN, "--config", config, "--device", "cpu", "--no-compile", *flags], cwd=lab.root)
        assert done.code == 0, done.err
        result = json.loads(done.out.splitlines()[-1])
        assert result["best_val_loss"] == min(v for _, v in result["evals"])
        found: list = result["evals"]
        return found

    first = evals()
    assert [step for step, _ in first] == [10, 20, 30] and first[-1][1] < first[0][1] < 6
    assert evals() == first and evals("--seed", 2) != first
    assert evals("--set", "train.max_steps=10") == first[:1]
    done = run([TORCH, TWIN, "--config", config, "--set", "optimizer.beta1=0.8", "--device", "cpu"], cwd=lab.root)
    assert done.code == 2 and "optimizer.beta1 is 0.8, and the twin knows only 0.9" in done.err


def test_without_a_gpu_the_pytorch_bench_says_so() -> None:
    done = run([TORCH, BENCH], {"CUDA_VISIBLE_DEVICES": ""})
    assert done.code == 2 and done.err.startswith("error: PyTorch ")
    assert shutil.which("python3")
