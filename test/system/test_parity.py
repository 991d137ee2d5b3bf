"""kiln against PyTorch's golden numbers: twenty steps of two odd-sized GPT-2s, on one rank and on two. No PyTorch here.

scripts/pytorch/parity.py made test/golden/parity_*.json and makes the same comparison with PyTorch run afresh.
"""
from __future__ import annotations

import json
from pathlib import Path

import pytest

import parity_case
from parity_case import BOUNDS, CASES, Case

each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def golden(case: Case) -> dict:
    read: dict = json.loads(parity_case.golden_path(case).read_text())
    return read


@each_case
def test_golden_file_belongs_to_the_case(case: Case, tmp_path: Path) -> None:
    parity_case.write_case(case, tmp_path)
    assert golden(case)["case"] == parity_case.describe(case, tmp_path)


@each_case
def test_golden_numbers_are_sound(case: Case) -> None:
    """float32 is much closer to float64 than the bounds, which would test noise otherwise; clipping is on and off."""
    g = golden(case)
    for key, (deviation, step) in parity_case.worst(g["float32"], g["float64"]).items():
        assert deviation <= BOUNDS[key] / 10, f"{key} at step {step}"
    clipped = [norm > case.grad_clip for norm in g["float32"]["grad_norm"]]
    assert any(clipped) and not all(clipped)
    assert g["float32"]["loss"][-1] < g["float32"]["loss"][0]


@each_case
@pytest.mark.parametrize("np", [1, 2])
def test_every_step_agrees_with_pytorch(case: Case, np: int, tmp_path: Path) -> None:
    parity_case.write_case(case, tmp_path)
    kiln = parity_case.run_kiln(case, tmp_path, np)
    for reference in ("float32", "float64"):
        want = golden(case)[reference]
        for key, (deviation, step) in parity_case.worst(kiln, want).items():
            got, expected = kiln[key][step - 1], want[key][step - 1]
            assert deviation <= BOUNDS[key], f"{key} at step {step}: {got!r}, PyTorch {reference} has {expected!r}"
