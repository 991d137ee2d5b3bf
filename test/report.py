#!/usr/bin/env python3
"""Where the time of a CI run went: a table of its stages against their budgets, and the slowest tests.

    python3 test/report.py STAGES.tsv     one line for each stage: seconds, name

DESIGN.md has the budgets, in the table below the heading "The budget of CI".  A stage over its budget is named and
fails nothing: machines differ by a factor of two.  Exit code: 0 printed, 1 a file is missing, 2 usage.
"""
from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "build" / "tests.tsv"
HEADING = "The budget of CI"
N_SLOWEST = 20


@dataclass
class Timed:
    seconds: float
    suite: str
    name: str


def add_tests(times: list[Timed]) -> None:
    """Adds a suite's tests to build/tests.tsv."""
    with TESTS.open("a") as out:
        out.writelines(f"{t.seconds:.3f}\t{t.suite}\t{t.name}\n" for t in times)


def read_tests() -> list[Timed]:
    if not TESTS.exists():
        return []
    rows = (line.split("\t", 2) for line in TESTS.read_text().splitlines())
    return [Timed(float(seconds), suite, name) for seconds, suite, name in rows]


def slowest(times: list[Timed]) -> str:
    """The slowest tests, a line each."""
    chosen = sorted(times, key=lambda t: -t.seconds)[:N_SLOWEST]
    lines = [f"{t.seconds:8.1f} s  {t.suite}: {t.name}" for t in chosen]
    return "\n".join([f"the {len(chosen)} slowest of {len(times)} tests", *lines])


def budgets(design: str) -> dict[str, float]:
    """Minutes of each stage: the rows `| stage | minutes | ... |` below the heading."""
    section = design.partition(f"## {HEADING}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| *([\w ,-]+?) *\| *(\d+(?:\.\d+)?) *\|", section, re.MULTILINE)
    return {name: float(minutes) for name, minutes in rows}


def stage_table(stages: list[tuple[str, float]], limits: dict[str, float]) -> str:
    """Each stage's minutes and budget; all but the last line end with "over" where the budget was passed."""
    lines = [f"{'stage':28} {'minutes':>8} {'budget':>8}"]
    for name, seconds in stages:
        limit = limits.get(name)
        budget = "none" if limit is None else f"{limit:.1f}"
        over = "  over" if limit is not None and seconds > 60 * limit else ""
        lines.append(f"{name:28} {seconds / 60:8.1f} {budget:>8}{over}")
    total = sum(seconds for _, seconds in stages)
    lines.append(f"{'all':28} {total / 60:8.1f} {sum(limits.values()):8.1f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", type=Path, metavar="STAGES.tsv")
    rows = (line.split("\t", 1) for line in parser.parse_args().stages.read_text().splitlines())
    stages = [(name, float(seconds)) for seconds, name in rows]
    print(slowest(read_tests()))
    print()
    print(stage_table(stages, budgets((ROOT / "DESIGN.md").read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
