#!/usr/bin/env python3
"""Runs every test suite, names the slowest tests, and closes with one line: N passed, N failed (, N skipped).

Suites: the C++ tests (every op on the CPU and on the emulated GPU), the emulator's own, both again with the race check,
the communication tests on 1 to 5 ranks (under sanitizers 1 to 4, unless KILN_TEST_FULL=1) and with another NCCL on 3,
and the system tests that run ./train and ./train-emulated.
The seconds of every test are added to build/tests.tsv, which test/report.py reads.
"""
import argparse
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from report import Timed, add_tests, slowest

DOCTEST = re.compile(r"test cases:\s*\d+ \|\s*(\d+) passed \|\s*(\d+) failed")
DOCTEST_SECONDS = re.compile(r"^(\d+\.\d+) s: (.+)$", re.MULTILINE)
PYTEST = re.compile(r"(\d+) (passed|failed|error|errors|skipped)\b")
CORES = len(os.sched_getaffinity(0))
TIMEOUT_S = 1500  # of one suite: a hang is a failure


def run(command: list[str]) -> tuple[int, str]:
    """Runs a command, shows what it printed when it has ended, and returns its exit code and output."""
    env = dict(os.environ, ASAN_OPTIONS=os.environ.get("ASAN_OPTIONS", "detect_leaks=0"))  # MPI and oneDNN keep memory
    env["OMP_WAIT_POLICY"] = "passive"  # threads that wait must sleep: two suites share the cores
    if "-np" in command:
        env["OMP_NUM_THREADS"] = "1"  # ranks alone are more than the cores
    print(f"running {' '.join(command)}", flush=True)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                              env=env, timeout=TIMEOUT_S)
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as e:
        text = e.stdout or b""
        printed = text if isinstance(text, str) else text.decode(errors="replace")
        code, output = 124, f"{printed}\nno end after {TIMEOUT_S} s\n"
    print(f"$ {' '.join(command)}\n{output}", end="", flush=True)
    return code, output


def count(code: int, output: str, is_pytest: bool) -> tuple[int, int, int]:
    """(passed, failed, skipped) of a suite.  A suite that ends badly without a failed test counts as one failure."""
    if is_pytest:
        found = {kind: int(n) for n, kind in PYTEST.findall(output.strip().splitlines()[-1] if output.strip() else "")}
        passed, skipped = found.get("passed", 0), found.get("skipped", 0)
        failed = found.get("failed", 0) + found.get("error", 0) + found.get("errors", 0)
    else:
        matches = DOCTEST.findall(output)
        passed, failed = (int(x) for x in matches[0]) if matches else (0, 0)
        skipped = 0  # doctest counts the tests that the filters leave to another suite
    if (code != 0 and failed == 0) or passed + failed == 0:
        failed += 1
    return passed, failed, skipped


def doctest_times(suite: str, output: str) -> list[Timed]:
    """The tests of a C++ suite; of several ranks, the first prints its times."""
    return [Timed(float(seconds), suite, name) for seconds, name in DOCTEST_SECONDS.findall(output)]


def pytest_times(report: Path) -> list[Timed]:
    """The tests of a JUnit report; none where pytest ended before it wrote one."""
    if not report.exists():
        return []
    cases = ElementTree.parse(report).iter("testcase")
    return [Timed(float(c.get("time", 0)), str(c.get("classname")), str(c.get("name"))) for c in cases]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", default="build/release")
    parser.add_argument("--mpirun", default="mpirun")
    parser.add_argument("--race", help="folder of the binaries with the race check")
    parser.add_argument("--no-system", action="store_true", help="C++ tests only")
    args = parser.parse_args()
    binaries = [f"{args.build}/test", f"{args.build}/test_emulator"]
    if args.race:
        binaries += [f"{args.race}/test_race", f"{args.race}/test_emulator"]
    suites = []  # each keeps about one core busy
    for binary in binaries:
        long = not binary.endswith("test_emulator")
        suites += [[binary, f"-{flag}=*test/kernels/*"] for flag in ("sf", "sfe")] if long else [[binary]]
    # 5 ranks take the same paths through the code as 3.  Without the race check the build is that of sanitizers, slow.
    most_ranks = 5 if args.race or os.environ.get("KILN_TEST_FULL") == "1" else 4
    suites += [[args.mpirun, "-np", str(n), f"{args.build}/test_mpi"] for n in range(1, most_ranks + 1)]
    if args.race:  # NCCL's calls as of version 2.31: with three ranks the order of a sum shows
        suites.append([args.mpirun, "-np", "3", f"{args.build}/test_mpi_nccl231"])
    with ThreadPoolExecutor(CORES) as pool:
        done = list(pool.map(lambda suite: run([*suite, "--duration=true"]), suites))
    results = [(*result, False) for result in done]
    times = [t for suite, (_, output) in zip(suites, done, strict=True)
             for t in doctest_times(" ".join(suite[-3:]), output)]
    if not args.no_system:
        os.environ["MPIRUN"] = args.mpirun
        pytest = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "test/system"]
        # A file's tests stay together: they may share what the first of them has made.
        parallel = ["-n", str(CORES), "--dist", "loadfile", "-m", "not alone"]
        for name, options in (("parallel", parallel), ("alone", ["-m", "alone"])):
            report = Path("build") / f"pytest-{name}.xml"
            report.unlink(missing_ok=True)
            results.append((*run([*pytest, *options, f"--junitxml={report}"]), True))
            times += pytest_times(report)
    add_tests(times)
    print(slowest(times))
    totals = [sum(column) for column in zip(*(count(*result) for result in results), strict=True)]
    print(f"{totals[0]} passed, {totals[1]} failed" + (f", {totals[2]} skipped" if totals[2] else ""))
    return 1 if totals[1] else 0


if __name__ == "__main__":
    sys.exit(main())
