#!/usr/bin/env python3
"""The two GPT-2s on which kiln is compared with PyTorch, step by step (parity.py, test/system/test_parity.py).

    python3 scripts/pytorch/parity_case.py DIR      writes both cases under DIR, to look at or to train by hand

Python's standard library only, and random() only: its sequence is the same in every Python 3 on every machine, so that
the weights and shards are too. Their SHA-256 is in the golden files (test/golden/parity_*.json). Sizes are odd on
purpose: no width, head size, context or vocabulary here is a multiple of 8. Exit code: 0 written, 2 usage.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import struct
import subprocess
import sys
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Largest relative deviation of any step. The learning rate is here to name the culprit when a schedule differs.
BOUNDS = {"loss": 1e-4, "grad_norm": 1e-3, "learning_rate": 1e-6}
Curves = dict[str, list[float]]                                 # for each key of BOUNDS one number per step


@dataclass(frozen=True)
class Case:
    name: str
    seed: int
    bias: bool
    n_layer: int
    n_head: int
    n_embd: int
    context_length: int
    vocab_size: int
    shard_tokens: tuple[int, ...]       # fewer sequences than steps * global_batch_size, so that the epoch wraps
    learning_rate: float
    min_learning_rate: float
    decay_steps: int | None             # None: kiln's default "all", the last step
    grad_clip: float                    # below some steps' norms and above others'
    weight_decay: float = 0.1
    warmup_steps: int = 3
    max_steps: int = 20
    global_batch_size: int = 4
    micro_batch_size: int = 2           # two micro-batches: gradients are accumulated, or split over two ranks


CASES = (
    Case(name="parity_bias", seed=1, bias=True, n_layer=3, n_head=3, n_embd=60, context_length=37, vocab_size=211,
         shard_tokens=(1009, 537), learning_rate=1e-2, min_learning_rate=1e-3, decay_steps=15, grad_clip=9.0),
    Case(name="parity_nobias", seed=2, bias=False, n_layer=2, n_head=5, n_embd=35, context_length=29, vocab_size=131,
         shard_tokens=(1451,), learning_rate=1e-2, min_learning_rate=0.0, decay_steps=None, grad_clip=9.0),
)


def tensor_shapes(c: Case) -> Iterator[tuple[str, tuple[int, ...]]]:
    C = c.n_embd
    yield "wte.weight", (c.vocab_size, C)
    yield "wpe.weight", (c.context_length, C)
    for layer in range(c.n_layer):
        for norm, linear in (("ln_1", (("attn.c_attn", C, 3 * C), ("attn.c_proj", C, C))),
                             ("ln_2", (("mlp.c_fc", C, 4 * C), ("mlp.c_proj", 4 * C, C)))):
            yield f"h.{layer}.{norm}.weight", (C,)
            yield f"h.{layer}.{norm}.bias", (C,)
            for name, n_in, n_out in linear:
                yield f"h.{layer}.{name}.weight", (n_in, n_out)
                yield f"h.{layer}.{name}.bias", (n_out,)
    yield "ln_f.weight", (C,)
    yield "ln_f.bias", (C,)


def tensor_values(c: Case, rng: random.Random, name: str, shape: tuple[int, ...]) -> array[float]:
    """Uniform numbers, large enough that attention is far from flat and every bias and LayerNorm weight matters.

    The large final LayerNorm makes sharp predictions, and so a loss that reacts to small mistakes: the erf GELU, a
    LayerNorm epsilon of 1e-6, an Adam epsilon of 1e-6 or decayed biases each push it 2 to 47 times past its bound of
    1e-4, while float32 rounding stays below 1e-6 (measured on the PyTorch side).
    """
    centre, half_width = 0.0, 0.1                               # embeddings and biases
    if ".ln_" in "." + name and name.endswith(".weight"):
        scale = 10.0 if name == "ln_f.weight" else 1.0
        centre, half_width = scale, 0.3 * scale
    elif name.startswith("h.") and name.endswith(".weight"):
        half_width = math.sqrt(3 / shape[0])                    # unit variance in, unit variance out
    if name.endswith(".bias") and not c.bias:
        half_width = 0.0                                        # GPT2Config cannot leave biases out: zeros on disk
    return array("f", (centre + half_width * (2 * rng.random() - 1) for _ in range(math.prod(shape))))


def little_endian(values: array) -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def write_model(c: Case, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": c.n_layer, "n_head": c.n_head,
        "n_embd": c.n_embd, "n_positions": c.context_length, "n_ctx": c.context_length, "vocab_size": c.vocab_size,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "torch_dtype": "float32", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    }
    if not c.bias:
        config["kiln_bias"] = False
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    rng, header, chunks, at = random.Random(c.seed), {}, [], 0
    for name, shape in tensor_shapes(c):
        data = little_endian(tensor_values(c, rng, name, shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + len(data)]}
        chunks.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                             # data starts aligned
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))


def write_shard(path: Path, tokens: array) -> None:
    header = array("i", [20240520, 1, len(tokens)] + [0] * 253)     # llm.c's layout, uint16
    path.write_bytes(little_endian(header) + little_endian(tokens))


def write_shards(c: Case, directory: Path) -> None:
    """Tokens that mostly follow a rule (next = 5 * token + 3, give or take), so that there is something to learn."""
    directory.mkdir(parents=True, exist_ok=True)
    rng, token = random.Random(c.seed + 1000), c.vocab_size - 1     # the last row of the vocabulary is used too
    for number, count in enumerate(c.shard_tokens):
        tokens = array("H")
        for _ in range(count):
            tokens.append(token)
            token = (5 * token + 3 + int(9 * rng.random() ** 2)) % c.vocab_size
        write_shard(directory / f"train_{number:03}.bin", tokens)


def yaml_config(c: Case, directory: Path) -> str:
    return f"""\
run: {{name: {c.name}, out_dir: {json.dumps(str(directory / "runs"))}, seed: 1}}
device: {{kind: cpu, dtype: fp32}}
model:
  architecture: gpt2
  n_layer: {c.n_layer}
  n_head: {c.n_head}
  n_embd: {c.n_embd}
  context_length: {c.context_length}
  vocab_size: {c.vocab_size}
  dropout: 0
  bias: {str(c.bias).lower()}
  init_from: {json.dumps(str(directory / "model"))}
data: {{train: [{json.dumps(str(directory / "data" / "train_*.bin"))}], shuffle: false}}
train:
  max_steps: {c.max_steps}
  global_batch_size: {c.global_batch_size}
  micro_batch_size: {c.micro_batch_size}
  grad_clip: {c.grad_clip}
optimizer:
  name: adamw
  learning_rate: {c.learning_rate}
  beta1: 0.9
  beta2: 0.95
  eps: 1.0e-8
  weight_decay: {c.weight_decay}
schedule:
  name: cosine
  warmup_steps: {c.warmup_steps}
  decay_steps: {c.decay_steps or "all"}
  min_learning_rate: {c.min_learning_rate}
log: {{interval: 1}}
"""


def write_case(c: Case, directory: Path) -> None:
    """model/, data/ and config.yaml under `directory`; the run goes to runs/<name>/ beside them."""
    directory = directory.resolve()
    write_model(c, directory / "model")
    write_shards(c, directory / "data")
    (directory / "config.yaml").write_text(yaml_config(c, directory))


def describe(c: Case, directory: Path) -> dict:
    """The head of a golden file: all parameters of the case, and the checksums of the files made from them."""
    files = [directory / "model" / "model.safetensors", *sorted((directory / "data").glob("*.bin"))]
    return {**asdict(c), "shard_tokens": list(c.shard_tokens),
            "sha256": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}}


def golden_path(c: Case) -> Path:
    return ROOT / "test" / "golden" / f"{c.name}.json"


def run_kiln(c: Case, directory: Path, np: int = 1, extra: tuple[str, ...] = ()) -> Curves:
    """Trains the case written in `directory` and returns what its metrics.jsonl says, one number per step."""
    train = Path(os.environ.get("KILN_TRAIN", ROOT / "train"))  # KILN_TRAIN: another build, such as one with sanitizers
    if not train.exists():
        raise RuntimeError(f"{train} is missing; build it first: make")
    launcher = [os.environ.get("MPIRUN", "mpirun"), "-np", str(np)] if np > 1 else []
    command = [*launcher, str(train), "--config", str(directory / "config.yaml"), "--overwrite", *extra]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\nexited with {done.returncode}:\n{done.stdout[-4000:]}")
    records = [json.loads(line) for line in (directory / "runs" / c.name / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["type"] == "step"]
    if [r["step"] for r in steps] != list(range(1, c.max_steps + 1)):
        logged = [r["step"] for r in steps]
        raise RuntimeError(f"{' '.join(command)}\nlogged the steps {logged}, expected 1..{c.max_steps}")
    return {key: [float(r[key]) for r in steps] for key in BOUNDS}


def deviation(got: float, want: float) -> float:
    if not (math.isfinite(got) and math.isfinite(want)):
        return math.inf
    return 0.0 if got == want else abs(got - want) / max(abs(want), 1e-300)


def worst(got: Curves, want: Curves) -> dict[str, tuple[float, int]]:
    """For each curve the worst relative deviation and the step (from 1) where it is."""
    return {key: max((deviation(g, w), i + 1) for i, (g, w) in enumerate(zip(got[key], want[key], strict=True)))
            for key in BOUNDS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    root = parser.parse_args().directory
    for case in CASES:
        where = root / case.name
        write_case(case, where)
        print(f"wrote {where}; train it with ./train --config {where / 'config.yaml'}")
