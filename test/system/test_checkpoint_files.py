"""Damaged, foreign and missing checkpoint files: never used, never deleted, and what is good is found behind them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from conftest import Lab, Result, Run

FILES = ["model.safetensors", "optimizer.safetensors", "config.json", "state.json", "manifest.json"]
PARTS = 64  # a file is cut at every 1/64; and so many bits are flipped, one at a time


@pytest.fixture
def base(trained: Lab, lab: Lab) -> Lab:
    """A lab with a copy of the run `base`, saved at steps 10 and 20."""
    shutil.copytree(trained.run("base").path, lab.run("base").path, symlinks=True)
    lab.defaults |= {k: v for k, v in trained.defaults.items() if k != "run.out_dir"}
    return lab


def resume(lab: Lab, expect: int = 0, np: int = 1, **settings: object) -> Result:
    return lab.train(
        "base", {k.replace("__", "."): v for k, v in settings.items()}, np=np, flags=["--resume"], expect=expect
    )


def set_aside(run: Run) -> list[str]:
    return sorted(p.name.split("-")[0] for p in run.checkpoints.glob("*.damaged-*"))


def replace_newest(run: Run, file: str, contents: list[bytes]) -> None:
    """Instead of step_20 its copies step_100, ..., each with other content in one file: one process judges all."""
    good = run.checkpoints / "step_20"
    for i, content in enumerate(contents):
        copy = Path(shutil.copytree(good, run.checkpoints / f"step_{100 + i}"))
        (copy / file).write_bytes(content)
    shutil.rmtree(good)


def expect_step_10(lab: Lab, n_damaged: int) -> None:
    result = resume(lab, train__max_steps=11)
    run = lab.run("base")
    assert "resuming from" in result.out and "step_10\n" in result.out
    assert result.err.count("; not used") == n_damaged
    assert set_aside(run) == sorted(f"step_{100 + i}.damaged" for i in range(n_damaged))
    assert run.steps_saved() == [10, 11]


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_file_is_never_used(base: Lab, file: str) -> None:
    run = base.run("base")
    content = (run.checkpoints / "step_20" / file).read_bytes()
    replace_newest(run, file, [content[: len(content) * i // PARTS] for i in range(PARTS)])
    expect_step_10(base, PARTS)


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit_is_found(base: Lab, file: str) -> None:
    run = base.run("base")
    content = (run.checkpoints / "step_20" / file).read_bytes()
    r = random.Random(file)
    bits = {(0, 0), (9, 1), (len(content) - 1, 7)}  # length of a header, header, data
    while len(bits) < PARTS:
        bits.add((r.randrange(len(content)), r.randrange(8)))
    if file == "manifest.json":  # a flipped version looks like a newer one: another test
        bits = {(byte, bit) for byte, bit in bits if content[byte : byte + 2] != b"1,"} | {
            (content.index(b'"format_version"') + 3, 1)
        }
    replace_newest(
        run, file, [content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :] for at, bit in sorted(bits)]
    )
    expect_step_10(base, len(bits))


@pytest.mark.parametrize("file", FILES)
def test_newest_damaged_then_all_damaged(base: Lab, file: str) -> None:
    """The older one serves, and the run ends as the undisturbed one; with none left nothing is touched."""
    run = base.run("base")
    want, losses = run.hashes(20), run.losses()
    (run.checkpoints / "step_20" / file).unlink()
    result = resume(base, np=2)
    assert f"step_20/{file}" in result.err and "step_10\n" in result.out
    assert set_aside(run) == ["step_20.damaged"] and run.hashes(20) == want and run.losses() == losses
    for step in (10, 20):
        (run.checkpoints / f"step_{step}" / file).write_bytes(b"{}")
    before = run.snapshot()
    for _ in range(2):
        message = resume(base, expect=4, np=2).error()
        assert "2 checkpoint(s), none of them valid" in message and "--overwrite" in message
        assert run.snapshot() == before


@pytest.mark.parametrize("latest", ["dangling", "absent", "a file", "older"])
def test_latest_is_never_trusted(base: Lab, latest: str) -> None:
    link = base.run("base").checkpoints / "latest"
    assert link.readlink() == Path("step_20")
    link.unlink()
    if latest in ("dangling", "older"):
        link.symlink_to("step_99" if latest == "dangling" else "step_10")
    if latest == "a file":
        link.write_text("step_10")
    result = resume(base, train__max_steps=21)
    assert "step_20\n" in result.out and link.readlink() == Path("step_21")
    if latest in ("dangling", "absent"):
        assert "latest: points nowhere" in result.err


def test_leftovers_of_an_interrupted_save_are_removed_by_the_run_only(base: Lab) -> None:
    checkpoints = base.run("base").checkpoints
    (checkpoints / "step_30.tmp-0123abcd").mkdir()
    (checkpoints / "step_30.tmp-0123abcd" / "model.safetensors").write_bytes(b"half")
    (checkpoints / "latest.tmp-0123abcd").symlink_to("step_30")
    (checkpoints / "notes").mkdir()
    assert base.train("base", flags=["eval"]).code == 0
    assert len(list(checkpoints.glob("*.tmp-*"))) == 2, "another run may be saving them"
    resume(base)
    assert sorted(p.name for p in checkpoints.iterdir()) == ["latest", "notes", "step_10", "step_20"]


def test_eval_looks_and_leaves(base: Lab) -> None:
    run = base.run("base")
    (run.checkpoints / "step_20" / "model.safetensors").write_bytes(b"")
    before = run.snapshot()
    result = base.train("base", flags=["eval"])
    assert "step_20/model.safetensors" in result.err and run.snapshot() == before


def test_other_world_size(base: Lab) -> None:
    run = base.run("base")
    want = run.hashes(20)
    shutil.rmtree(run.checkpoints / "step_20")
    resume(base, np=4)
    assert run.hashes(20) == want


@pytest.mark.parametrize(
    "settings, needles",
    [
        ({"model.n_embd": 64}, ("wte.weight has shape [257, 32]", "[257, 64]")),
        ({"model.n_layer": 1}, ("h.1.",)),
        ({"model.n_layer": 3}, ("no tensor h.2.",)),
        ({"model.vocab_size": 300}, ("wte.weight", "[300, 32]")),
        ({"model.context_length": 8}, ("wpe.weight", "[8, 32]")),
        ({"model.n_head": 4}, ("n_head = 2", "model.n_head = 4")),
        ({"model.bias": False}, ("bias", "model.bias: true")),
    ],
)
def test_other_model_shape(base: Lab, settings: dict[str, object], needles: tuple[str, ...]) -> None:
    checkpoint = base.run("base").checkpoints / "step_20"
    before = base.run("base").snapshot()
    message = base.train("other", settings | {"model.init_from": str(checkpoint)}, np=2, expect=4).error()
    assert str(checkpoint) in message and all(needle in message for needle in needles)
    message = base.train("base", settings, np=2, flags=["--resume"], expect=2).error()
    assert next(iter(settings)) in message
    assert base.run("base").snapshot() == before


@pytest.mark.parametrize("flags", [["--resume"], ["eval"]])
def test_newer_format_is_left_alone(base: Lab, flags: list[str]) -> None:
    run = base.run("base")
    manifest = run.checkpoints / "step_20" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    before = run.snapshot()
    message = base.train("base", np=2, flags=flags, expect=4).error()
    assert "format version 2" in message and "manifest.json" in message
    assert run.snapshot() == before and not set_aside(run)


def test_init_from_needs_no_optimizer_state(base: Lab, tmp_path: Path) -> None:
    """A directory as others write it: weights and config only.  A resume cannot do without the moments."""
    run = base.run("base")
    foreign = tmp_path / "gpt2"
    foreign.mkdir()
    for file in ("model.safetensors", "config.json"):
        shutil.copy(run.checkpoints / "step_20" / file, foreign)
    base.train(
        "tuned",
        {
            "model.init_from": str(foreign),
            "train.max_steps": 1,
            "optimizer.learning_rate": 1e-30,
            "checkpoint.interval": 1,
        },
    )
    assert base.run("tuned").hashes(1)[0] == run.hashes(20)[0]
    (foreign / "model.safetensors").unlink()
    message = base.train("gone", {"model.init_from": str(foreign)}, np=2, expect=4).error()
    assert "gpt2/model.safetensors" in message


@pytest.mark.parametrize(
    "text, needle", [("{", "config.json"), ("[]", "config.json"), ('{"model_type": "llama"}', "llama")]
)
def test_init_from_with_a_foreign_config(base: Lab, text: str, needle: str) -> None:
    checkpoint = Path(shutil.copytree(base.run("base").checkpoints / "step_20", base.root / "foreign"))
    (checkpoint / "config.json").write_text(text)
    assert needle in base.train("other", {"model.init_from": str(checkpoint)}, np=2, expect=4).error()


def test_model_files_are_hugging_faces(base: Lab) -> None:
    at = base.run("base").checkpoints / "step_20"
    config = json.loads((at / "config.json").read_text())
    assert config["model_type"] == "gpt2" and (config["n_layer"], config["n_head"], config["n_embd"]) == (2, 2, 32)
    content = (at / "model.safetensors").read_bytes()
    n = int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8 : 8 + n])
    assert tensors["wte.weight"]["shape"] == [257, 32] and tensors["h.0.attn.c_attn.weight"]["shape"] == [32, 96]
