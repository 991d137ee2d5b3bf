#!/usr/bin/env python3
"""Runs every test suite and closes with one line: N passed, N failed (, N skipped).

Suites: the C++ tests (every op on the CPU and on the emulated GPU), the emulator's own, both again with the race check,
the communication tests on 1 to 5 ranks, and the system tests that run ./train and ./train-emulated.
"""
import argparse
import os
import re
import subprocess
import sys

DOCTEST = re.compile(r"test cases:\s*\d+ \|\s*(\d+) passed \|\s*(\d+) failed(?: \|\s*(\d+) skipped)?")
PYTEST = re.compile(r"(\d+) (passed|failed|error|errors|skipped)\b")


def run(command: list[str]) -> tuple[int, str]:
    """Runs a command, shows what it prints as it comes, and returns its exit code and output."""
    print(f"$ {' '.join(command)}", flush=True)
    env = dict(os.environ, ASAN_OPTIONS=os.environ.get("ASAN_OPTIONS", "detect_leaks=0"))  # MPI and oneDNN keep memory
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env)
    assert process.stdout
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def count(code: int, output: str, is_pytest: bool) -> tuple[int, int, int]:
    """(passed, failed, skipped) of a suite.  A suite that ends badly without a failed test counts as one failure."""
    if is_pytest:
        found = {kind: int(n) for n, kind in PYTEST.findall(output.strip().splitlines()[-1] if output.strip() else "")}
        passed, skipped = found.get("passed", 0), found.get("skipped", 0)
        failed = found.get("failed", 0) + found.get("error", 0) + found.get("errors", 0)
    else:
        matches = DOCTEST.findall(output)
        passed, failed, skipped = (int(x or 0) for x in matches[0]) if matches else (0, 0, 0)
    if code != 0 and failed == 0 or passed + failed == 0:
        failed += 1
    return passed, failed, skipped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", default="build/release")
    parser.add_argument("--mpirun", default="mpirun")
    parser.add_argument("--race", help="folder of the binaries with the race check")
    parser.add_argument("--no-system", action="store_true", help="C++ tests only")
    args = parser.parse_args()
    binaries = [f"{args.build}/test", f"{args.build}/test_emulator"]
    if args.race:
        binaries += [f"{args.race}/test_emulator", f"{args.race}/test_race"]
    suites: list[tuple[list[str], bool]] = [([binary], False) for binary in binaries]
    suites += [([args.mpirun, "-np", str(n), f"{args.build}/test_mpi"], False) for n in range(1, 6)]
    if not args.no_system:
        os.environ["MPIRUN"] = args.mpirun
        suites.append(([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", "test/system"], True))
    totals = [0, 0, 0]
    for command, is_pytest in suites:
        for i, n in enumerate(count(*run(command), is_pytest)):
            totals[i] += n
    print(f"{totals[0]} passed, {totals[1]} failed" + (f", {totals[2]} skipped" if totals[2] else ""))
    return 1 if totals[1] else 0


if __name__ == "__main__":
    sys.exit(main())
