"""Sampling and evaluation from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

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


def test_tokenizer_that_is_none_is_told_before_the_training(lab: Lab, tmp_path: Path) -> None:
    """Not after it, by generate.  On a resume it may be another, or none."""
    lab.train("run", {"train.max_steps": 2, "checkpoint.interval": 2})
    for np in (1, 2):
        message = lab.train("new", {"data.tokenizer": f"{tmp_path}/absent.json"}, np, expect=3).error()
        assert message.startswith("data.tokenizer: ") and "absent.json" in message
        assert not lab.run("new").path.exists()
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text('{"type": "bytes", "vocab_size": 257, "end_of_text": 256}')
    lab.train("run", {"train.max_steps": 3, "data.tokenizer": str(tokenizer)}, flags=["--resume"])
    tokenizer.unlink()
    assert lab.train("run", {"train.max_steps": 4, "data.tokenizer": ""}, flags=["--resume"]).code == 0


@pytest.mark.parametrize("flags", [[], ["generate"]])
def test_tokenizer_with_tokens_that_the_model_has_not(trained: Lab, tmp_path: Path, flags: list[str]) -> None:
    """Refused at the start, not at the first evaluation or where text has such a token."""
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text('{"type": "bytes", "vocab_size": 300, "end_of_text": 299}')
    settings = {"data.tokenizer": str(tokenizer), "eval.sample_prompts": ["a"]}
    message = trained.train("base" if flags else "new", settings, flags=flags, expect=3).error()
    assert "tokenizer.json" in message and "300" in message and "model.vocab_size = 257" in message
    assert not trained.run("new").path.exists()


@pytest.mark.parametrize("np", [1, 2])
def test_samples_of_an_untrained_model(lab: Lab, trained: Lab, np: int) -> None:
    """It draws from all bytes alike, so its text is hardly ever UTF-8.  An empty prompt is the start of a document."""
    settings = {
        "data.tokenizer": trained.defaults["data.tokenizer"],
        "eval.sample_prompts": ["abc", "", "été"],
        "eval.interval": 1,
        "train.max_steps": 2,
        "optimizer.learning_rate": 1e-30,
    }
    lab.train("run", settings, np)
    run = lab.run("run")
    lines = (run.path / "metrics.jsonl").read_bytes().decode("utf-8").splitlines()
    assert [json.loads(line)["type"] for line in lines] == ["run", *(["step", "eval"] + 3 * ["sample"]) * 2]
    samples = run.records("sample")
    assert [(s["step"], s["prompt"]) for s in samples] == [(s, p) for s in (1, 2) for p in ("abc", "", "été")]
    assert all(len(s["text"]) > 10 for s in samples) and "\ufffd" in "".join(s["text"] for s in samples)


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
