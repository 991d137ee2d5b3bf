#!/usr/bin/python3
"""GPT-2 in PyTorch: the twin that kiln is checked against (parity.py) and timed against
(bench_cpu.py, on a GPU bench_pytorch.py), and that must learn as well (train_pytorch.py).

It states the mathematics a second time, in a framework that many people trust: same tensor names and layout as Hugging
Face's GPT-2, same data order, schedule, clipping and AdamW as kiln. Written to be read; it trains nothing on its own.

    /usr/bin/python3 scripts/pytorch/gpt2_torch.py      checks itself: start loss, finite differences, file round trip

Needs PyTorch 1.13 or later (Debian: apt-get install python3-torch), nothing else.
Exit code: 0 all checks hold, 1 not so, 2 usage.

    B batch   T time   C width   NH heads   HS head size   V vocabulary   L layers
"""
from __future__ import annotations

import argparse
import glob
import json
import math
import struct
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class GPT2Config:
    n_layer: int
    n_head: int
    n_embd: int
    context_length: int
    vocab_size: int
    bias: bool = True
    dropout: float = 0.0


class Table(nn.Module):
    """Rows looked up by index; a module of its own only so that its tensor is called `<name>.weight`."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(rows, width))      # (V, C) or (T, C)


class Linear(nn.Module):
    """y = x W + b with W stored (in, out): the layout of GPT-2's checkpoints, transposed from nn.Linear's."""

    def __init__(self, n_in: int, n_out: int, bias: bool, std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(std * torch.randn(n_in, n_out))       # (in, out)
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        y = rows @ self.weight if self.bias is None else torch.addmm(self.bias, rows, self.weight)
        return y.view(*x.shape[:-1], -1)


class LayerNorm(nn.Module):
    """nn.LayerNorm cannot leave out its bias before PyTorch 2.1."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


def future(T: int) -> Tensor:
    """(T, T), true where key j is in query i's future."""
    return torch.ones(T, T, dtype=torch.bool).triu(1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, dropout: float = 0.0) -> Tensor:
    """q, k, v and the result: (B, NH, T, HS); hidden: future(T), for versions that cannot mask by themselves."""
    if hasattr(F, "scaled_dot_product_attention"):              # PyTorch 2
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    score = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(q.size(-1)))
    return F.dropout(score.masked_fill(hidden, float("-inf")).softmax(-1), dropout) @ v


class Attention(nn.Module):
    def __init__(self, c: GPT2Config) -> None:
        super().__init__()
        self.n_head, self.dropout = c.n_head, c.dropout
        self.c_attn = Linear(c.n_embd, 3 * c.n_embd, c.bias)
        self.c_proj = Linear(c.n_embd, c.n_embd, c.bias, std=0.02 / math.sqrt(2 * c.n_layer))
        self.register_buffer("hidden", future(c.context_length), persistent=False)  # (T, T)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # each (B, NH, T, HS)
        y = causal_attention(q, k, v, self.hidden[:T, :T], self.dropout if self.training else 0.0)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, c: GPT2Config) -> None:
        super().__init__()
        self.dropout = c.dropout
        self.c_fc = Linear(c.n_embd, 4 * c.n_embd, c.bias)
        self.c_proj = Linear(4 * c.n_embd, c.n_embd, c.bias, std=0.02 / math.sqrt(2 * c.n_layer))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, c: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(c.n_embd, c.bias)
        self.attn = Attention(c)
        self.ln_2 = LayerNorm(c.n_embd, c.bias)
        self.mlp = MLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    def __init__(self, c: GPT2Config) -> None:
        super().__init__()
        self.config = c
        self.wte = Table(c.vocab_size, c.n_embd)                # also the classifier: tied
        self.wpe = Table(c.context_length, c.n_embd)
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = LayerNorm(c.n_embd, c.bias)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats over all B*T targets. tokens, targets: (B, T) int64."""
        T = tokens.size(1)
        x = F.embedding(tokens, self.wte.weight) + self.wpe.weight[:T]      # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)                    # (B, T, V)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


# ---- files ----------------------------------------------------------------------------------------------------------

def read_safetensors(path: Path) -> dict[str, Tensor]:
    """float32 tensors of a safetensors file: 8-byte little-endian header length, JSON header, data."""
    raw = bytearray(Path(path).read_bytes())
    n_header = struct.unpack_from("<Q", raw)[0]
    header: dict = json.loads(raw[8:8 + n_header])
    header.pop("__metadata__", None)
    out = {}
    for name, info in header.items():
        if info["dtype"] != "F32":
            raise ValueError(f"{path}: {name} has dtype {info['dtype']}, expected F32")
        begin, end = info["data_offsets"]
        if end - begin != 4 * math.prod(info["shape"]) or 8 + n_header + end > len(raw):
            raise ValueError(f"{path}: {name} {info['shape']} does not match its bytes [{begin}, {end}) of {len(raw)}")
        flat = torch.frombuffer(raw, dtype=torch.float32, count=(end - begin) // 4, offset=8 + n_header + begin)
        out[name.removeprefix("transformer.")] = flat.view(info["shape"]).clone()
    return out


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    header, chunks, at = {}, [], 0
    for name, t in tensors.items():
        data = t.detach().float().contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at + len(data)]}
        chunks.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                             # data starts aligned
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> GPT2:
    """A model in Hugging Face layout. "kiln_bias": false means that the zero biases in the file are padding."""
    c = json.loads((Path(directory) / "config.json").read_text())
    model = GPT2(GPT2Config(c["n_layer"], c["n_head"], c["n_embd"], c["n_positions"], c["vocab_size"],
                            c.get("kiln_bias", True)))
    tensors = read_safetensors(Path(directory) / "model.safetensors")
    wanted = {name for name, _ in model.named_parameters()}
    for name in sorted(set(tensors) - wanted):
        ignorable = name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias"))
        if not ignorable and (not name.endswith(".bias") or model.config.bias or bool(tensors[name].any())):
            raise ValueError(f"{directory}: unexpected tensor {name}")
    model.load_state_dict({name: tensors[name] for name in wanted})
    model.to(dtype)
    return model


class Shards:
    """llm.c token shards in the order of `shuffle: false`: files sorted bytewise, sequences never cross files."""

    def __init__(self, pattern: str, T: int) -> None:
        self.T = T
        self.files: list[Tensor] = []                           # int64 tokens of each shard
        self.index: list[tuple[int, int]] = []                  # global sequence -> (file, first token)
        for path in sorted(glob.glob(pattern), key=lambda p: p.encode()):
            raw = bytearray(Path(path).read_bytes())
            magic, version, count = struct.unpack_from("<3i", raw)
            if (magic, version) != (20240520, 1) or len(raw) != 1024 + 2 * count:
                raise ValueError(f"{path}: not a uint16 llm.c shard of {count} tokens")
            tokens = torch.frombuffer(raw, dtype=torch.int16, offset=1024).to(torch.int64) & 0xFFFF
            self.index += [(len(self.files), i * T) for i in range((count - 1) // T)]
            self.files.append(tokens)

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Global sequences [first, first + count), wrapping at the end of an epoch; targets are shifted by one."""
        rows = []
        for i in range(first, first + count):
            file, at = self.index[i % len(self.index)]
            rows.append(self.files[file][at:at + self.T + 1])
        both = torch.stack(rows)                                # (B, T + 1)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def write_shard(path: Path, tokens: Iterable[int]) -> None:
    t = list(tokens)
    Path(path).write_bytes(struct.pack("<256i", 20240520, 1, len(t), *[0] * 253) + struct.pack(f"<{len(t)}H", *t))


# ---- training -------------------------------------------------------------------------------------------------------

def learning_rate(step: int, lr: float, schedule: str, warmup: int, max_steps: int, min_lr: float = 0.0,
                  decay_steps: int | None = None) -> float:
    """Rate of step `step` (the first is 0). The cosine reaches min_lr at step decay_steps; None: at the last step."""
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    assert schedule == "cosine", schedule
    end = max_steps - 1 if decay_steps is None else decay_steps
    progress = min(1.0, (step - warmup) / max(1, end - warmup))
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (lr - min_lr)


def make_optimizer(model: GPT2, weight_decay: float = 0.1, beta2: float = 0.95,
                   **options: bool) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]  # biases and LayerNorm weights are not decayed
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, beta2), eps=1e-8, **options)


def train_step(model: GPT2, optimizer: torch.optim.AdamW, micro_batches: list[tuple[Tensor, Tensor]], lr: float,
               grad_clip: float = 1.0) -> tuple[float, float]:
    """One update from the mean over equal micro-batches. Returns (loss, gradient norm before clipping)."""
    optimizer.zero_grad(set_to_none=True)
    loss_sum = 0.0
    for tokens, targets in micro_batches:
        loss = model(tokens, targets)
        (loss / len(micro_batches)).backward()
        loss_sum += loss.item()
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return loss_sum / len(micro_batches), norm


# ---- self-check -----------------------------------------------------------------------------------------------------

def self_check() -> None:
    torch.manual_seed(1)
    for bias in (True, False):
        c = GPT2Config(n_layer=2, n_head=3, n_embd=24, context_length=11, vocab_size=97, bias=bias)
        model = GPT2(c).double()
        tokens, targets = torch.randint(c.vocab_size, (2, 3, c.context_length))
        start = model(tokens, targets).item()
        assert abs(start - math.log(c.vocab_size)) < 0.05, start

        # Directional derivative of the whole model against central differences; leaves the symmetric start first.
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        model(tokens, targets).backward()
        direction = [torch.randn_like(p) for p in model.parameters()]
        analytic = sum((p.grad * d).sum().item() for p, d in zip(model.parameters(), direction, strict=True))
        values, h = [], 1e-6
        with torch.no_grad():
            for shift in (h, -2 * h):                           # to +h, then to -h
                for p, d in zip(model.parameters(), direction, strict=True):
                    p += shift * d
                values.append(model(tokens, targets).item())
        numeric = (values[0] - values[1]) / (2 * h)
        assert abs(analytic - numeric) < 1e-6 * abs(numeric), (analytic, numeric)

        # The future must not be seen: another last token changes no earlier prediction.
        changed = tokens.clone()
        changed[:, -1] = (changed[:, -1] + 1) % c.vocab_size
        early = torch.full_like(targets, -100)                  # cross_entropy ignores -100
        early[:, :-1] = targets[:, :-1]
        assert model(tokens, early).item() == model(changed, early).item()

        with tempfile.TemporaryDirectory() as tmp:
            write_safetensors(Path(tmp) / "m.safetensors", dict(model.named_parameters()))
            for name, t in read_safetensors(Path(tmp) / "m.safetensors").items():
                assert torch.equal(t, model.get_parameter(name).detach().float()), name
            write_shard(Path(tmp) / "a.bin", range(65530, 65536))
            assert Shards(tmp + "/*.bin", 2).batch(1, 2)[0].tolist() == [[65532, 65533], [65530, 65531]]
        print(f"bias {bias}: start loss {start:.4f} (ln V = {math.log(c.vocab_size):.4f}), directional derivative "
              f"{analytic:.8f}, central difference {numeric:.8f}: ok")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    self_check()
