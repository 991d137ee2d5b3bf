"""The least work of a training step of GPT-2: FLOP and bytes of each op, counted by hand. ./train bench counts them a
second time, and a test compares the counts. Printed with the least time that a device of given peaks needs.

An op counts its tensors once, read or written, as if caches held nothing from the op before; small vectors are left
out. One micro-batch, one optimizer step, bf16, biases, no dropout.

    BT tokens   C width   A = BT*C   W weights of a product   Vp padded vocabulary   N parameters, padded
"""
from __future__ import annotations

import math
from typing import NamedTuple


class Device(NamedTuple):
    name: str
    tflop_per_s: float                                          # of dense products, sums in fp32
    gb_per_s: float
    source: str


H200 = Device("NVIDIA H200", 989, 4800, "the vendor's figures")


class Op(NamedTuple):
    op: str
    part: str
    calls: int
    flop: float                                                 # of one call, as n_bytes
    n_bytes: float

    def by_flop(self, d: Device) -> bool:
        return self.flop / d.tflop_per_s / 1e6 > self.n_bytes / d.gb_per_s / 1e3

    def bound_us(self, d: Device) -> float:
        return max(self.flop / d.tflop_per_s / 1e6, self.n_bytes / d.gb_per_s / 1e3)


class Shape(NamedTuple):
    L: int
    NH: int
    C: int
    T: int = 1024
    V: int = 50257
    B: int = 1
    item: int = 2                                               # bytes of an activation; statistics, gradients: 4

    @property
    def Vp(self) -> int:
        return (self.V + 127) // 128 * 128

    def n_parameters(self) -> int:
        """In their arena, where each tensor starts at a multiple of 64 elements."""
        C = self.C
        block = [C, C, 3 * C * C, 3 * C, C * C, C, C, C, 4 * C * C, 4 * C, 4 * C * C, C]
        return sum(math.ceil(n / 64) * 64 for n in [self.Vp * C, self.T * C, *(self.L * block), C, C])


def products(z: Shape) -> list[Op]:
    """y = x w + b: x (BT, n_in), w (n_in, n_out). A GELU or the residual stream passes through one more tensor of y's
    size; the gradient of a GELU is taken on the way to x's, which one more of x's size is read for."""
    ops = []
    for name, part, n_in, n_out, calls, beside_y, beside_x in (
            ("qkv", "layer products", z.C, 3 * z.C, z.L, 0, 0),
            ("attention proj", "layer products", z.C, z.C, z.L, 1, 0),
            ("fc", "layer products", z.C, 4 * z.C, z.L, 1, 0),
            ("mlp proj", "layer products", 4 * z.C, z.C, z.L, 1, 1),
            ("head", "head", z.C, z.Vp, 1, 0, 0)):
        x, y, w = z.B * z.T * n_in, z.B * z.T * n_out, n_in * n_out
        flop = 2.0 * x * n_out
        weights = z.item * (x + y) + 4 * w
        inputs = z.item * (y + w + x * (1 + beside_x))
        ops += [Op(f"{name} forward", part, calls, flop, z.item * (x + w + y * (1 + beside_y))),
                Op(f"{name} backward", part, calls, 2 * flop, weights + inputs)]
    return ops


def expected_tokens(z: Shape) -> float:
    """Different ones among those that ./train bench draws: the k-th most frequent has probability log_V(1 + 1/k), which
    is about how words are distributed."""
    return sum(1 - (1 - math.log1p(1 / k) / math.log(z.V)) ** (z.B * z.T) for k in range(1, z.V))


def step_ops(z: Shape) -> list[Op]:
    BT, C, T = z.B * z.T, z.C, z.T
    A, P, N = BT * C, T * C, z.n_parameters()
    half = 2.0 * A * T                                          # two products of 2 A T, half of each in the future
    copy = 2 if z.item == 2 else 0                              # bf16 of the parameters
    return [
        Op("embedding forward", "embedding", 1, 0, z.item * (2 * A + P) + 4 * BT),
        Op("embedding backward", "embedding", 1, 0, 2 * z.item * A + 8 * expected_tokens(z) * C + 4 * P + 8 * BT),
        Op("layernorm forward", "layernorm", 2 * z.L + 1, 0, 2 * z.item * A + 8 * BT),
        Op("layernorm backward", "layernorm", 2 * z.L, 0, 4 * z.item * A + 8 * BT),
        Op("last layernorm backward", "layernorm", 1, 0, 3 * z.item * A + 8 * BT),
        *products(z),
        Op("attention forward", "attention", z.L, half, 4 * z.item * A + 4 * BT * z.NH),
        Op("attention backward", "attention", z.L, 2.5 * half, 8 * z.item * A + 12 * BT * z.NH),
        Op("cross-entropy", "loss", 1, 0, 2 * z.item * BT * z.Vp),
        Op("row sum", "loss", 1, 0, 4 * BT),
        Op("gradient norm", "optimizer", 1, 0, 4 * N),
        Op("adamw", "optimizer", 1, 0, (28 + copy) * N),
    ]


def bound_ms(ops: list[Op], d: Device) -> float:
    return sum(o.calls * o.bound_us(d) for o in ops) / 1e3
