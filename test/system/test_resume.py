"""A run that is stopped and resumed is the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from conftest import Lab

EVALUATE = {"eval.interval": 5}


@pytest.mark.parametrize("before, after", [(1, 1), (2, 1), (1, 2)])
def test_ten_and_ten_are_twenty(lab: Lab, before: int, after: int) -> None:
    lab.train("straight", EVALUATE)
    lab.train("halves", EVALUATE | {"train.max_steps": 10}, np=before)
    out = lab.train("halves", EVALUATE, np=after, flags=["--resume"]).out
    assert "resuming from" in out and "step_10" in out
    straight, halves = lab.run("straight"), lab.run("halves")
    assert halves.losses() == straight.losses() and len(straight.losses()) == 20
    assert halves.val_losses() == straight.val_losses() and len(straight.val_losses()) == 4
    assert halves.hashes(20) == straight.hashes(20)
    assert [r["step"] for r in halves.records("run")] == [0, 10]


@pytest.mark.parametrize(
    "extra",
    [
        {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "model.bias": False},
        {"optimizer.name": "lion", "optimizer.learning_rate": 1e-3},
        {"optimizer.name": "adam", "schedule.name": "cosine", "schedule.warmup_steps": 4},
        {"data.shuffle": False, "train.global_batch_size": 48},
    ],
)  # resumes in the second epoch
def test_every_state_is_in_the_checkpoint(lab: Lab, extra: dict[str, object]) -> None:
    fixed = {"schedule.decay_steps": 20} if "schedule.name" in extra else {}
    lab.train("straight", extra | fixed)
    lab.train("halves", extra | fixed | {"train.max_steps": 10})
    lab.train("halves", extra | fixed, flags=["--resume"])
    assert lab.run("halves").losses() == lab.run("straight").losses()
    assert lab.run("halves").hashes(20) == lab.run("straight").hashes(20)


def test_records_after_the_checkpoint_are_dropped(lab: Lab) -> None:
    lab.train("straight", EVALUATE)
    lab.train("run", EVALUATE | {"train.max_steps": 10})
    metrics = lab.run("run").path / "metrics.jsonl"
    late = [
        {"type": "step", "step": 11, "loss": 1},
        {"type": "eval", "step": 15, "val_loss": 1},
        {"type": "event", "step": 12, "event": "kept"},
    ]
    with metrics.open("a") as f:
        f.write("".join(json.dumps(r) + "\n" for r in late) + '{"type":"step","step":13,"lo')  # killed in mid-line
    lab.train("run", EVALUATE, flags=["--resume"])
    assert lab.run("run").losses() == lab.run("straight").losses()
    assert lab.run("run").val_losses() == lab.run("straight").val_losses()
    assert [r["event"] for r in lab.run("run").records("event")] == ["kept"]


def test_resume_with_nothing_saved_starts_at_step_0_and_says_so(lab: Lab) -> None:
    out = lab.train("run", {"train.max_steps": 2}, flags=["--resume"]).out
    assert "no checkpoint" in out and "starting at step 0" in out
    assert [row[0] for row in lab.run("run").losses()] == ["1", "2"]


def test_resume_of_a_complete_run_changes_nothing(lab: Lab) -> None:
    lab.train("run")
    before, losses = lab.run("run").snapshot(), lab.run("run").losses()
    out = lab.train("run", flags=["--resume"]).out
    assert "which is the last: a larger train.max_steps or max_epochs goes on" in out
    assert lab.run("run").snapshot() == before and lab.run("run").losses() == losses
    assert lab.run("run").status()["state"] == "complete"


def test_a_used_directory_needs_a_decision(lab: Lab) -> None:
    lab.train("run", {"train.max_steps": 2, "checkpoint.interval": 2})
    before = lab.run("run").snapshot()
    message = lab.train("run", np=2, expect=2).error()
    assert "not empty" in message and "--resume" in message and "--overwrite" in message
    assert lab.run("run").snapshot() == before and lab.run("run").status()["state"] == "complete"
    assert lab.train("run", flags=["--resume", "--overwrite"], np=2, expect=2).err.count("--overwrite") >= 1


def test_overwrite_removes_only_what_a_run_writes(lab: Lab) -> None:
    lab.train("run")
    path = lab.run("run").path
    (path / "notes.txt").write_text("mine")
    (path / "checkpoints" / "notes").mkdir()
    (path / "checkpoints" / "notes" / "best.txt").write_text("mine too")
    (path / "checkpoints" / "step_10" / "extra").write_text("")
    (path / "status.json.tmp").write_text("left by a crash")
    lab.train("run", {"train.max_steps": 2, "checkpoint.interval": 2}, flags=["--overwrite"])
    assert (path / "notes.txt").read_text() == "mine"
    assert (path / "checkpoints" / "notes" / "best.txt").read_text() == "mine too"
    assert lab.run("run").steps_saved() == [2] and len(lab.run("run").losses()) == 2
    assert {p.name for p in path.iterdir()} == {
        "notes.txt",
        "lock",
        "config.yaml",
        "metrics.jsonl",
        "train.log",
        "status.json",
        "checkpoints",
    }


@pytest.mark.parametrize("np", [1, 2])
def test_overwrite_removes_nothing_before_the_new_run_is_sure(lab: Lab, tmp_path: Path, np: int) -> None:
    lab.train("run")
    before = lab.run("run").everything()
    bad = {"model.init_from": str(tmp_path / "absent")}
    assert "absent" in lab.train("run", bad, np, flags=["--overwrite"], expect=4).error()
    assert lab.run("run").everything() == before


@pytest.mark.parametrize("np", [1, 2])
def test_out_of_time_saves_and_exits_85(lab: Lab, np: int) -> None:
    lab.train("straight")
    out = lab.train("run", {"run.max_minutes": 1e-6}, np, expect=85).out
    assert "stopped at step 1" in out and "run.max_minutes are over; saved, --resume goes on" in out
    assert lab.run("run").steps_saved() == [1] and lab.run("run").status() == {
        "state": "stopped",
        "step": 1,
        "exit_code": 85,
        "message": "",
    }
    lab.train("run", np=np, flags=["--resume"])
    assert lab.run("run").losses() == lab.run("straight").losses()
    assert lab.run("run").hashes(20) == lab.run("straight").hashes(20)


def test_out_of_time_saves_even_if_no_interval_asks_for_it(lab: Lab) -> None:
    lab.train("run", {"run.max_minutes": 1e-6, "checkpoint.interval": 0}, expect=85)
    assert lab.run("run").steps_saved() == [1]
    lab.train("run", {"checkpoint.interval": 20}, flags=["--resume"])
    lab.train("straight")
    assert lab.run("run").losses() == lab.run("straight").losses()


def test_two_runs_on_one_directory(lab: Lab) -> None:
    first = lab.start("run", {"train.max_steps": 100000})
    try:
        lab.wait_for_step("run", 3, first)
        for flags in ([], ["--resume"], ["--overwrite"]):
            result = lab.train("run", {"train.max_steps": 100000}, np=2, flags=flags, expect=2)
            if flags:  # without, the directory is not empty, which comes first
                assert (
                    "another run is using this directory" in result.error() and f"process {first.pid}" in result.error()
                )
        assert lab.run("run").status()["state"] == "running", "a refused run must not write into the other's directory"
        lab.wait_for_step("run", 3 + int(lab.run("run").losses()[-1][0]), first)
    finally:
        first.kill()
        first.communicate()
    start = time.monotonic()
    lab.train("run", {"train.max_steps": 5}, flags=["--resume"])  # the lock of a dead process is no lock
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "key, value",
    [
        ("model.n_embd", 64),
        ("run.seed", 7),
        ("optimizer.learning_rate", 0.02),
        ("model.bias", False),
        ("train.global_batch_size", 16),
        ("data.shuffle", False),
    ],
)
def test_resume_with_another_config_names_the_key(trained: Lab, key: str, value: object) -> None:
    before = trained.run("base").everything()
    message = trained.train("base", {key: value}, np=2, flags=["--resume"], expect=2).error()
    assert key in message and "step_20" in message
    assert trained.run("base").everything() == before
    assert trained.run("base").status()["state"] == "complete", "the run that was refused is not the one that failed"


def test_resume_may_change_what_leaves_the_numbers_alone(lab: Lab) -> None:
    lab.train("straight")
    lab.train("run", {"train.max_steps": 10})
    lab.train(
        "run",
        {"checkpoint.keep": 1, "log.interval": 2, "device.threads": 2, "parallel.allreduce": "ordered"},
        np=2,
        flags=["--resume"],
    )
    assert lab.run("run").hashes(20) == lab.run("straight").hashes(20) and lab.run("run").steps_saved() == [20]
    err = lab.train("run", {"train.micro_batch_size": 4, "train.max_steps": 22}, flags=["--resume"]).err
    assert "micro_batch_size changed from 1 to 4" in err
