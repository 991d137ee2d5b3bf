"""Damaged, foreign and missing checkpoint files: never used, never deleted, and what is good is found behind them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from conftest import Lab, Result, Run, bound_by_modes, seal
from conftest import run as run_command

FILES = ["model.safetensors", "optimizer.safetensors", "config.json", "state.json", "manifest.json"]
PARTS = 64  # a file is cut at every 1/64; and so many bits are flipped, one at a time


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
    if file == "manifest.json":
        version = content.index(b'"format_version": 1') + len('"format_version": ')
        bits |= {(version, bit) for bit in range(8)}  # 1 becomes 3, 5, 9: not a newer format, whose checksum is right
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


@pytest.mark.parametrize("flags", [["--resume"], ["eval"]])
def test_newer_format_is_left_alone(base: Lab, flags: list[str]) -> None:
    """It is no damage: an older checkpoint in its place would silently undo work."""
    run = base.run("base")
    seal(run.checkpoints / "step_20", lambda m: m.update(format_version=2))
    before = run.everything()
    message = base.train("base", np=2, flags=flags, expect=4).error()
    assert "format version 2" in message and "step_20/manifest.json" in message
    assert run.everything() == before and not set_aside(run)


def test_newer_format_with_other_contents_is_left_alone(base: Lab) -> None:
    """All that a later format must keep is the rule of the checksum."""
    run = base.run("base")

    def replace(manifest: dict) -> None:
        manifest.clear()
        manifest.update(format_version=7, xxh3="", files=["é", 1.5])

    seal(run.checkpoints / "step_20", replace)
    before = run.everything()
    assert "format version 7" in resume(base, expect=4).error() and run.everything() == before


def test_the_checksum_of_the_manifest_is_the_documented_one(base: Lab) -> None:
    """A manifest that is sealed again as it was gets the checksum that kiln wrote."""
    manifest = base.run("base").checkpoints / "step_20" / "manifest.json"
    before = json.loads(manifest.read_text())
    assert list(before) == ["format_version", "manifest", "xxh3"]
    seal(manifest.parent, lambda m: None)
    assert json.loads(manifest.read_text()) == before


def test_resume_needs_optimizer_state(base: Lab) -> None:
    """A checkpoint that is valid but has only weights: no other one is used in its place."""
    run = base.run("base")
    newest = run.checkpoints / "step_20"
    (newest / "optimizer.safetensors").unlink()
    seal(newest, lambda m: m["manifest"]["files"].pop("optimizer.safetensors"))
    before = run.everything()
    message = resume(base, expect=4, np=2).error()
    assert "step_20" in message and "has no optimizer state" in message and "model.init_from" in message
    assert run.everything() == before
    base.train("base", flags=["eval"])


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_not_damaged(base: Lab, file: str) -> None:
    run, prefix = base.run("base"), bound_by_modes()
    before = run.everything()
    unreadable = run.checkpoints / "step_20" / file
    unreadable.chmod(0)
    result = run_command([*prefix, *base.command("base", flags=["--resume"])])
    unreadable.chmod(0o644)
    assert result.code == 5 and f"step_20/{file}" in result.error() and "Permission denied" in result.error()
    assert run.everything() == before
