#!/usr/bin/env python3
"""The tests that a change needs, by dependency: lint, and the tests of the files that differ from HEAD.

    make quick                 builds what differs and runs its tests; a clean tree takes the last commit's files
    python3 test/quick.py --list     names the tests only

A test file belongs to a changed file when it is that file, when it includes it (by the compiler's dependency files), or
when it carries its name: kernels/cuda/layernorm.cu has test_layernorm.cpp, attention_sm90_forward.cuh has
test_attention_sm90.cpp and test_attention.cpp.  Every kernel also has test_traffic.cpp.  A system test belongs to the
scripts that it names.  Exit code: 0 all passed, 1 a test failed, 2 the build failed.
"""
from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (".h", ".cuh", ".cpp", ".cu")
CORES = len(os.sched_getaffinity(0))


def git(*words: str) -> list[str]:
    done = subprocess.run(["git", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.split()


def changed_files() -> list[str]:
    files = git("diff", "--name-only", "HEAD") + git("ls-files", "--others", "--exclude-standard")
    return files or git("diff", "--name-only", "HEAD~1", "HEAD")


def including(build: Path, changed: set[str]) -> set[str]:
    """The test files whose objects were made from a changed file."""
    found = set()
    for rule in build.glob("obj/**/*.d"):
        made_from = re.findall(r"[\w./-]+", rule.read_text().partition(":")[2])
        if made_from and Path(made_from[0]).name.startswith("test_") and changed.intersection(made_from):
            found.add(made_from[0])
    return found


def named(file: str) -> list[str]:
    """Stems that a test of this file may carry: "attention_sm90_forward", "attention_sm90", "attention"."""
    parts = Path(file).stem.split("_")
    return ["_".join(parts[:n]) for n in range(len(parts), 0, -1)]


def tests_of(changed: list[str], build: Path) -> tuple[list[str], list[str]]:
    """(C++ test files, system test files)."""
    all_tests = git("ls-files", "test/*.cpp", "emulator/test/*.cpp", "emulator/test/*.cu")
    system = git("ls-files", "test/system/test_*.py")
    chosen = including(build, set(changed))
    chosen_system = {f for f in changed if f in system}
    for file in changed:
        if file.endswith(SOURCES):
            chosen |= {t for t in all_tests if Path(t).stem in {f"test_{stem}" for stem in named(file)}}
        if file.startswith("kernels/cuda/"):
            chosen.add("test/kernels/test_traffic.cpp")
        if file.endswith((".py", ".sh", ".mk", "Makefile")):
            chosen_system |= {t for t in system if Path(file).name in (ROOT / t).read_text()}
    return sorted(chosen), sorted(chosen_system)


def run(command: list[str]) -> bool:
    print(f"$ {' '.join(command)}", flush=True)
    return subprocess.run(command, cwd=ROOT).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/release"), help="folder of the variant's programs")
    parser.add_argument("--list", action="store_true", help="name the tests only")
    args = parser.parse_args()
    changed = changed_files()
    tests, system = tests_of(changed, ROOT / args.build)
    print(f"changed: {', '.join(changed)}\ntests: {', '.join(tests + system) or 'none'}", flush=True)
    if args.list:
        return 0
    binaries = {f"{args.build}/test": [t for t in tests if t.startswith("test/") and "/mpi/" not in t],
                f"{args.build}/test_emulator": [t for t in tests if t.startswith("emulator/test/")]}
    programs = [binary for binary, files in binaries.items() if files]
    if system or any(f.startswith(("run/", "train.cu")) for f in changed):
        programs += ["all", "emulated", f"{args.build}/test"]
    if not run(["make", "--no-print-directory", "DEPS=0", f"-j{CORES}", "lint", *programs]):
        return 2
    passed = True
    for binary, files in binaries.items():
        if files:
            passed &= run([binary, f"--source-file={','.join('*' + f for f in files)}"])
    if system:
        passed &= run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(CORES), *system])
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
