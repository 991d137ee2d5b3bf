"""The goals for one H200, as data: each with its limit, and the place of its figure in the results of gpu_check.py.

A goal is "not measured", never met, where its stage has not run, has run on another GPU or another build than the
last, or has left the figure out; where a comparison of two sides has fewer than ROUNDS rounds; and where one of
several ops is missing. The figures of a stage that failed can miss a goal; they cannot meet one.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

ROUNDS = 5
Stages = dict[str, Any]                                         # of a result file: name -> {"result", "data", ...}
Read = Callable[[Stages], float | None]


class Goal(NamedTuple):
    name: str
    unit: str
    sign: str                                                   # ">=", "<=" or "<"
    limit: float
    read: Read                                                  # raises KeyError, IndexError where there is no figure
    stretch: bool = False
    gpu: str = "H200"                                           # empty: on every GPU

    @property
    def text(self) -> str:
        return f"{self.name} {self.sign} {number(self.limit)}{self.unit and ' ' + self.unit}"


def number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


# ---- how figures are read -------------------------------------------------------------------------------------------

def at(stage: str, *keys: Any) -> Read:
    def read(stages: Stages) -> float | None:
        value = stages[stage]["data"]
        for key in keys:
            value = value[key]
        found: float | None = value
        return found
    return read


def end_to_end(size: str, batches: tuple[int, ...], key: str) -> Read:
    """At the batch that the goal is for; one that was halved for want of memory is another measurement."""
    def read(stages: Stages) -> float | None:
        data = stages[f"pytorch-{size}-cudnn"]["data"]
        sides = ("kiln", "pytorch") if key == "ratio" else ("kiln",)
        enough = all(len(data[side]) >= ROUNDS for side in sides)
        value: float | None = data[key] if data["B"] in batches and enough else None
        return value
    return read


LAYER_PRODUCTS = ("qkv", "attention proj", "fc", "mlp proj")


def rows(stages: Stages, size: str, names: Sequence[str]) -> list[dict]:
    """Of all these ops. The five minutes of STAGE=first count where the whole stage has not run."""
    stage = stages.get(f"ops-{size}") or stages["first-memory" if size == "124m" else f"ops-{size}"]
    of = {r["op"]: r for r in stage["data"]["ops"]}
    return [of[name] for name in names]


def op(size: str, name: str, key: str, scale: float = 1) -> Read:
    return lambda stages: scale * rows(stages, size, [name])[0][key]


def rate(size: str, key: str, names: Sequence[str], scale: float) -> Read:
    """Work over time of several ops, each as often as a step calls it."""
    def read(stages: Stages) -> float:
        found = rows(stages, size, names)
        return float(scale * sum(r["calls"] * r[key] for r in found) / sum(r["calls"] * r["us"] for r in found))
    return read


def layer_products(size: str) -> Read:
    return rate(size, "flop", [f"{name} {way}" for name in LAYER_PRODUCTS for way in ("forward", "backward")], 1e-6)


def slowest_weight_gradient(size: str) -> Read:
    names = [f"{name} backward, dw alone" for name in (*LAYER_PRODUCTS, "head")]
    return lambda stages: min(r["tflop_per_s"] for r in rows(stages, size, names))


def same_weights(stages: Stages) -> float | None:
    found: float | None = (stages.get("modes") or stages["first-weights"])["data"]["same_weights"]
    return found


def outside(size: str) -> Read:
    def read(stages: Stages) -> float:
        share = stages[f"ops-{size}"]["data"]["step"][0]["share"]
        return float(100 * (1 - sum(share[part] for part in ("layer products", "head", "attention"))))
    return read


def idle(batch: int) -> Read:
    """As training runs by default: as a graph where that works."""
    def read(stages: Stages) -> float:
        runs = [r for r in stages["gaps"]["data"]["runs"] if r["B"] == batch and r["idle"] is not None]
        return float(100 * (next((r for r in runs if r["graph"] == "on"), None) or runs[0])["idle"])
    return read


SEEDS = (1, 2, 3)


def best(stages: Stages, side: str, key: str) -> list[float]:
    return [stages[f"quality-{seed}"]["data"][side][key] for seed in SEEDS]


def behind_pytorch(stages: Stages) -> float:
    return fmean(best(stages, "kiln", "best_val_loss")) - fmean(best(stages, "pytorch", "best_val_loss"))


def bf16_beside_fp32(stages: Stages) -> float:
    bf16, fp32 = (stages[f"quality-{name}"]["data"]["kiln"]["best_val_loss"] for name in (SEEDS[0], "fp32"))
    return float(100 * abs(bf16 / fp32 - 1))


def cost_of_determinism(stages: Stages) -> float | None:
    data = stages["modes"]["data"]
    return 100 * data["cost"] if min(len(data["auto"]), len(data["fastest"])) >= ROUNDS else None


GOALS = [
    Goal("124M, B64 T1024", "tokens/s", ">=", 600e3, end_to_end("124m", (64,), "kiln_tokens_per_s")),
    Goal("124M, B64 T1024", "tokens/s", ">=", 730e3, end_to_end("124m", (64,), "kiln_tokens_per_s"), stretch=True),
    Goal("124M beside PyTorch compiled, cuDNN SDPA", "x", ">=", 1.15, end_to_end("124m", (64,), "ratio")),
    Goal("1558M, B16-32 T1024", "tokens/s", ">=", 58e3, end_to_end("1558m", (16, 32), "kiln_tokens_per_s")),
    Goal("1558M, B16-32 T1024", "tokens/s", ">=", 62e3, end_to_end("1558m", (16, 32), "kiln_tokens_per_s"),
         stretch=True),
    Goal("1558M beside PyTorch compiled, cuDNN SDPA", "x", ">=", 1.15, end_to_end("1558m", (16, 32), "ratio")),
    *(goal for size in ("124m", "1558m") for goal in (
        Goal(f"{size.upper()} layer products with epilogues, time-weighted", "TFLOP/s", ">=", 680,
             layer_products(size)),
        Goal(f"{size.upper()} slowest weight gradient", "TFLOP/s", ">=", 550, slowest_weight_gradient(size)),
        Goal(f"{size.upper()} layernorm forward", "GB/s", ">=", 3900, op(size, "layernorm forward", "gb_per_s")),
        Goal(f"{size.upper()} layernorm backward", "GB/s", ">=", 3700, op(size, "layernorm backward", "gb_per_s")),
        Goal(f"{size.upper()} AdamW and norm", "GB/s", ">=", 3900,
             rate(size, "n_bytes", ("gradient norm", "adamw"), 1e-3)),
        Goal(f"{size.upper()} outside products and attention", "% of its ops in a row", "<=", 10, outside(size)))),
    Goal("classifier 65536 x 50304", "ms", "<=", 3.5, op("124m", "cross-entropy", "us", 1e-3)),
    Goal("deterministic beside the fastest mode, longer by", "%", "<=", 3,
         cost_of_determinism),
    Goal("two runs with the same weights' hash", "", ">=", 1, same_weights, gpu=""),
    Goal("GPU idle at B64", "% of the step", "<", 1, idle(64)),
    Goal("GPU idle at B4", "% of the step", "<", 5, idle(4)),
    Goal("124M, start to first step", "s", "<", 5, at("start", "warm_s")),
    Goal("shakespeare-char: best val loss, mean of 3 seeds, above PyTorch's by", "nats", "<=", 0.01, behind_pytorch,
         gpu=""),
    Goal("shakespeare-char: slowest seed", "s", "<", 90, lambda stages: max(best(stages, "kiln", "seconds"))),
    Goal("shakespeare-char: bf16 from fp32", "%", "<=", 0.5, bf16_beside_fp32, gpu=""),
]


class Verdict(NamedTuple):
    goal: Goal
    value: float | None
    result: str                                                 # "met", "not met", "not measured"


def of_one_build(results: dict[str, Any]) -> Stages:
    """Without what another GPU or build has left in the same folder."""
    return {name: r for name, r in results.get("stages", {}).items()
            if not {"gpu", "commit", "code"} & set(r.get("environment_differs", {}))}


def figure(goal: Goal, stages: Stages) -> float | None:
    try:
        return goal.read(stages)
    except (KeyError, IndexError, TypeError, ValueError):
        return None                                             # its stage has not run, or has no such figure


def judge(results: dict[str, Any]) -> list[Verdict]:
    """`results`: a merged file of gpu_check.py; {} where nothing has been measured."""
    gpu = str((results.get("environment") or {}).get("gpu", ""))
    stages = of_one_build(results)
    passed = {name: r for name, r in stages.items() if r["result"] == "passed"}
    verdicts = []
    for goal in GOALS:
        value = figure(goal, stages) if goal.gpu in gpu else None
        holds = value is not None and {">=": value >= goal.limit, "<=": value <= goal.limit,
                                       "<": value < goal.limit}[goal.sign]
        if holds and figure(goal, passed) is None:
            value, holds = None, False
        verdicts.append(Verdict(goal, value, "not measured" if value is None else "met" if holds else "not met"))
    return verdicts


def table(results: dict[str, Any]) -> str:
    lines = []
    for v in judge(results):
        value = "" if v.value is None else number(v.value)
        lines.append(f"{v.result:13} {value:>9}  {v.goal.text}{' (stretch)' if v.goal.stretch else ''}")
    return "\n".join(lines)
