"""Choices by timing (how an emulated GPU computes its matrix products) from the first step to the last resume."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from conftest import EMULATED, MPIRUN, Lab, Result, Run, run
from test_emulated import SMALL

# The algorithms of the emulated library, by number: each of 0 to 3 has bits of its own, 6 does not repeat its own.
STEPS = 4
TWO: dict[str, object] = {"train.max_steps": 2, "checkpoint.interval": 2}
FOUR: dict[str, object] = {"train.max_steps": STEPS, "checkpoint.interval": 2}
KEPT = (
    r"matrix products: (\d+) kinds, (\d+) computed as the checkpoint has it, (\d+) as (.*) has it, "
    r"(\d+) chosen by timing;"
)


@pytest.fixture
def gpus(lab: Lab) -> Lab:
    lab.program = EMULATED
    lab.defaults |= SMALL | FOUR
    return lab


def fastest(number: int, cache: Path, **more: object) -> dict[str, object]:
    """A machine on which this algorithm is the fastest, and a user's cache."""
    return {"KILN_EMULATOR_FASTEST_ALGORITHM": number, "XDG_CACHE_HOME": cache} | more


def counts(out: str) -> dict[str, int]:
    found = re.findall(KEPT, out)
    assert len(found) == 1, out
    n, saved, cached, _, timed = found[0]
    return {"kinds": int(n), "saved": int(saved), "cached": int(cached), "timed": int(timed)}


def bits(r: Run) -> object:
    return r.losses(), r.hashes(STEPS)


def hashes(r: Run) -> list[str]:
    return [record["gemm_choices"] for record in r.records("run")]


def state(r: Run, step: int) -> dict:
    read: dict = json.loads((r.checkpoints / f"step_{step}" / "state.json").read_text())
    return read


def cache_file(cache: Path) -> Path:
    (file,) = (cache / "kiln").iterdir()
    return file


def test_the_fastest_are_chosen_and_the_next_run_takes_them_from_the_cache(gpus: Lab, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = counts(gpus.train("first", env=fastest(2, cache)).out)
    assert first["timed"] == first["kinds"] >= 12 and first["cached"] == first["saved"] == 0
    name = "emulated-GPU-compute-capability-9.0-4-multiprocessors-cuBLASLt-130000-with-32-MiB.txt"
    assert cache_file(cache).name == name
    written = cache_file(cache).read_bytes()
    # Another machine would choose otherwise, but these are chosen.
    second = counts(gpus.train("second", env=fastest(1, cache)).out)
    assert second == first | {"cached": first["kinds"], "timed": 0}
    assert bits(gpus.run("second")) == bits(gpus.run("first"))
    assert hashes(gpus.run("second")) == hashes(gpus.run("first"))
    assert cache_file(cache).read_bytes() == written
    gpus.train("other", env=fastest(1, tmp_path / "other"))
    assert bits(gpus.run("other")) != bits(gpus.run("first"))
    assert hashes(gpus.run("other")) != hashes(gpus.run("first"))
    # A line that a run does not use stays in the cache, and does not come into the run's checkpoint.
    wider = counts(gpus.train("wider", {"model.n_embd": 32}, env=fastest(2, cache)).out)
    assert wider["timed"] > 0
    again = counts(gpus.train("again", env=fastest(1, cache)).out)
    assert again == second and hashes(gpus.run("again")) == hashes(gpus.run("first"))


def test_tuning_leaves_no_trace_in_the_training(gpus: Lab, tmp_path: Path) -> None:
    """Two runs whose warm-ups differ in what they try and choose, bias gradients fused or apart: the training differs
    by rounding alone. (Bit for bit it is the one that found all in the cache: see above.)"""
    gpus.train("tuned", env=fastest(0, tmp_path / "cache", KILN_EMULATOR_EPILOGUE_US=5))
    text = state(gpus.run("tuned"), 2)["choices"]
    assert "BGRADA" in text and " = apart" not in text
    gpus.train("plain", env=fastest(0, tmp_path / "other", KILN_EMULATOR_EPILOGUE_US=15))
    assert " = apart" in state(gpus.run("plain"), 2)["choices"]
    tuned, plain = ([float(row[1]) for row in gpus.run(name).losses()] for name in ("tuned", "plain"))
    assert tuned == pytest.approx(plain, rel=1e-3)  # bf16 activations, rounded once more where a bias is apart


def test_without_tuning_nothing_is_timed_or_kept(gpus: Lab, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    off = gpus.train("off", {"device.tuning": "off"}, env=fastest(2, cache))
    assert "matrix product" not in off.out and not cache.exists()
    assert all("gemm_choices" not in record for record in gpus.run("off").records("run"))
    assert counts(gpus.train("on", env=fastest(2, cache)).out)["timed"] > 0
    assert bits(gpus.run("off")) != bits(gpus.run("on"))
    # The choices of a checkpoint are not used either.
    gpus.train("on", {"device.tuning": "off", "train.max_steps": STEPS + 2}, flags=["--resume"], env=fastest(2, cache))
    assert state(gpus.run("on"), STEPS + 2)["choices"] == ""


def test_only_products_that_a_step_has_are_timed(gpus: Lab, tmp_path: Path) -> None:
    """A run of one micro-batch a step never adds to a weight's gradient."""
    gpus.train("one", {"train.global_batch_size": 1}, env=fastest(2, tmp_path / "one"))
    gpus.train("two", {"train.global_batch_size": 2}, env=fastest(2, tmp_path / "two"))
    one, two = (state(gpus.run(name), 2)["choices"] for name in ("one", "two"))
    assert "-> +f32" not in one and "-> +f32" in two


def test_all_ranks_use_what_rank_0_has_chosen(gpus: Lab, tmp_path: Path) -> None:
    """On rank 1's machine another algorithm would be chosen.  The bits are those of one rank."""
    gpus.defaults |= {"parallel.allreduce": "ordered"}
    gpus.train("one", env=fastest(2, tmp_path / "one"))
    program = gpus.command("two")
    ranks = [["-np", "1", "-env", "KILN_EMULATOR_FASTEST_ALGORITHM", number, *program] for number in ("2", "1")]
    done = run([MPIRUN, *ranks[0], ":", *ranks[1]], {"XDG_CACHE_HOME": tmp_path / "two"})
    assert done.code == 0, done.err
    assert bits(gpus.run("two")) == bits(gpus.run("one"))
    assert hashes(gpus.run("two")) == hashes(gpus.run("one"))
    assert len(re.findall("matrix products:", done.out)) == 1


def test_ranks_on_unlike_gpus_say_that_they_cannot(gpus: Lab, tmp_path: Path) -> None:
    program = gpus.command("unlike")
    ranks = [["-np", "1", "-env", "KILN_EMULATOR_CAPABILITY", capability, *program] for capability in ("90", "80")]
    done = run([MPIRUN, *ranks[0], ":", *ranks[1]], {"XDG_CACHE_HOME": tmp_path})
    assert done.code == 0, done.err
    refusal = "rank 1 cannot use rank 0's choices for matrix products, made for .*capability 9.0.*this is .*8.0"
    assert re.search(refusal, done.err)


def test_a_resumed_run_keeps_the_checkpoints_choices(gpus: Lab, tmp_path: Path) -> None:
    gpus.train("straight", env=fastest(2, tmp_path / "straight"))
    first = gpus.train("halves", TWO, env=fastest(2, tmp_path / "halves")).out
    cache = tmp_path / "later"
    gpus.train("filler", TWO, env=fastest(1, cache))  # so that this user's cache has other choices
    done = gpus.train("halves", env=fastest(3, cache), flags=["--resume"])
    n = counts(first)["kinds"]
    assert counts(done.out) == {"kinds": n, "saved": n, "cached": 0, "timed": 0}
    assert bits(gpus.run("halves")) == bits(gpus.run("straight"))
    assert len(set(hashes(gpus.run("halves")) + hashes(gpus.run("straight")))) == 1
    assert state(gpus.run("halves"), 4)["choices"] == state(gpus.run("straight"), 2)["choices"]
    assert "not bit for bit" not in done.err


@pytest.mark.parametrize("change", [{"KILN_EMULATOR_CUBLASLT": 130100}, {"KILN_EMULATOR_MULTIPROCESSORS": 3}])
def test_another_gpu_or_library_chooses_anew_and_says_so(
    gpus: Lab, tmp_path: Path, change: Mapping[str, object]
) -> None:
    cache = tmp_path / "cache"
    gpus.train("moved", TWO, env=fastest(2, cache))
    done = gpus.train("moved", env=fastest(1, cache) | dict(change), flags=["--resume"])
    other = "the checkpoint's choices for matrix products were made for .*; this is .*not bit for bit"
    assert re.search(other, done.err)
    now = counts(done.out)
    assert now["timed"] == now["kinds"] and now["saved"] == now["cached"] == 0
    assert len(set(hashes(gpus.run("moved")))) == 2
    assert len(list((cache / "kiln").iterdir())) == 2  # a file for each


def test_a_checkpoint_from_before_there_were_choices(gpus: Lab, tmp_path: Path) -> None:
    """As one of the CPU's: it has none."""
    cpu = {"device.kind": "cpu", "device.dtype": "fp32"}
    gpus.train("moved", TWO | cpu, env=fastest(2, tmp_path))
    assert state(gpus.run("moved"), 2)["choices"] == "" and not (tmp_path / "kiln").exists()
    assert "gemm_choices" not in gpus.run("moved").records("run")[0]
    done = gpus.train("moved", {"device.dtype": "fp32"}, env=fastest(2, tmp_path), flags=["--resume"])
    assert counts(done.out)["timed"] == counts(done.out)["kinds"] and "matrix products" not in done.err


def test_an_algorithm_that_does_not_repeat_itself_is_rejected_and_logged(gpus: Lab, tmp_path: Path) -> None:
    out = gpus.train("restless", env=fastest(6, tmp_path / "restless")).out
    dropped = "matrix product .*: an algorithm of .* us is not used, it gave other bits when it was repeated"
    assert re.search(dropped, out)
    gpus.train("first", env=fastest(0, tmp_path / "first"))
    assert bits(gpus.run("restless")) == bits(gpus.run("first"))


def spoiled(content: bytes, how: str) -> bytes:
    if how == "cut":
        return content[: len(content) // 2]
    if how == "flipped":
        return content.replace(b" = 0", b" = 1", 1)
    return {"empty": b"", "noise": bytes(range(256))}[how]


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "noise"])
def test_a_damaged_cache_is_said_once_and_written_anew(gpus: Lab, tmp_path: Path, how: str) -> None:
    gpus.train("first", TWO, env=fastest(2, tmp_path))
    file = cache_file(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(spoiled(whole, how))
    done = gpus.train("second", TWO, env=fastest(2, tmp_path))
    assert done.err.count("warning") == 1
    assert re.search(f"{file.name}: not kiln's choices: .*; it is not used", done.err)
    assert counts(done.out)["timed"] == counts(done.out)["kinds"]
    assert file.read_bytes() == whole and list(file.parent.iterdir()) == [file]


def test_another_machines_file_in_the_caches_place_is_not_used(gpus: Lab, tmp_path: Path) -> None:
    gpus.train("first", TWO, env=fastest(2, tmp_path))
    file = cache_file(tmp_path)
    whole = file.read_bytes()
    gpus.train("other", TWO, env=fastest(1, tmp_path, KILN_EMULATOR_CUBLASLT=130100))
    (other,) = (p for p in file.parent.iterdir() if p != file)
    file.write_bytes(other.read_bytes())
    done = gpus.train("second", TWO, env=fastest(2, tmp_path))
    assert re.search(f"{file.name}: made for .*130100.*, not for .*130000.*; it is not used", done.err)
    assert file.read_bytes() == whole


def no_cache(tmp_path: Path, how: str) -> dict[str, object]:
    if how == "nowhere":
        return {"XDG_CACHE_HOME": "", "HOME": ""}
    (tmp_path / "file").write_text("")
    return {"XDG_CACHE_HOME": tmp_path / "file"}


@pytest.mark.parametrize(
    "how, said", [("nowhere", "neither XDG_CACHE_HOME nor HOME is set"), ("file", "cannot create")]
)
def test_a_cache_that_cannot_be_written_is_no_error(gpus: Lab, tmp_path: Path, how: str, said: str) -> None:
    done: Result = gpus.train("run", TWO, env=no_cache(tmp_path, how))
    assert done.out.count("choices are not kept for later runs") == 1 and said in done.out and "warning" not in done.err


def test_runs_at_the_same_time_leave_a_whole_cache(gpus: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("conftest").ENV, "XDG_CACHE_HOME", str(tmp_path))
    settings = [TWO | {"model.n_embd": 16 * n} for n in (1, 2, 3)]
    runs = [gpus.start(f"run{i}", s) for i, s in enumerate(settings)]
    assert [p.wait(timeout=120) for p in runs] == [0, 0, 0]
    last = counts(gpus.train("last", settings[0]).out)
    assert "warning" not in gpus.train("later", settings[1]).err and last["cached"] + last["timed"] == last["kinds"]
