"""The same bits on any number of ranks and threads; every rank does its own share."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from conftest import Lab, Run

STEPS = 10
def settings(m: int, reduction: str, threads: int = 1) -> dict[str, object]:
    return {
        "train.max_steps": STEPS,
        "checkpoint.interval": STEPS,
        "train.global_batch_size": 2 * m,
        "train.micro_batch_size": 2,
        "parallel.allreduce": reduction,
        "device.threads": threads,
    }


# Wide enough that every op shares its work among the threads: they do from 2^14 elements of (B T, C), (B T, Vp) or a
# tensor's moments, and matrix products from 2^18 multiplications.  B T C = 4 * 64 * 128 = 2^15.
WIDE: dict[str, object] = {
    "model.n_head": 4,
    "model.n_embd": 128,
    "model.context_length": 64,
    "train.micro_batch_size": 4,
    "train.max_steps": 3,
    "checkpoint.interval": 3,
}


def expect_same_bits(lab: Lab, s: dict[str, object], sizes: list[tuple[int, int]], isa: str) -> None:
    """A run for each (ranks, threads of each)."""
    seen: dict[tuple[object, ...], str] = {}
    steps = int(str(s["train.max_steps"]))
    for np, threads in sizes:
        name = f"np{np}-threads{threads}"
        lab.train(name, s | {"device.threads": threads}, np, env={"ONEDNN_MAX_CPU_ISA": isa} if isa else None)
        run = lab.run(name)
        assert len(run.losses()) == steps
        seen.setdefault((tuple(run.losses()), run.hashes(steps)), name)
    assert len(seen) == 1, f"these differ: {list(seen.values())}"


@pytest.mark.parametrize("isa", ["", "AVX2"])
@pytest.mark.parametrize("m", [8, 12])  # micro-batches M = 2^k q: eight runs of one, four runs of three
def test_ordered_gives_the_same_bits_on_any_ranks(lab: Lab, m: int, isa: str) -> None:
    expect_same_bits(lab, settings(m, "ordered"), [(1, 1), (2, 1), (4, 1), (1, 3)], isa)


@pytest.mark.parametrize("isa", ["", "AVX2"])
@pytest.mark.parametrize("m", [8, 12])
def test_ordered_gives_the_same_bits_on_any_threads(lab: Lab, m: int, isa: str) -> None:
    wide = settings(m, "ordered") | WIDE | {"train.global_batch_size": 4 * m}
    expect_same_bits(lab, wide, [(1, 1), (1, 2), (1, 3), (1, 4), (2, 2)], isa)


def numbers(run: Run) -> list[float]:
    return [float(x) for row in run.losses() for x in row[1:]]


def test_mpi_and_ring_agree_with_ordered(lab: Lab) -> None:
    lab.train("reference", settings(12, "ordered"))
    want = numbers(lab.run("reference"))
    for reduction in ("mpi", "ring"):
        for np in (2, 3, 4):
            name = f"{reduction}{np}"
            lab.train(name, settings(12, reduction), np)
            got = numbers(lab.run(name))
            assert len(got) == 2 * STEPS
            # Other orders of summation: a few roundings of the gradient, far below what one wrong share would do.
            assert got == pytest.approx(want, rel=1e-6), name


def test_many_ranks_agree_with_one(lab: Lab) -> None:
    """Rank counts that are prime, more than there may be cores: 35 micro-batches in shares of 7 and of 5."""
    many: dict[str, object] = {"train.max_steps": 5, "train.global_batch_size": 35, "parallel.allreduce": "mpi"}
    lab.train("np1", many)
    want = numbers(lab.run("np1"))
    for np in (5, 7):
        lab.train(f"np{np}", many, np)
        got = numbers(lab.run(f"np{np}"))
        assert len(got) == 2 * 5 and got == pytest.approx(want, rel=1e-6), np


def test_dropout_depends_on_the_seed(lab: Lab) -> None:
    """The equalities above would also hold if dropout did nothing."""
    lab.train("with", settings(8, "ordered"))
    lab.train("without", settings(8, "ordered") | {"model.dropout": 0})
    assert lab.run("with").losses()[0][1] != lab.run("without").losses()[0][1]


def test_ordered_refuses_three_ranks_with_the_arithmetic(lab: Lab) -> None:
    message = lab.train("three", settings(12, "ordered"), np=3, expect=2).error()
    assert "12 = 2^2 * 3 micro-batches" in message and "1, 2, 4 ranks" in message
    lab.train("auto", settings(12, "auto"), np=3)
    assert lab.run("auto").records("run")[0]["allreduce"] == "mpi"


def recorded(prefix: Path, np: int, n_micro: int) -> list[list[list[int]]]:
    """[step][rank]: indices of the sequences, in the order in which they were read."""
    ranks = []
    for rank in range(np):
        lines = [[int(i) for i in line.split()] for line in Path(f"{prefix}.{rank}").read_text().splitlines()]
        assert len(lines) == STEPS * n_micro // np, "a micro-batch too many or too few"
        per_step = n_micro // np
        ranks.append([list(chain(*lines[s * per_step : (s + 1) * per_step])) for s in range(STEPS)])
    return [[rank[step] for rank in ranks] for step in range(STEPS)]


@pytest.mark.parametrize("reduction, sizes", [("ordered", (1, 2, 4)), ("mpi", (3,))])
def test_ranks_read_disjoint_shares_of_the_same_batch(
    lab: Lab, tmp_path: Path, reduction: str, sizes: tuple[int, ...]
) -> None:
    m, batch = 12, 24
    lab.train("one", settings(m, "ordered"), env={"KILN_RECORD_SEQUENCES": tmp_path / "one"})
    want = [shares[0] for shares in recorded(tmp_path / "one", 1, m)]
    for np in sizes:
        name = f"np{np}"
        lab.train(name, settings(m, reduction), np, env={"KILN_RECORD_SEQUENCES": tmp_path / name})
        for step, shares in enumerate(recorded(tmp_path / name, np, m)):
            assert [len(share) for share in shares] == [batch // np] * np
            assert len(set(chain(*shares))) == batch, "ranks read the same sequence twice"
            assert list(chain(*shares)) == want[step]


@pytest.mark.parametrize("tokens", ["all", 100])
def test_evaluation_does_not_depend_on_the_ranks(lab: Lab, tokens: object) -> None:
    """13 sequences in batches of 4, then the first 6 of them: neither divides.  The learning rate is too small to
    move a weight that is not zero, as biases are, so that all sizes evaluate the same ones."""
    small = {
        "train.max_steps": 1,
        "train.global_batch_size": 24,
        "train.micro_batch_size": 4,
        "optimizer.learning_rate": 1e-30,
        "model.bias": False,
        "parallel.allreduce": "mpi",
        "eval.interval": 1,
        "eval.tokens": tokens,
        "checkpoint.interval": 1,
    }
    texts, weights = set(), set()
    for np in (1, 2, 3):
        lab.train(f"np{np}", small, np)
        run = lab.run(f"np{np}")
        texts.add((*run.val_losses(), run.records("eval")[0]["tokens"], run.records("eval")[0]["accuracy"]))
        weights.add(run.hashes(1)[0])
    assert len(weights) == 1
    assert len(texts) == 1 and texts.pop()[1] == (13 * 16 if tokens == "all" else 6 * 16)
