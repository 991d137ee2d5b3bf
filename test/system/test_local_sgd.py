"""parallel.method: diloco.  Bits against a simulation of all workers are test/mpi/test_local_sgd.cpp's."""

from __future__ import annotations

import pytest

from conftest import EMULATED, Lab

DILOCO = {
    "parallel.method": "diloco",
    "parallel.sync_interval": 4,
    "parallel.outer_dtype": "int4",
    "eval.interval": 5,
}


# Seen to fail with: the errors of rounding left out of the checkpoint.
@pytest.mark.parametrize("streaming", [False, True])
def test_a_trajectory_has_the_same_bits_again_and_after_a_resume(lab: Lab, streaming: bool) -> None:
    """Steps 1 to 10 end in the middle of an interval."""
    settings = DILOCO | {"parallel.streaming": streaming}
    lab.train("straight", settings, np=2)
    lab.train("halves", settings | {"train.max_steps": 10}, np=2)
    straight, halves = lab.run("straight"), lab.run("halves")
    assert halves.losses() == straight.losses()[:10] and halves.hashes(10) == straight.hashes(10)
    assert "not bit for bit" not in lab.train("halves", settings, np=2, flags=["--resume"]).err
    assert halves.losses() == straight.losses() and len(straight.losses()) == 20
    assert halves.val_losses() == straight.val_losses() and len(straight.val_losses()) == 4
    assert halves.hashes(20) == straight.hashes(20)


def test_other_ranks_and_methods_go_on_from_the_outer_parameters(lab: Lab) -> None:
    """The model that was evaluated before is the one that the first step's loss is of."""
    lab.train("run", DILOCO | {"train.max_steps": 10}, np=2)
    message = lab.train("run", DILOCO | {"train.max_steps": 12}, np=1, flags=["--resume"]).err
    assert "2 worker(s) were saved, 1 rank(s) go on" in message and "not bit for bit" in message
    message = lab.train("run", {"train.max_steps": 14, "checkpoint.interval": 2}, np=2, flags=["--resume"]).err
    assert "parallel.method changed from diloco to allreduce" in message
    message = lab.train("run", DILOCO | {"train.max_steps": 16}, np=2, flags=["--resume"]).err
    assert "parallel.method changed from allreduce to diloco" in message
    losses = [float(row[1]) for row in lab.run("run").losses()]
    assert len(losses) == 16 and max(losses[10:]) < losses[0] - 1


def test_the_gpu_program_trains_as_the_cpu_does(lab: Lab) -> None:
    """The emulated GPU's sums have other bits; the exchanges between them are the same code."""
    small = DILOCO | {"parallel.streaming": True, "train.max_steps": 6, "train.global_batch_size": 4}
    lab.train("cpu", small, np=2)
    lab.program = EMULATED
    lab.train("gpu", small | {"device.kind": "cuda"}, np=2)
    cpu, gpu = ([float(row[1]) for row in lab.run(name).losses()] for name in ("cpu", "gpu"))
    assert gpu == pytest.approx(cpu, rel=1e-4) and len(gpu) == 6
