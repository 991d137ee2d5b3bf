#!/usr/bin/python3
"""Does kiln train as PyTorch does? Twenty AdamW steps of two odd-sized GPT-2s from the same weights and tokens.

    /usr/bin/python3 scripts/pytorch/parity.py              PyTorch afresh, golden files, ./train (make parity)
    /usr/bin/python3 scripts/pytorch/parity.py --no-train   without ./train
    /usr/bin/python3 scripts/pytorch/parity.py --update     writes test/golden/parity_*.json; say why in the commit

PyTorch runs in float32, which is the reference, and in float64, which says how far float32 itself is from the truth.
Every loss must agree within 1e-4, every gradient norm within 1e-3 (BOUNDS in parity_case.py).
Exit code: 0 all agree, or written; 1 not so, or no PyTorch; 2 usage.
"""
from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import parity_case
from parity_case import BOUNDS, CASES, Case, Curves

try:
    import torch
except ImportError:
    sys.exit(f"{sys.executable} has no PyTorch. Debian: apt-get install python3-torch, run by /usr/bin/python3")
import gpt2_torch


def train_torch(c: Case, directory: Path, dtype: torch.dtype) -> Curves:
    model = gpt2_torch.load_model(directory / "model", dtype)
    data = gpt2_torch.Shards(str(directory / "data" / "train_*.bin"), c.context_length)
    assert len(data.index) < c.max_steps * c.global_batch_size, "the case should wrap around the end of an epoch"
    optimizer = gpt2_torch.make_optimizer(model, c.weight_decay)
    curves: Curves = {key: [] for key in BOUNDS}
    for step in range(c.max_steps):
        first = step * c.global_batch_size
        offsets = range(0, c.global_batch_size, c.micro_batch_size)
        micro_batches = [data.batch(first + i, c.micro_batch_size) for i in offsets]
        lr = gpt2_torch.learning_rate(step, c.learning_rate, "cosine", c.warmup_steps, c.max_steps, c.min_learning_rate,
                                      c.decay_steps)
        loss, norm = gpt2_torch.train_step(model, optimizer, micro_batches, lr, c.grad_clip)
        for key, value in (("loss", loss), ("grad_norm", norm), ("learning_rate", lr)):
            curves[key].append(value)
    clipped = sum(norm > c.grad_clip for norm in curves["grad_norm"])
    assert 0 < clipped < c.max_steps, f"grad_clip {c.grad_clip} clips {clipped} of {c.max_steps} steps; choose another"
    return curves


def write_golden(c: Case, directory: Path, f32: Curves, f64: Curves) -> None:
    golden = {"made_by": "scripts/pytorch/parity.py --update", "torch": torch.__version__,
              "case": parity_case.describe(c, directory), "float32": f32, "float64": f64}
    path = parity_case.golden_path(c)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"wrote {path.relative_to(parity_case.ROOT)}")


def report(title: str, got: Curves, want: Curves) -> bool:
    """One row of the table: the worst deviation of each curve and its step; true if all are within the bounds."""
    worst, ok = parity_case.worst(got, want), True
    cells = []
    for key, bound in BOUNDS.items():
        value, step = worst[key]
        inside = value <= bound                                 # a NaN became infinite and is outside
        ok &= inside
        cells.append(f"{value:9.2e} at {step:2}{' ' if inside else '!'}")
    print(f"  {title:38} {'  '.join(cells)}  {'ok' if ok else 'FAILED'}")
    return ok


def check(c: Case, directory: Path, f32: Curves, f64: Curves, with_train: bool) -> bool:
    path = parity_case.golden_path(c)
    if not path.exists():
        print(f"  {path} is missing; make it with --update and commit it")
        return False
    golden, ok = json.loads(path.read_text()), True
    if golden["case"] != parity_case.describe(c, directory):
        print(f"  {path.name} is of another case (parameters or checksums differ); --update if that is wanted")
        ok = False
    ok &= report("torch float32 / torch float64", f32, f64)
    ok &= report("torch float32 / golden float32", f32, golden["float32"])
    ok &= report("torch float64 / golden float64", f64, golden["float64"])
    if with_train:
        for np in (1, 2):
            try:
                kiln = parity_case.run_kiln(c, directory, np)
            except (RuntimeError, OSError, KeyError, ValueError) as error:
                print(f"  kiln np {np}: {error}")
                ok = False
                continue
            ok &= report(f"kiln np {np} / torch float32", kiln, f32)
            ok &= report(f"kiln np {np} / torch float64", kiln, f64)
            ok &= report(f"kiln np {np} / golden float32", kiln, golden["float32"])
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the golden files instead of checking")
    parser.add_argument("--no-train", action="store_true", help="leave ./train out")
    args = parser.parse_args()
    torch.set_num_threads(1)                                    # tiny models: a second thread only costs
    gpt2_torch.self_check()
    ok = True
    for c in CASES:
        with tempfile.TemporaryDirectory(prefix="kiln-parity-") as tmp:
            directory = Path(tmp)
            parity_case.write_case(c, directory)
            f32, f64 = (train_torch(c, directory, dtype) for dtype in (torch.float32, torch.float64))
            print(f"\n{c.name}: torch {torch.__version__}, loss {f32['loss'][0]:.4f} -> {f32['loss'][-1]:.4f}, "
                  f"grad norm {min(f32['grad_norm']):.2f} .. {max(f32['grad_norm']):.2f}, clipped at {c.grad_clip}")
            if args.update:
                write_golden(c, directory, f32, f64)
                ok &= report("torch float32 / torch float64", f32, f64)
            else:
                print(f"  {'worst relative deviation at step':38} {'loss':16} {'grad norm':16} {'learning rate':16}")
                ok &= check(c, directory, f32, f64, with_train=not args.no_train)
    print("\nparity: " + ("ok" if ok else "FAILED"))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
