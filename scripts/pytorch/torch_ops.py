"""PyTorch's ops alone, at the shapes and under the names of kiln's `./train bench`: for bench_pytorch.py --ops.

Each is what PyTorch does in the same place of a bf16 training step: eager, and where several kernels could become one
also by torch.compile; the faster of both counts. Where the two sides differ, PyTorch has the lesser work: its layernorm
backward does not add to the gradient of the residual stream, its weight gradients are written in bf16 and not fp32. The
exception is the embedding's backward, which fills a gradient of the whole table with zeros first, as in its step.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FLUSH_BYTES = 256 << 20                                         # more than an L2 cache holds
HEAD_START = 2_000_000                                          # clock cycles, about 1 ms: for Python to launch an op


def identity(x: Tensor) -> Tensor:
    return x


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class Clock:
    """Median of samples, with nothing in the caches before each, as kiln's bench/timing.h does it."""

    def __init__(self, device: str, samples: int) -> None:
        self.device, self.samples, self.cuda = device, samples, device == "cuda"
        self.flush = torch.empty(FLUSH_BYTES if self.cuda else 1, device=device, dtype=torch.int8)

    def us(self, run: Callable[[], object]) -> float:
        for _ in range(2):
            run()
        times = []
        for _ in range(self.samples):
            self.flush.zero_()
            if self.cuda:
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                torch.cuda._sleep(HEAD_START)                   # or a short op would be the time of its launch
                marks[0].record()
                run()
                marks[1].record()
                marks[1].synchronize()
                times.append(1e3 * marks[0].elapsed_time(marks[1]))
            else:
                start = time.perf_counter()
                run()
                times.append(1e6 * (time.perf_counter() - start))
        return float(median(times))


class Shape(NamedTuple):
    B: int
    T: int
    L: int
    C: int
    V: int                                                      # padded


class Op(NamedTuple):
    """Forward is f of inputs; each backward the gradient of f by some of the inputs."""
    forward: str | None                                         # names of rows; None: not a row
    backwards: dict[str, tuple[int, ...]]                       # name -> which inputs
    f: Callable[..., Tensor]
    inputs: Callable[[], list[Tensor]]
    compiled: bool                                              # worth trying


def ops_of(z: Shape, device: str) -> list[Op]:
    real = torch.bfloat16 if device == "cuda" else torch.float32
    BT, C, V = z.B * z.T, z.C, z.V

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device=device, dtype=torch.float32)).to(real).requires_grad_()

    def tokens() -> Tensor:                                     # as in text: the most frequent ones far ahead
        return (float(V) ** torch.rand(z.B, z.T, device=device)).long().sub_(1).clamp_(0, V - 1)

    def linear(name: str, n_in: int, n_out: int, before: Callable, after: Callable, residual: bool = False) -> list[Op]:
        """after(x w + b) + residual; kiln's forward has `before` done already, and its backward goes through it."""
        def forward(x: Tensor, w: Tensor, b: Tensor, r: Tensor | None = None) -> Tensor:
            y = after(torch.addmm(b, x, w))
            return y if r is None else y + r

        def inputs() -> list[Tensor]:
            return [normal(BT, n_in), normal(n_in, n_out, scale=0.02), normal(n_out, scale=0.02),
                    *([normal(BT, n_out)] if residual else [])]

        bias = () if residual else (2,)                         # kiln's layernorm backward takes that sum along
        return [Op(f"{name} forward", {}, forward, inputs, after is gelu or residual),
                Op(None, {f"{name} backward": (0, 1, *bias), f"{name} backward, dw alone": (1, *bias)},
                   lambda x, w, b: torch.addmm(b, before(x), w), lambda: inputs()[:3], before is gelu)]

    target = tokens()
    return [
        Op("embedding forward", {"embedding backward": (1, 2)}, lambda t, wte, wpe: F.embedding(t, wte) + wpe[:z.T],
           lambda: [tokens(), normal(V, C, scale=0.02), normal(z.T, C, scale=0.02)], True),
        Op("layernorm forward", {"layernorm backward": (0, 1, 2)}, lambda x, w, b: F.layer_norm(x, (C,), w, b),
           lambda: [normal(BT, C), normal(C), normal(C)], True),
        *linear("qkv", C, 3 * C, identity, identity),
        *linear("attention proj", C, C, identity, identity, residual=True),
        *linear("fc", C, 4 * C, identity, gelu),
        *linear("mlp proj", 4 * C, C, gelu, identity, residual=True),
        Op("head forward", {"head backward": (0, 1), "head backward, dw alone": (1,)}, lambda x, w: x @ w.t(),
           lambda: [normal(BT, C), normal(V, C, scale=0.02)], False),
        Op("gelu forward", {"gelu backward": (0,)}, gelu, lambda: [normal(BT, 4 * C)], False),
        # Forward and backward in one, as kiln's op is.
        Op(None, {"cross-entropy": (0,)}, lambda logits: F.cross_entropy(logits.float(), target.view(-1)),
           lambda: [normal(BT, V)], True),
    ]


def time_op(op: Op, clock: Clock, with_compile: bool) -> Iterator[tuple[str, float]]:
    f = compiled(op.f) if with_compile else op.f
    inputs = op.inputs()
    if op.forward:
        yield op.forward, clock.us(partial(f, *inputs))
    for name, which in op.backwards.items():
        wanted = [inputs[i] for i in which]
        y = f(*inputs)
        if y.dim() == 0:                                        # a loss: its forward is part of the row
            yield name, clock.us(partial(loss_and_gradient, f, inputs, wanted))
        else:
            yield name, clock.us(partial(torch.autograd.grad, y, wanted, torch.randn_like(y), retain_graph=True))


def loss_and_gradient(f: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    torch.autograd.grad(f(*inputs), wanted)


def compiled(f: Callable) -> Callable:
    """For these shapes alone, with a backward that can be run again on what its forward has kept."""
    import torch._functorch.config as aot  # of PyTorch 2
    torch._dynamo.reset()
    if hasattr(aot, "donated_buffer"):
        aot.donated_buffer = False
    of: Callable = torch.compile(f, dynamic=False)
    return of


def optimizer_times(z: Shape, clock: Clock) -> Iterator[tuple[str, float]]:
    """AdamW over all parameters as one, fp32, and the norm of their gradient."""
    n = z.V * z.C + z.T * z.C + z.L * (12 * z.C * z.C + 13 * z.C) + 2 * z.C
    p = torch.nn.Parameter(0.02 * torch.randn(n, device=clock.device))
    p.grad = 1e-3 * torch.randn_like(p)
    fused = {"fused": True} if clock.cuda else {}
    adamw = torch.optim.AdamW([p], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **fused)
    yield "gradient norm", clock.us(lambda: torch.linalg.vector_norm(p.grad))
    yield "adamw", clock.us(adamw.step)


def op_times(z: Shape, clock: Clock, with_compile: bool, only: Sequence[str] = ()) -> list[dict]:
    """Rows {"op", "us", "eager_us", "compiled_us"}; None where it did not run, with the reason in "failed". `only`: the
    beginnings of the names of ops that are wanted; empty: all."""
    rows: dict[str, dict] = {}

    def add(times: Callable[[], Iterator[tuple[str, float]]], key: str, names: Sequence[str]) -> None:
        for name in names:
            rows.setdefault(name, {"op": name, "us": None, "eager_us": None, "compiled_us": None})
        try:
            for name, us in times():
                rows[name] |= {key: us, "us": min(us, rows[name]["us"] or us)}
        except Exception as e:                                  # the others still count
            for name in names:
                if rows[name][key] is None:
                    rows[name]["failed"] = f"{key.removesuffix('_us')}: {type(e).__name__}: {str(e).splitlines()[:1]}"
        if clock.cuda:
            torch.cuda.empty_cache()

    for op in ops_of(z, clock.device):
        names = [name for name in (op.forward, *op.backwards) if name]
        if only and not any(name.startswith(tuple(only)) for name in names):
            continue
        add(partial(time_op, op, clock, False), "eager_us", names)
        if with_compile and op.compiled:
            add(partial(time_op, op, clock, True), "compiled_us", names)
    if not only or any(name.startswith(tuple(only)) for name in ("gradient norm", "adamw")):
        add(lambda: optimizer_times(z, clock), "eager_us", ("gradient norm", "adamw"))
    return list(rows.values())
