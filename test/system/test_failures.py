"""Faults in configs, launches, data and numbers: one message that says it, the right exit code through
mpirun, and nothing that was saved is lost.  Damaged checkpoints are in test_checkpoint_files.py."""

from __future__ import annotations

import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import MPIRUN, TRAIN, Lab, Result, T, bound_by_modes, run, shard_bytes, some_tokens

Edit = Callable[[str], str | bytes]


def write_config(lab: Lab, edit: Edit) -> Path:
    path = lab.config("run")
    text = edit(path.read_text())
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


CONFIGS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "unknown key": (
        lambda t: t.replace("learning_rate", "learing_rate"),
        ("unknown key", "did you mean learning_rate?", "run.yaml:"),
    ),
    "unknown section": (
        lambda t: t.replace("optimizer:", "optimiser:"),
        ("unknown section optimiser", "did you mean optimizer?"),
    ),
    "wrong type": (
        lambda t: t.replace("micro_batch_size: 1", 'micro_batch_size: "8x"'),
        ('train.micro_batch_size = "8x"', "not an integer"),
    ),
    "learning rate < 0": (lambda t: t.replace("0.01", "-0.01"), ("optimizer.learning_rate = -0.01", "out of range")),
    "dropout > 1": (lambda t: t.replace("dropout: 0.1", "dropout: 1.5"), ("model.dropout = 1.5", "out of range")),
    "nan": (lambda t: t.replace("0.01", "nan"), ("optimizer.learning_rate = nan",)),
    "inf": (lambda t: t.replace("0.01", ".inf"), ("optimizer.learning_rate = .inf",)),
    "duplicate key": (lambda t: t.replace("  n_head: 2\n", "  n_head: 2\n  n_head: 4\n"), ("n_head", "run.yaml:")),
    "empty": (lambda t: "", ("run.yaml",)),
    "binary": (lambda t: bytes(range(256)) * 8, ("run.yaml",)),
    "tab": (lambda t: t.replace("  n_head", "\tn_head"), ("run.yaml:", "tab")),
    "heads": (
        lambda t: t.replace("n_head: 2", "n_head: 5"),
        ("model.n_embd = 32 is not divisible by model.n_head = 5",),
    ),
    "batch": (
        lambda t: t.replace("batch_size: 1", "batch_size: 3"),
        ("train.global_batch_size = 8", "train.micro_batch_size = 3", "6 or 9"),
    ),
    "ranks": (lambda t: t.replace("batch_size: 1", "batch_size: 8"), ("ranks * train.micro_batch_size = 2 * 8 = 16",)),
    "later": (lambda t: t + "parallel:\n  schedule: 1f1b\n", ("parallel.schedule is not available in this build",)),
    "required": (lambda t: t.replace("  n_layer: 2\n", ""), ("model.n_layer is required",)),
    "byte-order mark": (lambda t: "\ufeff" + t, ("run.yaml: begins with a byte-order mark",)),
    "nesting": (lambda t: "[" * 10000, ("run.yaml:",)),
    "alias": (lambda t: t + "x: &a [1]\ny: *a\n", ("run.yaml:",)),
    "huge": (lambda t: t + "#" * (2 << 20), ("run.yaml", "bytes")),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_is_refused(lab: Lab, case: str) -> None:
    edit, needles = CONFIGS[case]
    result = run([MPIRUN, "-np", "2", TRAIN, "--config", write_config(lab, edit)])
    assert result.code == 2, result.err
    for needle in needles:
        assert needle in result.error()
    assert not lab.run("run").path.exists(), "a refused config must not leave a run directory"


def test_duplicate_key_names_both_lines(lab: Lab) -> None:
    path = write_config(lab, lambda t: t.replace("  n_head: 2\n", "  n_head: 2\n  n_head: 4\n"))
    line = path.read_text().splitlines().index("  n_head: 2") + 1
    message = run([TRAIN, "--config", path]).error()
    assert f"run.yaml:{line + 1}" in message and f"line {line}" in message


def test_line_ends_of_another_system_are_read(lab: Lab) -> None:
    assert (
        run(
            [TRAIN, "--config", write_config(lab, lambda t: t.replace("\n", "\r\n")), "--set", "train.max_steps=1"]
        ).code
        == 0
    )


def test_config_that_is_no_readable_file(lab: Lab, tmp_path: Path) -> None:
    cases = {tmp_path / "absent.yaml": "No such file", tmp_path: "is a directory"}
    for path, needle in cases.items():
        result = run([MPIRUN, "-np", "2", TRAIN, "--config", path])
        assert result.code == 2 and str(path) in result.error() and needle in result.error()


def test_config_that_may_not_be_read(lab: Lab) -> None:
    secret = lab.config("secret")
    secret.chmod(0)
    result = run([*bound_by_modes(), MPIRUN, "-np", "2", TRAIN, "--config", secret])
    assert result.code == 2 and str(secret) in result.error() and "Permission denied" in result.error()


@pytest.mark.parametrize(
    "flags, needle",
    [
        ([], "--config is required"),
        (["--nonsense"], "--config is required"),
        (["frobnicate", "--config", "x"], "frobnicate"),
        (["export", "--config", "x"], "not available"),
        (["--config", "x", "--set", "train.max_steps"], "x"),
        (["eval", "--config", "x", "--resume"], "--resume"),
        (["--resume", "generate", "--config", "x"], "--resume"),
        (["eval", "--config", "x", "--overwrite"], "--overwrite"),
    ],
)
def test_command_line_is_refused(flags: list[str], needle: str) -> None:
    result = run([MPIRUN, "-np", "2", TRAIN, *flags])
    assert result.code == 2 and needle in result.err


def test_a_wrong_command_line_on_one_rank_ends_all(lab: Lab) -> None:
    result = run([MPIRUN, "-np", "1", TRAIN, "--config", lab.config("run"), ":", "-np", "1", TRAIN, "--bogus"])
    assert result.code == 2 and "[rank 1] error: " in result.err


def test_ranks_with_different_configs(lab: Lab) -> None:
    a, b = lab.config("run", file="a"), lab.config("run", {"optimizer.learning_rate": 0.02}, file="b")
    result = run([MPIRUN, "-np", "1", TRAIN, "--config", a, ":", "-np", "1", TRAIN, "--config", b])
    assert result.code == 2 and "rank(s) 1 have another config than rank 0" in result.error()
    assert not lab.run("run").path.exists()


def test_ranks_with_different_data(lab: Lab, data: Path, tmp_path: Path) -> None:
    """One config with relative paths, and another data set on each host."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(data, folder / "data")
    config = lab.config("run", {"data.train": ["data/train_*.bin"], "data.val": ["data/val.bin"]})

    def launch() -> Result:
        one, two = (["-wdir", f, "-np", "1", TRAIN, "--config", config] for f in folders)
        return run([MPIRUN, *one, ":", *two])

    assert launch().code == 0, "equal copies are the same data"
    shutil.rmtree(lab.run("run").path)
    for file, content in {
        "val.bin": shard_bytes(some_tokens(13 * T + 1, 99)),  # as many tokens, other ones
        "train_1.bin": shard_bytes(some_tokens(3001, 99)),
        "train_2.bin": shard_bytes(some_tokens(500)),  # one shard more
    }.items():
        (folders[1] / "data" / file).write_bytes(content)
        result = launch()
        assert result.code == 3 and "rank(s) 1" in result.error(), result.err
        if file == "val.bin":
            one, two = (["-wdir", f, "-np", "1", TRAIN, "eval", "--config", config] for f in folders)
            evaluated = run([MPIRUN, *one, ":", *two])
            assert evaluated.code == 3 and "rank(s) 1 have data files other" in evaluated.error()
        assert not lab.run("run").path.exists()
        shutil.rmtree(folders[1] / "data")
        shutil.copytree(data, folders[1] / "data")


@pytest.mark.parametrize(
    "variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "MV2_COMM_WORLD_SIZE"]
)
def test_world_of_one_under_a_launch_of_several_is_refused(lab: Lab, variable: str) -> None:
    message = lab.train("run", env={variable: 2}, expect=2).error()
    assert f"{variable}=2" in message and "world of 1" in message and "mpirun.mpich" in message
    assert not lab.run("run").path.exists()


def header(*ints: int) -> bytes:
    return struct.pack(f"<{len(ints)}i", *ints)


GOOD = shard_bytes(some_tokens(4000, 1))
BAD_TOKEN = some_tokens(4000, 1)
BAD_TOKEN[100] = 257
SHARDS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "magic": (header(20240521) + GOOD[4:], ("magic 20240521", "20240520")),
    "version": (header(20240520, 3) + GOOD[8:], ("version 3", "expected 1")),
    "half a header": (GOOD[:512], ("truncated", "512 bytes")),
    "truncated": (GOOD[:-1000], ("truncated", f"{len(GOOD) - 1000} bytes", "4000 tokens")),
    "count too small": (header(20240520, 1, 3999) + GOOD[12:], ("3999 tokens", "longer than its header states")),
    "count too large": (header(20240520, 1, 4001) + GOOD[12:], ("4001 tokens", "truncated")),
    "count 2^31 - 1": (header(20240520, 1, 2**31 - 1) + GOOD[12:], (f"{2**31 - 1} tokens",)),
    "count negative": (header(20240520, 1, -1) + GOOD[12:], ("-1 tokens",)),
    "token": (shard_bytes(BAD_TOKEN), ("token 100 is 257", "model.vocab_size = 257")),
    "too few": (shard_bytes(some_tokens(T * 7 + 1)), ("7 sequences", "train.global_batch_size = 8")),
    "no sequence": (shard_bytes(some_tokens(T)), ("too few for one sequence",)),
    "empty": (b"", ("too few for one sequence",)),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shard_is_refused(lab: Lab, tmp_path: Path, case: str) -> None:
    content, needles = SHARDS[case]
    shard = tmp_path / "bad.bin"
    shard.write_bytes(content)
    message = lab.train(
        "run", {"data.train": [str(shard)], "data.shuffle": False, "data.val": None}, np=2, expect=3
    ).error()
    for needle in (*needles, *(["bad.bin"] if case not in ("too few", "no sequence", "empty") else ["data.train"])):
        assert needle in message


def test_pattern_that_matches_nothing(lab: Lab) -> None:
    message = lab.train("run", {"data.train": ["nowhere/*.bin"]}, np=2, expect=3).error()
    assert "data.train" in message and "nowhere/*.bin" in message
    message = lab.train("run", {"data.val": ["/nowhere/*.bin"]}, np=2, expect=3).error()
    assert "data.val" in message


def test_short_and_empty_shards_among_good_ones(own_lab: Lab, own_data: Path) -> None:
    """A shard of fewer sequences than a batch joins the stream; one without tokens is named and left out."""
    (own_data / "train_2.bin").write_bytes(shard_bytes(some_tokens(2 * T + 1)))
    (own_data / "train_3.bin").write_bytes(b"")
    (own_data / "train_4.bin").write_bytes(shard_bytes([]))
    result = own_lab.train("run", np=2)
    assert "train_3.bin holds no tokens" in result.err and "train_4.bin holds no tokens" in result.err
    assert "438 training sequences" in result.out  # 249 + 187 + 2


def test_shard_replaced_between_runs(own_lab: Lab, own_data: Path) -> None:
    own_lab.train("run", {"train.max_steps": 10})
    before = own_lab.run("run").snapshot()
    (own_data / "train_1.bin").write_bytes(shard_bytes(some_tokens(3001, 99)))
    message = own_lab.train("run", np=2, flags=["--resume"], expect=3).error()
    assert "train_1.bin" in message and "data.train" in message and "init_from" in message
    assert own_lab.run("run").snapshot() == before


LONG = {"train.max_steps": 100000, "checkpoint.interval": 5, "data.val": None}


def test_shard_truncated_while_it_is_read(own_lab: Lab, own_data: Path) -> None:
    process = own_lab.start("run", LONG, np=2)
    own_lab.wait_for_step("run", 6, process)
    os.truncate(own_data / "train_0.bin", 1024)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 3 and "train_0.bin" in err and "shrank while it was in use" in err
    status = own_lab.run("run").status()
    assert status["state"] == "failed" and status["exit_code"] == 3 and "train_0.bin" in status["message"]
    assert own_lab.run("run").steps_saved()[0] % 5 == 0, "what was saved is still there"


def test_shard_deleted_while_it_is_read(own_lab: Lab, own_data: Path) -> None:
    process = own_lab.start("run", LONG)
    try:
        own_lab.wait_for_step("run", 6, process)
        (own_data / "train_0.bin").unlink()
        step = int(own_lab.run("run").losses()[-1][0])
        own_lab.wait_for_step("run", step + 60, process)  # an epoch is 54 steps: all of the file is read again
    finally:
        process.kill()
        process.communicate()


@pytest.mark.alone
def test_failure_of_one_rank_ends_all_soon(lab: Lab, tmp_path: Path) -> None:
    """Without shuffling rank 1 of 2 reads sequences 4..7 of each batch of 8: it alone meets the bad
    token, in step 21.  The clock starts at the last record of metrics.jsonl, that of step 20: the save of step 20 and
    the fault come after it.  Of the bound 0.6 s are waits in the program (a rank other than 0 lets rank 0 speak first;
    mpirun must have read the message before the abort), the rest is for mpirun's clean-up on a loaded machine."""
    tokens = some_tokens(4000)
    tokens[(20 * 8 + 5) * T + 3] = 60000
    (tmp_path / "bad.bin").write_bytes(shard_bytes(tokens))
    result = lab.train(
        "run",
        {"data.train": [str(tmp_path / "bad.bin")], "data.shuffle": False, "data.val": None, "train.max_steps": 30},
        np=2,
        expect=3,
    )
    ended_at = time.time()
    run_ = lab.run("run")
    assert ended_at - (run_.path / "metrics.jsonl").stat().st_mtime < 1.5
    assert "[rank 1] error: " in result.err and "bad.bin: token 2643 is 60000" in result.error()
    assert run_.steps_saved() == [10, 20] and len(run_.losses()) == 20 and run_.status()["exit_code"] == 3


# Weight decay of 1000 * 1000 makes every weight a million times larger each step: float32 overflows within ten.
EXPLODE = {
    "optimizer.learning_rate": 1000,
    "optimizer.weight_decay": 1000,
    "train.grad_clip": 0,
    "train.max_steps": 60,
    "checkpoint.interval": 1,
    "checkpoint.keep": 1,
}


def test_bad_steps_are_skipped_until_ten_in_a_row(lab: Lab) -> None:
    result = lab.train("run", EXPLODE, np=2, expect=6)
    run_ = lab.run("run")
    events = run_.records("event")
    first = events[0]["step"]
    assert [(e["event"], e["step"]) for e in events] == [("bad_step", first + i) for i in range(10)]
    assert "10th in a row" in result.error() and result.err.count("the update is skipped") == 9
    assert run_.status()["exit_code"] == 6 and run_.status()["step"] == first + 9
    assert run_.steps_saved() == [first - 1], "a bad step must not push the last good checkpoint out"


def test_a_run_does_not_end_well_on_a_bad_step(lab: Lab) -> None:
    lab.train("probe", EXPLODE, expect=6)
    first = lab.run("probe").records("event")[0]["step"]
    result = lab.train("run", EXPLODE | {"train.max_steps": first + 2}, expect=6)
    assert "the run ends on 3 bad step(s) in a row" in result.error()
    assert lab.run("run").status()["state"] == "failed" and lab.run("run").steps_saved() == [first - 1]


def test_bad_step_can_stop_the_run(lab: Lab) -> None:
    result = lab.train("run", EXPLODE | {"run.on_bad_step": "stop"}, np=2, expect=6)
    run_ = lab.run("run")
    assert "run.on_bad_step: stop" in result.error() and "not finite" in result.error()
    assert [e["step"] for e in run_.records("event")] == [run_.status()["step"]]
