"""Directories of weights, kiln's own and Hugging Face's: which are read, and which are refused by eval, generate and
model.init_from alike.  The checkpoints of a run, and which of them is used, are in test_checkpoint_files.py."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Lab, flip, seal

FRESH: dict[str, object] = {"train.max_steps": 1, "optimizer.learning_rate": 1e-30, "checkpoint.interval": 1}
USES: dict[str, Callable[[Path], tuple[str, dict[str, object], list[str]]]] = {  # -> run, settings, flags
    "eval": lambda at: ("base", {}, ["eval", "--checkpoint", str(at)]),
    "generate": lambda at: ("base", {}, ["generate", "--max-tokens", "2", "--checkpoint", str(at)]),
    "init_from": lambda at: ("other", FRESH | {"model.init_from": str(at)}, []),
}


def use(lab: Lab, how: str, at: Path, expect: int, np: int = 1) -> str:
    """The error message, or what was printed."""
    name, settings, flags = USES[how](at)
    result = lab.train(name, settings, np, flags, expect)
    return result.error() if expect else result.out


@pytest.fixture
def foreign(base: Lab, tmp_path: Path) -> Path:
    """A directory as others write it: weights and config only."""
    directory = tmp_path / "gpt2"
    directory.mkdir()
    for file in ("model.safetensors", "config.json"):
        shutil.copy(base.run("base").checkpoints / "step_20" / file, directory)
    return directory


def edit_config(directory: Path, changes: dict[str, object]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_tensor(directory: Path, name: str, like: str, change: Callable[[bytearray], object] = bytes) -> None:
    """A copy of the tensor `like`, changed, at the end of model.safetensors."""
    path = directory / "model.safetensors"
    content = path.read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + n]), content[8 + n :]
    begin, end = header[like]["data_offsets"]
    copy = bytearray(data[begin:end])
    change(copy)
    header[name] = header[like] | {"data_offsets": [len(data), len(data) + len(copy)]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data + copy)


@pytest.mark.parametrize("how", USES)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_flipped_bit_in_a_named_checkpoint_is_found(base: Lab, how: str, file: str) -> None:
    """Without the manifest nothing would tell: it is another weight, another dropout, as valid as before."""
    at = base.run("base").checkpoints / "step_20"
    flip(at / file, -2 if file == "model.safetensors" else (at / file).read_bytes().index(b"0.1"))
    before = base.run("base").snapshot()
    assert f"step_20/{file}" in use(base, how, at, 4)
    assert base.run("base").snapshot() == before, "it is not the run's own to set aside"


@pytest.mark.parametrize("how", USES)
def test_a_named_checkpoint_of_a_newer_format(base: Lab, how: str) -> None:
    at = base.run("base").checkpoints / "step_20"
    seal(at, lambda m: m.update(format_version=2))
    assert "format version 2" in use(base, how, at, 4)


FIELDS: dict[str, object] = {
    "layer_norm_epsilon": 1e-6,
    "scale_attn_by_inverse_layer_idx": True,
    "scale_attn_weights": False,
    "tie_word_embeddings": False,
    "activation_function": "gelu",
    "n_head": 4,
}


@pytest.mark.parametrize("how", USES)
def test_a_model_that_computes_something_else_is_refused_by_the_field(base: Lab, foreign: Path, how: str) -> None:
    """No tensor's shape shows these: the weights would be read and the results would be wrong."""
    good = (foreign / "config.json").read_text()
    for field, value in FIELDS.items():
        edit_config(foreign, {field: value})
        message = use(base, how, foreign, 4)
        assert field in message and "gpt2/config.json" in message
        (foreign / "config.json").write_text(good)
    edit_config(foreign, {"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True})
    use(base, how, foreign, 0)


def edit_header(directory: Path, change: Callable[[dict], object]) -> None:
    path = directory / "model.safetensors"
    content = path.read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + n])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + n :])


@pytest.mark.parametrize("how", USES)
@pytest.mark.parametrize("change, said", [
    (lambda h: h["wte.weight"].update(shape=[32, 257]),
     "wte.weight has shape [32, 257], the config's model needs [257, 32]"),
    (lambda h: h.update({"h.7.ln_1.weight": h.pop("h.1.ln_1.weight")}), "has no tensor h.1.ln_1.weight"),
    (lambda h: h.update({"h.7.ln_1.bias": h.pop("h.1.ln_1.bias")}),
     "has no tensor h.1.ln_1.bias; use model.bias: false"),
])
def test_tensors_that_are_not_the_configs(base: Lab, foreign: Path, how: str, change: Callable[[dict], object],
                                          said: str) -> None:
    """config.json is right, what lies beside it is not."""
    edit_header(foreign, change)
    message = use(base, how, foreign, 4)
    assert "gpt2/model.safetensors: " in message and message.endswith(said), message


@pytest.mark.parametrize("how", USES)
@pytest.mark.parametrize("name, like", [("h.2.ln_1.weight", "h.1.ln_1.weight"), ("h.2.ln_1.bias", "h.1.ln_1.bias")])
def test_tensors_that_the_config_has_not(base: Lab, foreign: Path, how: str, name: str, like: str) -> None:
    add_tensor(foreign, name, like)
    assert use(base, how, foreign, 4).endswith(f"the config's model has no tensor {name}")  # and nothing about biases


@pytest.mark.parametrize("how", USES)
def test_a_run_is_no_checkpoint_and_a_model_with_checkpoints_is_one(base: Lab, foreign: Path, how: str) -> None:
    run = base.run("base").path
    assert use(base, how, run, 4).endswith(f"a run, expected a checkpoint; use {run}/checkpoints/latest")
    (foreign / "checkpoints").mkdir()
    use(base, how, foreign, 0)


@pytest.mark.parametrize("how", USES)
def test_a_classifier_of_its_own_is_refused(base: Lab, foreign: Path, how: str) -> None:
    same = Path(shutil.copytree(foreign, foreign.parent / "same"))
    add_tensor(same, "lm_head.weight", "wte.weight")
    use(base, how, same, 0)
    add_tensor(foreign, "lm_head.weight", "wte.weight", lambda data: data.__setitem__(-2, data[-2] ^ 1))
    message = use(base, how, foreign, 4)
    assert "lm_head.weight" in message and "gpt2/model.safetensors" in message


@pytest.mark.parametrize(
    "settings, needles",
    [
        ({"model.n_embd": 64}, ("use model.n_embd: 32 (the config has 64)",)),
        ({"model.n_layer": 1, "model.n_head": 4},
         ("use model.n_layer: 2 (the config has 1), model.n_head: 2 (the config has 4)",)),
        ({"model.vocab_size": 300}, ("use model.vocab_size: 257 (the config has 300)",)),
        ({"model.context_length": 8}, ("use model.context_length: 16 (the config has 8)",)),
        ({"model.bias": False}, ("bias", "model.bias: true")),
    ],
)
def test_other_model_shape(base: Lab, settings: dict[str, object], needles: tuple[str, ...]) -> None:
    checkpoint = base.run("base").checkpoints / "step_20"
    before = base.run("base").everything()
    message = base.train("other", settings | {"model.init_from": str(checkpoint)}, np=2, expect=4).error()
    assert str(checkpoint) in message and all(needle in message for needle in needles)
    for flags in (["eval"], ["generate"]):
        message = base.train("base", settings, flags=flags, expect=4).error()
        assert str(checkpoint) in message and all(needle in message for needle in needles)
    message = base.train("base", settings, np=2, flags=["--resume"], expect=2).error()
    key, value = next(iter(settings.items()))
    assert message.startswith(f"{key} is {str(value).lower()}, and ") and " was trained with " in message
    assert base.run("base").everything() == before


def test_init_from_needs_no_optimizer_state(base: Lab, foreign: Path) -> None:
    base.train("tuned", FRESH | {"model.init_from": str(foreign)})
    assert base.run("tuned").hashes(1)[0] == base.run("base").hashes(20)[0]
    (foreign / "model.safetensors").unlink()
    message = base.train("gone", {"model.init_from": str(foreign)}, np=2, expect=4).error()
    assert "gpt2/model.safetensors" in message


@pytest.mark.parametrize(
    "text, needle", [("{", "config.json"), ("[]", "config.json"), ('{"model_type": "llama"}', "llama")]
)
def test_init_from_with_a_foreign_config(base: Lab, foreign: Path, text: str, needle: str) -> None:
    (foreign / "config.json").write_text(text)
    assert needle in use(base, "init_from", foreign, 4, np=2)


def test_model_files_are_hugging_faces(base: Lab) -> None:
    at = base.run("base").checkpoints / "step_20"
    config = json.loads((at / "config.json").read_text())
    assert config["model_type"] == "gpt2" and (config["n_layer"], config["n_head"], config["n_embd"]) == (2, 2, 32)
    content = (at / "model.safetensors").read_bytes()
    n = int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8 : 8 + n])
    assert tensors["wte.weight"]["shape"] == [257, 32] and tensors["h.0.attn.c_attn.weight"]["shape"] == [32, 96]
