"""parallel.method: parameter_server.  Synchronous: the bits of `allreduce: ordered`.  Asynchronous: a bound on
staleness, every gradient applied once, and workers that are slow or lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from conftest import EMULATED, TIMEOUT_S, Lab, Settings

# 258,048 parameters: four chunks of the gradient norm, so that each of two servers owns some.
MODEL = {"model.n_embd": 96, "train.max_steps": 12, "checkpoint.interval": 6, "eval.interval": 6}
SERVER = {"parallel.method": "parameter_server"}


def asynchronous(staleness: int) -> dict[str, object]:
    return SERVER | {"parallel.staleness": staleness}


def pid_of(rank: int, job: subprocess.Popen[str]) -> int:
    """The process of a rank: mpirun is its grandparent, and gives it PMI_RANK."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"\0PMI_RANK={rank}\0" not in "\0" + (path / "environ").read_text():
                continue
            parent = (path / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if int(Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[1]) == job.pid:
                return int(path.name)
        except (OSError, UnicodeDecodeError):  # it has ended, or is not ours
            continue
    raise AssertionError(f"no process of rank {rank}")


@contextmanager
def slowed(pid: int, stopped_s: float = 0.03, running_s: float = 0.01) -> Iterator[None]:
    """The process runs a quarter of the time."""
    over = threading.Event()

    def stop_and_go() -> None:
        with suppress(ProcessLookupError):  # it has ended
            while not over.wait(running_s):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(stopped_s)
                os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def wait_for_steps(lab: Lab, job: subprocess.Popen[str]) -> None:
    """Until `run` has recorded some steps; an asynchronous run does not record every one."""
    metrics = lab.run("run").path / "metrics.jsonl"
    end = time.monotonic() + TIMEOUT_S
    while not metrics.exists() or metrics.read_text().count('"type":"step"') < 3:
        assert job.poll() is None and time.monotonic() < end, "no steps"
        time.sleep(0.02)


def servers(lab: Lab, name: str) -> dict:
    """Of the last process of a run."""
    return [e for e in lab.run(name).records("event") if e["event"] == "parameter_server"][-1]


# Seen to fail with: the gradient of the last worker left out of the sum; the shard of the second server updated twice;
# a clip factor by the norm of the server's own shard; moments that are not loaded on resume.
@pytest.mark.parametrize("n_servers", [1, 2])
def test_synchronous_has_the_bits_of_ordered(lab: Lab, n_servers: int) -> None:
    lab.defaults |= MODEL
    lab.train("ordered", {"parallel.allreduce": "ordered"}, np=2)
    served = SERVER | {"parallel.servers": n_servers}
    lab.train("served", served, np=2 + n_servers)
    ordered, run = lab.run("ordered"), lab.run("served")
    assert run.losses() == ordered.losses() and len(run.losses()) == 12
    assert run.val_losses() == ordered.val_losses()
    assert [run.hashes(s) for s in (6, 12)] == [ordered.hashes(s) for s in (6, 12)]
    report = servers(lab, "served")["servers"]
    assert [s["applied"] for s in report] == [[12, 12]] * n_servers
    assert sum(s["elements"] for s in report) >= 258_048 and all(s["elements"] for s in report)
    shutil.rmtree(run.checkpoints / "step_12")
    lab.train("served", served, np=2 + n_servers, flags=["--resume"])
    assert run.hashes(12) == ordered.hashes(12)


def test_synchronous_on_the_emulated_gpu(lab: Lab) -> None:
    lab.program = EMULATED
    lab.defaults |= {"device.kind": "cuda", "train.max_steps": 2, "checkpoint.interval": 2}
    lab.defaults |= {"train.global_batch_size": 2}
    lab.train("ordered", {"parallel.allreduce": "ordered"}, np=2)
    lab.train("served", SERVER, np=3)
    assert lab.run("served").losses() == lab.run("ordered").losses()
    assert lab.run("served").hashes(2) == lab.run("ordered").hashes(2)
    lab.train("asynchronous", asynchronous(1), np=3)
    assert sum(servers(lab, "asynchronous")["servers"][0]["applied"]) == 4


# The servers check each pull against the bound, each push for its number and its share, and at the end that every share
# is applied; a run in which one check fails does not end with 0.
# Seen to fail with: a dealer that allows one step more than the bound; a push that is sent twice; a push that is
# dropped, and said to be applied.
@pytest.mark.parametrize("n_servers", [1, 2])
def test_asynchronous_with_a_slow_worker(lab: Lab, n_servers: int) -> None:
    lab.defaults |= MODEL | {"train.max_steps": 80, "checkpoint.interval": 80, "eval.interval": 80}
    job = lab.start("run", asynchronous(1) | {"parallel.servers": n_servers}, np=2 + n_servers)
    wait_for_steps(lab, job)
    with slowed(pid_of(1, job)):
        _, err = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 0, err
    for s in servers(lab, "run")["servers"]:
        fast, slow = s["applied"]
        assert fast + slow == 160 and fast > slow
        assert s["largest_staleness"] == 1
        assert s["repeated"] == 0
    assert lab.run("run").status()["state"] == "complete"
    assert float(lab.run("run").val_losses()[-1]) < 3.3  # from 5.5
    # The checkpoint has whole steps, and a run of another staleness goes on with it.
    lab.train("run", asynchronous(2) | {"train.max_steps": 90}, np=3, flags=["--resume"])
    (report,) = servers(lab, "run")["servers"]
    assert sum(report["applied"]) == 20 and report["largest_staleness"] <= 2
    assert lab.run("run").steps_saved() == [80, 90]


# Seen to fail with: the lost worker's share not dealt again, in 4 runs of 7; else the share was pushed before the stop.
def test_a_lost_worker_leaves_the_others_training(lab: Lab) -> None:
    lab.defaults |= MODEL | {"train.max_steps": 150, "checkpoint.interval": 75, "eval.interval": 0}
    lab.defaults |= {"run.timeout_seconds": 1, "train.global_batch_size": 6}
    job = lab.start("run", asynchronous(2), np=4)
    wait_for_steps(lab, job)
    os.kill(pid_of(1, job), signal.SIGSTOP)
    _, err = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 0, err
    run = lab.run("run")
    assert run.status() | {"message": ""} == {"state": "complete", "step": 150, "exit_code": 0, "message": ""}
    (lost,) = [e for e in run.records("event") if e["event"] == "lost_worker"]
    assert lost["rank"] == 1 and lost["message"] in err
    assert lost["message"] == (
        "rank 1 is lost: it was not heard of for 1 s (run.timeout_seconds); the others train its share and go on"
    )
    event = servers(lab, "run")
    assert event["lost"] == [1]
    assert sum(event["servers"][0]["applied"]) == 3 * 150
    assert run.steps_saved() == [75, 150]


def test_synchronous_ends_without_a_lost_worker(lab: Lab) -> None:
    lab.defaults |= MODEL | {"train.max_steps": 10_000, "run.timeout_seconds": 1, "eval.interval": 0}
    job = lab.start("run", SERVER, np=3)
    wait_for_steps(lab, job)
    os.kill(pid_of(1, job), signal.SIGSTOP)
    _, err = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 75
    # Who speaks first depends on what it was about to do: a server that waits for its gradient, or another worker.
    assert "1 s (run.timeout_seconds)" in err and "--resume" in err


REFUSED: list[tuple[int, Settings, str]] = [
    (2, SERVER | {"parallel.servers": 2}, "parallel.servers = 2 of 2 rank(s) leaves 2 - 2 = 0 workers"),
    (3, asynchronous(1) | {"train.global_batch_size": 3}, "3 is not divisible by ranks * train.micro_batch_size"),
    (1, {"parallel.staleness": 1}, "parallel.staleness = 1 needs parallel.method: parameter_server"),
    (1, {"parallel.servers": 2}, "parallel.servers = 2 needs parallel.method: parameter_server"),
    (2, SERVER | {"parallel.overlap": True}, "parallel.overlap = true needs parallel.method: allreduce"),
    (2, SERVER | {"parallel.allreduce": "mpi"}, "parallel.allreduce = mpi has no meaning with parameter_server"),
]


@pytest.mark.parametrize(("np", "settings", "message"), REFUSED)
def test_refused(lab: Lab, np: int, settings: Settings, message: str) -> None:
    assert message in lab.train("run", settings, np=np, expect=2).error()
