#!/usr/bin/env python3
"""GPT-2 trained by PyTorch on one GPU, as fast as PyTorch does it: the figure that kiln is measured against.

    python3 scripts/pytorch/bench_pytorch.py --size 124m --batch 16      tokens/s; the last line is one JSON object
    python3 scripts/pytorch/bench_pytorch.py --size 1558m --batch 8 --sdpa cudnn
    python3 scripts/pytorch/bench_pytorch.py --attention 64x12x1024x64   attention alone (BxNHxTxHS)
    python3 scripts/pytorch/bench_pytorch.py --ops --batch 64            each op of ./train bench alone
    python3 scripts/pytorch/bench_pytorch.py --tiny --device cpu         what the tests run

The model is gpt2_torch.py's under torch.compile, with bf16 autocast, fused AdamW, gradient clipping at 1, a
vocabulary of 50304 and random tokens that already lie on the GPU.  A window is ten steps between two waits for the GPU;
the figure is the median window, compilation and warm-up left out.  --sdpa forces scaled_dot_product_attention to one
implementation; by default PyTorch chooses.  Ops alone: torch_ops.py.  Needs PyTorch 2.3 or later for --sdpa and
nothing else; downloads nothing.

Exit codes: 0 done, 2 no PyTorch or no such device, 7 out of memory.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

try:
    import torch
except ImportError as e:
    print(f"error: PyTorch is missing: {e}", file=sys.stderr)
    sys.exit(2)
import gpt2_torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))
from gpu_stages import SIZES
from torch_ops import Clock, Shape, op_times

VOCABULARY = 50304


def sdpa_choice(name: str) -> contextlib.AbstractContextManager:
    """A context in which scaled_dot_product_attention has one implementation."""
    if name == "default":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel
    kinds = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    chosen: contextlib.AbstractContextManager = sdpa_kernel(kinds[name])
    return chosen


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def fused_optimizer(model: gpt2_torch.GPT2, device: str) -> torch.optim.AdamW:
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]}
              for g in gpt2_torch.make_optimizer(model).param_groups]
    fused = {"fused": True} if device == "cuda" else {}
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, **fused)


def train(a: argparse.Namespace, config: gpt2_torch.GPT2Config) -> dict:
    B, T = a.batch, config.context_length
    torch.manual_seed(1)
    with torch.device(a.device) if a.device == "cuda" else contextlib.nullcontext():    # 1558M: seconds, not a minute
        model = gpt2_torch.GPT2(config)
    model.to(a.device)
    optimizer = fused_optimizer(model, a.device)
    forward = torch.compile(model) if a.compile else model
    batches = torch.randint(config.vocab_size, (8, 2, B, T), device=a.device)
    amp = torch.autocast(a.device, dtype=torch.bfloat16)

    def step(i: int) -> torch.Tensor:
        tokens, targets = batches[i % len(batches)]
        with amp:
            loss = forward(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    begin = time.perf_counter()
    with sdpa_choice(a.sdpa):
        for i in range(a.warmup):
            loss = step(i)
        wait(a.device)
        warm = time.perf_counter()
        window_ms = []
        for w in range(max(1, a.steps // a.window)):
            start = time.perf_counter()
            for i in range(a.window):
                loss = step(w * a.window + i)
            wait(a.device)
            window_ms.append(1e3 * (time.perf_counter() - start) / a.window)
    ms = median(window_ms)
    return {"size": a.size, "B": B, "T": T, "n_layer": config.n_layer, "n_head": config.n_head,
            "n_embd": config.n_embd, "vocab_size": config.vocab_size, "sdpa": a.sdpa, "compile": a.compile,
            "steps": a.window * len(window_ms), "step_ms": ms, "tokens_per_s": 1e3 * B * T / ms,
            "window_step_ms": [round(x, 4) for x in window_ms], "warmup_s": round(warm - begin, 2),
            "last_loss": float(loss),
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if a.device == "cuda" else None}


def ops(a: argparse.Namespace, c: gpt2_torch.GPT2Config) -> dict:
    """Every op of a step that PyTorch has as one; attention by cuDNN and as PyTorch chooses, the faster counts."""
    rows = op_times(Shape(a.batch, c.context_length, c.n_layer, c.n_embd, c.vocab_size), Clock(a.device, a.samples),
                    a.compile, a.only)
    if a.only and not "attention".startswith(tuple(a.only)):
        return {"size": a.size, "B": a.batch, "compile": a.compile, "samples": a.samples, "ops": rows}
    shape = f"{a.batch}x{c.n_head}x{c.context_length}x{c.n_embd // c.n_head}"
    found: dict[str, dict] = {}
    for choice in ("default", "cudnn") if a.device == "cuda" else ("default",):
        try:
            found[choice] = attention(shape, argparse.Namespace(**{**vars(a), "sdpa": choice}))
        except RuntimeError as e:                               # no kernel of that kind for this device or shape
            print(f"attention by {choice}: {e}", file=sys.stderr)
    for way in ("forward", "backward"):
        times = {choice: t[f"{way}_us"] for choice, t in found.items()}
        fastest = min(times, key=times.__getitem__, default="")
        rows.append({"op": f"attention {way}", "us": times.get(fastest), "by": fastest or None, **times})
    return {"size": a.size, "B": a.batch, "compile": a.compile, "samples": a.samples, "ops": rows}


def attention(shape: str, a: argparse.Namespace) -> dict:
    """Forward and backward of causal attention alone; q, k and v are views of one packed (B, T, 3, NH, HS) tensor,
    their gradients are not packed."""
    B, NH, T, HS = (int(x) for x in shape.split("x"))
    dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
    packed = torch.randn(B, T, 3, NH, HS, device=a.device, dtype=dtype)
    q, k, v = (x.requires_grad_() for x in packed.permute(2, 0, 3, 1, 4))  # (B, NH, T, HS) each
    hidden = gpt2_torch.future(T).to(a.device)
    dy = torch.randn(B, NH, T, HS, device=a.device, dtype=dtype)
    clock = Clock(a.device, a.samples)

    def forward() -> torch.Tensor:
        return gpt2_torch.causal_attention(q, k, v, hidden)

    with sdpa_choice(a.sdpa):
        forward_us = clock.us(forward)
        y = forward()
        backward_us = clock.us(lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True))
    flop = 2.0 * B * T * T * NH * HS                            # the causal half of two products
    return {"shape": shape, "sdpa": a.sdpa, "forward_us": forward_us, "forward_tflop_per_s": flop / forward_us / 1e6,
            "backward_us": backward_us, "backward_tflop_per_s": 2.5 * flop / backward_us / 1e6}


def versions(device: str) -> dict:
    cuda = device == "cuda"
    return {"torch": torch.__version__, "torch_cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
            "device": torch.cuda.get_device_name() if cuda else "cpu"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="124m")
    parser.add_argument("--batch", type=int, default=16, help="sequences of 1024 tokens")
    parser.add_argument("--steps", type=int, default=50, help="that are timed")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--window", type=int, default=10, help="steps between two waits")
    parser.add_argument("--sdpa", choices=("default", "cudnn", "flash"), default="default")
    parser.add_argument("--attention", action="append", metavar="BxNHxTxHS", default=[])
    parser.add_argument("--ops", action="store_true", help="each op alone instead of training")
    parser.add_argument("--only", action="append", metavar="NAME", default=[], help="ops whose names begin with it")
    parser.add_argument("--samples", type=int, default=21, help="of what is measured alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--tiny", action="store_true", help="two small layers, a few steps, not compiled")
    parser.add_argument("--json", type=Path, help="write the result there too")
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch finds no usable GPU", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("high")
    config = gpt2_torch.GPT2Config(*SIZES[a.size], context_length=1024, vocab_size=VOCABULARY)
    if a.tiny:
        a.size, a.batch, a.steps, a.warmup, a.window, a.samples, a.compile = "tiny", 2, 4, 1, 2, 3, False
        config = gpt2_torch.GPT2Config(n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=128)
    try:
        result = ({"attention": [attention(shape, a) for shape in a.attention]} if a.attention
                  else ops(a, config) if a.ops else train(a, config))
    except RuntimeError as e:                                   # OutOfMemoryError is one, and has not always existed
        if "out of memory" not in str(e):
            raise
        print(f"error: out of memory: {str(e).splitlines()[0]}", file=sys.stderr)
        return 7
    result.update(versions(a.device))
    text = json.dumps(result)
    if a.json:
        a.json.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)                                              # some versions' threads outlast a compiled model
