"""How a step is carried out on a GPU changes nothing in the run: graphs, recomputation; and memory that does not
suffice is refused before anything is computed."""

from __future__ import annotations

import re

import pytest

from conftest import EMULATED, Lab

SMALL: dict[str, object] = {
    "model.n_embd": 16,
    "train.max_steps": 5,
    "checkpoint.interval": 5,
    "device.kind": "cuda",
    "device.dtype": "bf16",
}


@pytest.fixture
def gpus(lab: Lab) -> Lab:
    lab.program = EMULATED
    lab.defaults |= SMALL
    return lab


@pytest.mark.parametrize(
    "np, devices, allreduce", [(1, 1, "auto"), (2, 2, "nccl"), (2, 2, "ordered"), (2, 1, "ordered")]
)
def test_graphs_do_not_change_a_run(gpus: Lab, np: int, devices: int, allreduce: str) -> None:
    """One graph for a step; the reduction inside it, by NCCL alone or by our kernel; two graphs around MPI's."""
    settings: dict[str, object] = {"parallel.allreduce": allreduce, "eval.interval": 2, "train.micro_batch_size": 2}
    env = {"KILN_EMULATOR_DEVICES": devices, "KILN_EMULATOR_STREAMS": "random"}
    for graph in ("off", "on"):
        gpus.train(graph, settings | {"device.graph": graph}, np, env=env)
    on, off = gpus.run("on"), gpus.run("off")
    assert len(on.losses()) == 5
    assert on.losses() == off.losses()
    assert on.val_losses() == off.val_losses()
    assert on.hashes(5) == off.hashes(5)
    assert [on.records("run")[0]["graph"], off.records("run")[0]["graph"]] == [True, False]


def test_a_step_that_is_not_replayed_is_an_event(gpus: Lab) -> None:
    """1800 micro-batches are more launches than a graph holds.  The run record is written before a step is recorded, so
    what came of it is told by an event alone."""
    many: dict[str, object] = {"model.n_layer": 1, "model.context_length": 1, "train.global_batch_size": 1800,
                               "train.micro_batch_size": 1, "train.max_steps": 1, "checkpoint.interval": 0}
    out = gpus.train("many", many).out
    gpus.train("few", many | {"train.global_batch_size": 2, "train.max_steps": 5})
    events = [gpus.run(name).records("event") for name in ("many", "few")]
    told = [[e["message"] for e in of if e["event"] == "graph"] for of in events]
    assert len(told[0]) == 1 and "are not recorded as a graph" in told[0][0] and told[0][0] in out and not told[1]


def test_a_network_error_in_a_replayed_step_ends_the_run(gpus: Lab) -> None:
    """The graph holds NCCL's calls then, and holds up its abort: exit 75, no hang.  Runs: connecting, then one a
    step."""
    env = {"KILN_EMULATOR_DEVICES": 2, "KILN_EMULATOR_NCCL_FAIL_RUN": 5}
    message = gpus.train("run", {"parallel.allreduce": "nccl", "train.max_steps": 8}, 2, env=env, expect=75).error()
    assert "NCCL: remote process exited" in message and "fault injected at run 5" in message
    assert len(gpus.run("run").losses()) == 3 and gpus.run("run").status()["state"] == "failed"


def test_graph_on_is_refused_without_a_gpu_and_while_each_launch_is_waited_for(gpus: Lab) -> None:
    on: dict[str, object] = {"device.graph": "on"}
    cpu: dict[str, object] = on | {"device.kind": "cpu", "device.dtype": "fp32"}
    assert "device.graph: on needs a GPU" in gpus.train("cpu", cpu, expect=2).error()
    assert "KILN_CUDA_SYNC" in gpus.train("sync", on, expect=2, env={"KILN_CUDA_SYNC": 1}).error()
    gpus.train("auto", {}, env={"KILN_CUDA_SYNC": 1})
    assert gpus.run("auto").records("run")[0]["graph"] is False


def test_recompute_block_is_the_same_run_in_less_memory(gpus: Lab) -> None:
    """Also when it changes on a resume."""
    settings: dict[str, object] = {"checkpoint.interval": 2}
    gpus.train("none", settings)
    gpus.train("block", settings | {"train.recompute": "block"})
    gpus.train("changed", settings | {"train.max_steps": 2})
    gpus.train("changed", settings | {"train.recompute": "block"}, flags=["--resume"])
    none = gpus.run("none")
    for name in ("block", "changed"):
        assert gpus.run(name).losses() == none.losses()
        assert gpus.run(name).hashes(5) == none.hashes(5)
    planned = [gpus.run(name).records("run")[0]["memory"]["planned"] for name in ("none", "block")]
    assert planned[1] < planned[0]


def test_memory_that_does_not_suffice_is_refused_with_a_change_that_does(gpus: Lab) -> None:
    """The device's memory shrinks until the plan no longer fits; what the message proposes then trains."""
    wide: dict[str, object] = {"model.n_embd": 64, "train.global_batch_size": 64, "train.micro_batch_size": 64,
                               "train.max_steps": 1, "checkpoint.interval": 0}
    gpus.train("fits", wide)
    memory = gpus.run("fits").records("run")[0]["memory"]
    needed = memory["planned"] + memory["libraries"] + memory["workspace"]
    env = {"KILN_EMULATOR_MEMORY": int((needed - memory["planned"] // 2) * 129 / 128)}
    message = gpus.train("refused", wide, expect=7, env=env).error()
    assert message.startswith("out of memory before step 0")
    assert not gpus.run("refused").path.exists()
    found = re.search(r"what fits: train\.micro_batch_size: (\d+)", message)
    assert found, message
    gpus.train("changed", wide | {"train.micro_batch_size": int(found.group(1))}, env=env)
    assert int(found.group(1)) < 64


def test_the_plan_is_what_the_device_lacks(gpus: Lab) -> None:
    """The memory that is printed before step 0, beside the device's count after step 0: within 2 %, as promised."""
    out = gpus.train("run", {"parallel.allreduce": "ordered"}, 2).out
    totals = r"memory of one rank: .* \(parameters .* KiB, .*gradients .* KiB, .*; train.log has the tensors\)"
    assert re.search(totals, out) and "wte" not in out and "wte" in (gpus.run("run").path / "train.log").read_text()
    memory = gpus.run("run").records("run")[0]["memory"]
    event = next(e for e in gpus.run("run").records("event") if e["event"] == "memory")
    assert memory["libraries"] == memory["nccl"] == 1 << 20  # at its first call; the other emulated libraries take none
    assert event["named"] == memory["planned"] + memory["workspace"] + memory["libraries"]
    assert event["taken"] == pytest.approx(event["named"], rel=0.02)
