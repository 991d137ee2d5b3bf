#!/usr/bin/env python3
"""Draw the loss curves of one or several runs.  Needs matplotlib (Debian: python3-matplotlib).

    scripts/plot_loss.py runs/demo                         # writes runs/demo/loss.png
    scripts/plot_loss.py runs/a runs/b --out compare.png   # several in one picture; also --x tokens

RUN is a run's folder or its metrics.jsonl, also of a run that is still going on.  Records of unknown type and lines
cut short are passed over; a loss that is not a number leaves a gap, and a cross at the top edge.
Exit codes: 0 drawn, 2 usage, 3 nothing to draw, 5 the system refused a read or write.
"""
import argparse
import functools
import io
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

USAGE, DATA, IO = 2, 3, 5
COLOURS = ["#0b63b0", "#d1570a", "#2b8a4b", "#8a4fb0", "#b3213d", "#6b5b4d", "#c04f9b", "#3d7f86"]
VAL = "#d1570a"  # with one run, colour tells train from val; with several, it tells the runs apart
BAD, INK = "#b3213d", "#3c434c"


class Failure(Exception):
    """(exit code, message)"""


@dataclass
class Run:
    label: str
    steps: dict[float, dict[str, float]] = field(default_factory=dict)  # a step record's numbers, by step
    evals: dict[float, float] = field(default_factory=dict)  # val_loss, by step

    def series(self, key: str) -> tuple[list[float], list[float]]:
        at = sorted(self.steps)
        return at, [self.steps[s].get(key, math.nan) for s in at]


def number(value: Any) -> float:
    """The value as a float; NaN for what is none.  JSON has no NaN, so writers say null, NaN or "NaN"."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def read_run(path: str, label: str) -> Run:
    run = Run(label)
    file = os.path.join(path, "metrics.jsonl") if os.path.isdir(path) else path
    if not os.path.exists(file):
        raise Failure(DATA, f"{file}: no such file; expected a run's folder, or its metrics.jsonl")
    with open(file, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # torn: the run was killed, or is writing just now
                continue
            if not isinstance(record, dict) or not math.isfinite(step := number(record.get("step"))):
                continue
            if record.get("type") == "step":  # after a resume the later record of a step is the one that counts
                run.steps[step] = {k: number(record.get(k)) for k in ("tokens", "loss", "grad_norm", "learning_rate")}
            elif record.get("type") == "eval":
                run.evals[step] = number(record.get("val_loss"))
    if not run.steps and not run.evals:
        raise Failure(DATA, f"{file}: no step and no eval record yet; let the run take a step, then draw again")
    return run


def labels(paths: list[str]) -> list[str]:
    """The folders' names, or the paths where two names are alike; nothing in them is a command to matplotlib."""
    names = [os.path.basename(os.path.abspath(p if os.path.isdir(p) else os.path.dirname(p))) for p in paths]
    names = names if len(set(names)) == len(names) else paths
    return [" " * n.startswith("_") + n.replace("$", r"\$") for n in names]


def smoothed(x: Sequence[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Mean over a window of a thirtieth of the run, at a thousand places; narrow at the steep start."""
    n, means = len(values), {}
    for i in (*range(0, n - 1, max(1, n // 1000)), n - 1):
        half = min(i // 3, n // 60)
        window = [v for v in values[i - half : i + half + 1] if math.isfinite(v)]
        means[x[i]] = sum(window) / len(window) if window else math.nan
    return list(means), list(means.values())


def tokens_at(run: Run, steps: Sequence[float]) -> list[float]:
    """Tokens seen after each step.  (An eval record's own `tokens` counts the text it evaluated.)"""
    from numpy import interp
    known = [(0.0, 0.0), *((s, t) for s, t in zip(*run.series("tokens"), strict=True) if math.isfinite(t))]
    if len(known) == 1:
        raise Failure(DATA, f"{run.label}: no step record counts tokens; use --x step")
    return list(interp(steps, *zip(*known, strict=True)))


def draw_loss(ax: Any, runs: list[Run], places: list[Callable]) -> None:
    """Train loss as lines, raw (faint) and smoothed; val loss as dots, its last value in the legend."""
    alone = len(runs) == 1
    for run, place, colour in zip(runs, places, COLOURS * len(runs), strict=False):
        at, loss = run.series("loss")
        evals = [(s, v) for s, v in sorted(run.evals.items()) if math.isfinite(v)]
        prefix, x = "" if alone else f"{run.label}: ", place(at)
        if any(map(math.isfinite, loss)):
            ax.plot(x, loss, color=colour, alpha=0.3 if alone else 0.15, linewidth=0.7)
            ax.plot(*smoothed(x, loss), color=colour, linewidth=1.7, marker="." if len(x) < 30 else None,
                    label=prefix + "train" if alone or not evals else None)
        if bad := [p for p, v in zip(x, loss, strict=True) if not math.isfinite(v)]:
            ax.plot(bad, [1.0] * len(bad), "x", color=BAD, clip_on=False, transform=ax.get_xaxis_transform(),
                    label=f"{prefix}not a number ({len(bad)}x)")
        if evals:
            steps, values = zip(*evals, strict=True)
            ax.plot(place(steps), values, "o-" if alone else "o:", color=VAL if alone else colour, zorder=4,
                    linewidth=1.3, markersize=4.5, markeredgecolor="white", markeredgewidth=0.7,
                    label=f"{prefix}val {values[-1]:.3f} at step {steps[-1]:,.0f}")
    if ax.lines:
        ax.legend(frameon=False, fontsize=9, labelcolor=INK)


def draw_key(ax: Any, runs: list[Run], places: list[Callable], key: str) -> None:
    for run, place, colour in zip(runs, places, COLOURS * len(runs), strict=False):
        at, values = run.series(key)
        noisy = key == "grad_norm"
        ax.plot(place(at), values, color=colour, alpha=0.3 if noisy else 1, linewidth=0.7 if noisy else 1.4)
        if noisy and at:
            ax.plot(*smoothed(place(at), values), color=colour, linewidth=1.4)


def dress(ax: Any, title: str, x: str, log: bool) -> None:
    """Title, quiet frame and grid, plain numbers; a logarithmic axis if it is wanted and every value allows it."""
    from matplotlib import ticker
    values = [v for a in ax.lines if a.get_transform() == ax.transData for v in a.get_ydata() if math.isfinite(v)]
    if log and values and min(values) > 0:
        ratio = max(values) / min(values)
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(ticker.NullLocator())
        marks = ticker.LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if ratio < 8 else (1, 2, 5))
        ax.yaxis.set_major_locator(ticker.MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]) if ratio < 2 else marks)
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:.6g}"))
    ax.xaxis.set_major_locator(ticker.MaxNLocator(8, steps=[1, 2, 2.5, 5, 10], integer=True))
    ax.xaxis.set_major_formatter(ticker.EngFormatter(sep="") if x == "tokens" else "{x:,.0f}")
    ax.set_title(title, loc="left", fontsize=10, color=INK)
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.margins(x=0.015)
    ax.grid(axis="y", color="#e3e6ea", linewidth=0.8)
    ax.tick_params(labelcolor=INK, labelsize=9, length=3, color="#b9bec5")
    ax.spines[["top", "right"]].set_visible(False)


def make_figure(runs: list[Run], x: str) -> Any:
    from matplotlib import figure, rcParams

    rcParams.update({"axes.edgecolor": "#b9bec5", "agg.path.chunksize": 10_000})  # it cannot draw a million at once
    places: list[Callable] = [functools.partial(tokens_at, run) if x == "tokens" else list for run in runs]
    picture = figure.Figure(figsize=(9, 6), dpi=150, layout="constrained", facecolor="white")
    axes = picture.subplot_mosaic([["loss", "loss"], ["rate", "norm"]], gridspec_kw={"height_ratios": [2.6, 1]})
    draw_loss(axes["loss"], runs, places)
    draw_key(axes["rate"], runs, places, "learning_rate")
    draw_key(axes["norm"], runs, places, "grad_norm")
    note = f" of {runs[0].label}" if len(runs) == 1 else " (lines: train, dots: val)"
    dress(axes["loss"], f"loss{note}, nats per token", x, log=True)
    dress(axes["rate"], "learning rate", x, log=False)
    dress(axes["norm"], "gradient norm, before clipping", x, log=True)
    return picture


def write_png(picture: Any, out: str) -> None:
    """Whole or not at all: a viewer that watches the file never sees half a picture."""
    png = io.BytesIO()  # metadata: without matplotlib's version the same run gives the same bytes
    picture.savefig(png, format="png", metadata={"Software": None}, bbox_inches="tight", pad_inches=0.2)
    try:
        with open(out + ".tmp", "wb") as f:
            f.write(png.getvalue())
        os.replace(out + ".tmp", out)
    except OSError as e:
        raise Failure(IO, f"{out}: {e.strerror}; give --out a place that can be written") from e


def main() -> int:
    p = argparse.ArgumentParser(description="Draw train and val loss, learning rate and gradient norm of runs.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its metrics.jsonl")
    p.add_argument("--out", metavar="PNG", help="default: loss.png, in the run's folder if there is one run")
    p.add_argument("--x", choices=["step", "tokens"], default="step", help="the horizontal axis (default step)")
    args = p.parse_args()
    folder = args.runs[0] if os.path.isdir(args.runs[0]) else os.path.dirname(args.runs[0])
    out = args.out or os.path.join(folder if len(args.runs) == 1 else "", "loss.png")
    try:
        runs = [read_run(path, name) for path, name in zip(args.runs, labels(args.runs), strict=True)]
        write_png(make_figure(runs, args.x), out)
        code, message = 0, out
    except Failure as e:
        code, message = e.args
    except ImportError as e:
        code, message = USAGE, (f"{e} in {sys.executable}; install matplotlib (Debian, Ubuntu: python3-matplotlib, for "
                                "/usr/bin/python3)")
    except OSError as e:
        code, message = IO, f"{e}; make it readable"
    print("plot_loss: " * (code != 0) + message, file=sys.stderr if code else sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main())
