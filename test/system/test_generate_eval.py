"""Sampling and evaluation from the command line."""

from __future__ import annotations

import re

import pytest

from conftest import Lab

TOKENS = ["--max-tokens", "40"]


def text(lab: Lab, *options: str) -> str:
    return lab.train("base", flags=["generate", "--prompt", "abc", *TOKENS, *options]).out


def test_same_seed_same_text(trained: Lab) -> None:
    one = text(trained, "--seed", "1")
    assert one.startswith("abc") and len(one.rstrip("\n").encode()) > len("abc")
    assert text(trained, "--seed", "1") == one
    assert text(trained, "--seed", "2") != one


def test_temperature_0_and_top_k_1_take_the_likeliest(trained: Lab) -> None:
    greedy = text(trained, "--temperature", "0")
    assert text(trained, "--temperature", "0", "--seed", "2") == greedy
    assert text(trained, "--top-k", "1") == greedy
    assert text(trained, "--top-p", "1e-6") == greedy


def test_prompt_may_be_empty(trained: Lab) -> None:
    """Then a document begins: the end-of-text token comes before the first byte, and is not shown."""
    assert trained.train("base", flags=["generate", *TOKENS]).out.strip()


def test_generate_takes_a_checkpoint(trained: Lab) -> None:
    older = str(trained.run("base").checkpoints / "step_10")
    assert text(trained, "--checkpoint", older) != text(trained)
    assert text(trained, "--checkpoint", str(trained.run("base").checkpoints / "step_20")) == text(trained)


def test_generate_refuses_two_ranks(trained: Lab) -> None:
    assert "one rank" in trained.train("base", np=2, flags=["generate"], expect=2).error()


@pytest.mark.parametrize(
    "options", [["--temperature", "-1"], ["--top-p", "0"], ["--top-k", "-1"], ["--max-tokens", "0"]]
)
def test_generate_refuses_impossible_options(trained: Lab, options: list[str]) -> None:
    assert options[0] in trained.train("base", flags=["generate", *options], expect=2).err


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_without_a_checkpoint(lab: Lab, trained: Lab, command: str) -> None:
    tokenizer = {"data.tokenizer": trained.defaults["data.tokenizer"]}
    message = lab.train("new", tokenizer, flags=[command], expect=4).error()
    assert "no checkpoint" in message and "--checkpoint" in message
    assert not lab.run("new").path.exists()


def test_tokenizer_that_is_none(trained: Lab, tmp_path: object) -> None:
    message = trained.train("base", {"data.tokenizer": f"{tmp_path}/absent.json"}, flags=["generate"], expect=3).error()
    assert "absent.json" in message


@pytest.mark.parametrize("np", [1, 2, 3])
def test_eval_agrees_with_the_run(trained: Lab, np: int) -> None:
    for step in (10, 20):
        checkpoint = [] if step == 20 else ["--checkpoint", str(trained.run("base").checkpoints / "step_10")]
        out = trained.train("base", np=np, flags=["eval", *checkpoint]).out
        found = re.search(r"val loss (\S+)  perplexity (\S+)  accuracy (\S+)  tokens (\d+)", out)
        assert found
        record = next(r for r in trained.run("base").records("eval") if r["step"] == step)
        assert found.group(1) == f"{record['val_loss']:.6f}" and found.group(3) == f"{record['accuracy']:.4f}"
        assert int(found.group(4)) == record["tokens"] == 13 * 16


def test_eval_needs_validation_data(trained: Lab) -> None:
    assert (
        "data.val"
        in trained.train("base", {"data.val": None, "eval.interval": 0}, np=2, flags=["eval"], expect=2).error()
    )
