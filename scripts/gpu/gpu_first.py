"""The stages of STAGE=first: what a GPU that is there for five minutes shows, the most decisive first. They need no
compiler. Each leaves its result behind as it ends, so that a run that is cut off loses only the part under way.

  first-instructions   each PTX instruction by itself (those of 8.0; on 9.0 also Hopper's)
  first-ops            ops against their references
  first-attention      attention kernels against the reference in double
  first-weights        two runs of one config: the same weights
  first-124m           124M, B64 T1024, 30 steps, beside PyTorch's compiled step with cuDNN's attention
  first-sdpa           attention alone, beside cuDNN's in the same program and PyTorch's
  first-memory         the memory-bound ops alone, beside PyTorch's

STAGE=more runs after it what fits in the rest of a quarter of an hour: the start, the cost of determinism, launches,
every op, attention at all shapes, memcheck.
"""
from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from statistics import median

from gpu_speed import attention, kiln_speed, ops, time_left
from gpu_stages import BATCHES, OP_TESTS, SCRIPTS, Data, Failed, Stage, last_json, reason, suite, torch_python

SECONDS = 300.0                                                 # of STAGE=first
MORE_SECONDS = 420.0
SIZE = "124m"
SHAPES = ("64x12x1024x64",)
WEIGHTS_BATCH, WEIGHTS_STEPS = 8, 10
FIRST_STEPS = 30
# Names of ops that move data and compute little begin like this.
MEMORY_BOUND = ("embedding", "layernorm", "last layernorm", "cross-entropy", "gradient norm", "adamw")
# Stage -> its share of the time, in seconds of SECONDS.
FIRST = {"first-instructions": 30, "first-ops": 30, "first-attention": 20, "first-weights": 25, "first-124m": 110,
         "first-sdpa": 25, "first-memory": 60}
MORE = {"start": 40, "modes": 70, "gaps": 50, "ops-124m": 100, "attention": 80, "sanitize-memcheck": 80}


def passed(data: Data, bad: list[str]) -> tuple[str, Data]:
    if bad:
        raise Failed("; ".join(bad), data)
    return f"{sum(v['passed'] for v in data.values())} passed", data


def instructions(s: Stage) -> tuple[str, Data]:
    data: Data = {}
    bad: list[str] = []
    if s.gpu.capability == "9.0":
        suite(s, data, bad, "instructions of 9.0a", "test_isa_sm90_native", s.left() / 2)
    suite(s, data, bad, "instructions of 8.0", "test_isa_native", s.left())
    return passed(data, bad)


def op_tests(s: Stage, name: str, chosen: tuple[str, ...]) -> tuple[str, Data]:
    data: Data = {}
    bad: list[str] = []
    suite(s, data, bad, name, "test_native", s.left(), arguments=(f"-sf={OP_TESTS}", *chosen))
    return passed(data, bad)


def weights(s: Stage) -> tuple[str, Data]:
    data: Data = {"weights": [], "gemm_choices": [], "steps": WEIGHTS_STEPS, "B": WEIGHTS_BATCH}
    for _ in range(2):
        try:
            run = kiln_speed(s, SIZE, WEIGHTS_BATCH, steps=WEIGHTS_STEPS)
        except (Failed, MemoryError) as e:
            raise Failed(str(e), data) from e
        data["weights"].append(run["weights"])
        data["gemm_choices"].append(run["gemm_choices"])
        data["attention"] = run["attention"]
    hashes = data["weights"]
    data["same_weights"] = None not in hashes and len(set(hashes)) == 1
    if None in hashes or len(set(hashes)) > 1:
        raise Failed(f"two runs of one config end with other weights: {hashes[0]}, {hashes[1]}", data)
    return f"two runs, the same weights: {hashes[0]}", data


def whole_step(s: Stage) -> tuple[str, Data]:
    """kiln first: PyTorch's time goes to its compiler, and may not suffice."""
    batch = BATCHES[SIZE]
    kiln = kiln_speed(s, SIZE, batch, steps=FIRST_STEPS)
    data: Data = {"size": SIZE, "B": batch, "sdpa": "cudnn", "kiln": [kiln], "pytorch": [],
                  "kiln_tokens_per_s": kiln["tokens_per_s"]}
    shown = f"{SIZE} B{batch}: kiln {kiln['tokens_per_s']:,.0f} tokens/s"
    command = [torch_python(), SCRIPTS / "pytorch" / "bench_pytorch.py", "--size", SIZE, "--batch", str(batch),
               "--sdpa", "cudnn", "--steps", str(FIRST_STEPS * 2 // 3), "--window", "5"]
    code, text = s.run(command, time_left(s), dict(os.environ))
    try:
        if code != 0:
            raise Failed(reason(code, text))
        data["pytorch"].append(last_json(text))
    except Failed as e:                                         # kiln's figure stays
        data["pytorch_failed"] = str(e)
        return f"{shown}; PyTorch: {e}", data
    theirs = median(r["tokens_per_s"] for r in data["pytorch"])
    data |= {"pytorch_tokens_per_s": theirs, "ratio": kiln["tokens_per_s"] / theirs}
    return f"{shown}, PyTorch (cudnn SDPA) {theirs:,.0f}: {data['ratio']:.2f}x, once each", data


def stages() -> dict[str, Callable[[Stage], tuple[str, Data]]]:
    """By the name of the result's file."""
    return {
        "first-instructions": instructions,
        "first-ops": partial(op_tests, name="ops", chosen=("-tce=attention*",)),
        "first-attention": partial(op_tests, name="attention", chosen=("-tc=attention*",)),
        "first-weights": weights,
        "first-124m": whole_step,
        "first-sdpa": lambda s: attention(s, SHAPES, ("cudnn",)),
        "first-memory": lambda s: ops(s, SIZE, MEMORY_BOUND),
    }

