#!/usr/bin/env python3
"""Trains the PyTorch twin (gpt2_torch.py) by a kiln config: the val losses that kiln is to reach too.

    python3 scripts/pytorch/train_pytorch.py --config configs/shakespeare-char.yaml --seed 1
    python3 scripts/pytorch/train_pytorch.py --config CONFIG --set train.max_steps=2 --device cpu --no-compile

Model, data, order of magnitude of everything as kiln has them: whole sequences that do not overlap, all of them once an
epoch in an order of the seed, the same schedule, clipping and AdamW, dropout where the config has it, val loss over all
sequences of data.val. bf16 by autocast and a fused AdamW on a GPU. The last line is one JSON object.

Exit codes: 0 done, 2 no PyTorch, no such device or config.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

try:
    import torch
except ImportError as e:
    print(f"error: PyTorch is missing: {e}", file=sys.stderr)
    sys.exit(2)
import gpt2_torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))
from gpu_stages import read_config

ONLY = {"optimizer.name": "adamw", "optimizer.beta1": 0.9, "schedule.decay_steps": 0, "eval.tokens": 0}


class Text:
    """A split's sequences on the device."""

    def __init__(self, patterns: list[str], T: int, device: str) -> None:
        parts = [gpt2_torch.Shards(pattern, T) for pattern in patterns]
        batches = [p.batch(0, len(p.index)) for p in parts if p.index]
        if not batches:
            raise FileNotFoundError(f"{', '.join(patterns)}: no sequence of {T} tokens")
        self.tokens, self.targets = (torch.cat(side).to(device) for side in zip(*batches, strict=True))      # (n, T)

    def batches(self, size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Without end; an epoch's last batch is filled from the next epoch."""
        order = torch.empty(0, dtype=torch.int64)
        generator = torch.Generator().manual_seed(seed)
        while True:
            while len(order) < size:
                order = torch.cat([order, torch.randperm(len(self.tokens), generator=generator)])
            chosen, order = order[:size].to(self.tokens.device), order[size:]
            yield self.tokens[chosen], self.targets[chosen]


def val_loss(model: Callable, val: Text, size: int, amp: AbstractContextManager) -> float:
    total = 0.0
    with torch.no_grad(), amp:
        for first in range(0, len(val.tokens), size):
            tokens, targets = val.tokens[first:first + size], val.targets[first:first + size]
            total += model(tokens, targets).item() * len(tokens)
    return total / len(val.tokens)


def train(c: dict[str, Any], seed: int, device: str, compiled: bool) -> dict:
    for key, value in ONLY.items():
        if c.get(key, value) != value:
            raise ValueError(f"{key} is {c[key]}, and the twin knows only {value}")
    B, T, steps = c["train.global_batch_size"], c["model.context_length"], c["train.max_steps"]
    text = {split: Text(c[f"data.{split}"], T, device) for split in ("train", "val")}
    torch.manual_seed(seed)
    model = gpt2_torch.GPT2(gpt2_torch.GPT2Config(
        c["model.n_layer"], c["model.n_head"], c["model.n_embd"], T, c["model.vocab_size"],
        bias=c.get("model.bias", True), dropout=c.get("model.dropout", 0.0))).to(device)
    cuda = device == "cuda"
    optimizer = gpt2_torch.make_optimizer(model, c.get("optimizer.weight_decay", 0.1), c.get("optimizer.beta2", 0.95),
                                          **({"fused": True} if cuda else {}))
    forward = torch.compile(model) if compiled else model
    amp = torch.autocast("cuda", dtype=torch.bfloat16) if cuda else contextlib.nullcontext()
    batches, evals, begin = text["train"].batches(B, seed), [], time.perf_counter()
    for step in range(steps):
        rate = gpt2_torch.learning_rate(step, c["optimizer.learning_rate"], c.get("schedule.name", "constant"),
                                        c.get("schedule.warmup_steps", 0), steps,
                                        c.get("schedule.min_learning_rate", 0.0))
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens, targets = next(batches)
        with amp:
            loss = forward(tokens, targets)
        loss.backward()
        if clip := c.get("train.grad_clip", 1.0):
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % c["eval.interval"] == 0 or step + 1 == steps:
            model.eval()
            evals.append([step + 1, val_loss(forward, text["val"], B, amp)])
            model.train()
    return {"seed": seed, "steps": steps, "evals": evals, "best_val_loss": min(v for _, v in evals),
            "last_loss": loss.item(), "seconds": round(time.perf_counter() - begin, 2), "compile": compiled,
            "dtype": "bf16" if cuda else "fp32", "torch": torch.__version__}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch finds no usable GPU", file=sys.stderr)
        return 2
    try:
        result = train(read_config(a.config, a.set), a.seed, a.device, a.compile)
    except (OSError, KeyError, ValueError) as e:
        print(f"error: {a.config}: {type(e).__name__}: {e}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)                                              # some versions' threads outlast a compiled model
