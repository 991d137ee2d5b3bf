#!/usr/bin/env python3
"""The whole step on a GPU beside PyTorch (make bench-gpu): speed, ops, launch gaps, quality, as gpu_check's stages.

    python3 scripts/bench_gpu.py                    all stages; what has passed before with the same code is kept
    STAGE="ops-124m start" python3 scripts/bench_gpu.py        some of them
    python3 scripts/bench_gpu.py --publish          only: the results so far into benchmarks/results/

Each stage has a limit of its own under 8 minutes and leaves its result behind at once, so a machine that is taken away
costs the running stage alone. At the end, all results are written to benchmarks/results/<gpu>-<date>.json with versions
and commit, and each goal (scripts/goals.py) is said to be met, not met or not measured. Then `make performance-page`
writes docs/performance.md. Options of the environment: scripts/gpu_check.sh.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_check  # noqa: E402
from gpu_stages import ROOT  # noqa: E402

RESULTS = Path(os.environ.get("RESULTS") or ROOT / "benchmarks" / "results")


def passed(path: Path) -> set[str]:
    return {name for name, r in json.loads(path.read_text())["stages"].items() if r["result"] == "passed"}


def publish() -> Path:
    """A file of the same day is replaced only where no stage that has passed would be lost."""
    merged = gpu_check.merge()
    if merged.name.startswith("no-gpu"):
        raise FileNotFoundError(f"{gpu_check.OUT} holds no results of a GPU")
    RESULTS.mkdir(parents=True, exist_ok=True)
    target, n = RESULTS / merged.name, 1
    while target.exists() and not passed(target) <= passed(merged):
        n += 1
        target = RESULTS / f"{merged.stem}-{n}.json"
    return Path(shutil.copy(merged, target))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", action="store_true")
    a = parser.parse_args()
    code = 0
    if not a.publish:
        os.environ["STAGE"] = os.environ.get("STAGE") or "bench"
        code = gpu_check.main()
    if code == 2:                                               # usage: nothing has run
        return code
    try:
        print(f"wrote {publish()}")
    except OSError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
