#!/usr/bin/env python3
"""What each CUDA kernel takes of a multiprocessor: registers, shared memory, stack, spills; docs/kernels.md holds it.

    make kernel-table                 compiles what has changed, then rewrites docs/kernels.md
    make kernel-table-check           fails, showing the difference, where the committed table is out of date
    scripts/kernel_table.py [--check] [--logs build/release/obj/cuda]

The source is what `ptxas -v` says of each kernel and architecture. The build keeps it beside every object (*.o.ptxas);
without --logs the files are compiled here, which takes minutes. A spill or a stack frame fails always, --check or not.
Another nvcc gives other numbers: with one the table is not compared, only spills and stack frames fail.
"""
from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "kernels.md"
ARCHITECTURES = ("80", "86", "89", "90a", "100")
COMPILING = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
PROPERTIES = re.compile(r"Function properties for (\S+)")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
HEAD = """\
# Kernels

What `ptxas` of nvcc {version} reports for each kernel; `make kernel-table` rewrites this file and
`make kernel-table-check` compares it. Registers are per thread and architecture; static shared memory, stack and spills
are in bytes, one number where all architectures agree; dynamic shared memory is chosen at launch and not here. A spill
or a stack frame fails the check.
"""


@dataclass
class Use:
    """Of one kernel on one architecture."""
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0


Uses = dict[str, dict[str, Use]]                                # mangled name -> architecture -> use


def parse(log: str) -> Uses:
    """ptxas -v prints an entry function's name and architecture, its stack and spills, then its registers. A function
    that was not inlined has no registers of its own, but can spill."""
    uses: Uses = {}
    architecture, now = "", Use()
    for line in log.splitlines():
        if m := COMPILING.search(line):
            architecture = m.group(2)
            uses.setdefault(m.group(1), {})[architecture] = now = Use()
        elif m := PROPERTIES.search(line):
            now = uses.setdefault(m.group(1), {}).setdefault(architecture, Use())
        elif m := STACK.search(line):
            now.stack, now.spill_stores, now.spill_loads = (int(x) for x in m.groups())
        elif m := USED.search(line):
            now.registers = int(m.group(1))
            now.shared = int(shared.group(1)) if (shared := SHARED.search(line)) else 0
    return uses


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Name and template arguments, without return type, parameters and the file's anonymous namespace."""
    mangled = sorted(names)
    lines = subprocess.run(["c++filt"], input="\n".join(mangled), text=True, capture_output=True, check=True).stdout
    return {m: short_name(line) for m, line in zip(mangled, lines.splitlines())}


def short_name(demangled: str) -> str:
    name = demangled
    if name.endswith(")"):                                      # the parameters: the last group of brackets
        depth = 0
        for at in range(len(name) - 1, -1, -1):
            depth += {")": 1, "(": -1}.get(name[at], 0)
            if depth == 0:
                name = name[:at]
                break
    name = name.replace("(anonymous namespace)::", "")
    return re.sub(r"^(void|\w+) (?=\w)", "", name)


def nvcc_version(nvcc: str) -> str:
    out = subprocess.run([nvcc, "--version"], text=True, capture_output=True, check=True).stdout
    return re.search(r"V(\d+\.\d+)", out).group(1)              # type: ignore[union-attr]


def compile_log(nvcc: str, source: Path) -> str:
    """As the build compiles it, to an object that is thrown away."""
    with tempfile.TemporaryDirectory() as tmp:
        command = [nvcc, "-std=c++20", "-O3", "-lineinfo", "-I.", "-DKILN_CUDA=1", "-DFMT_USE_CONSTEXPR=1", "-DNDEBUG",
                   "-Xcompiler", "-Wall,-fopenmp", "-Xptxas", "-v", "-c", str(source), "-o", f"{tmp}/o"]
        for a in ARCHITECTURES:
            command += ["-gencode", f"arch=compute_{a},code=sm_{a}"]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"{source}: does not compile\n{done.stderr}")
    return done.stdout + done.stderr


def collect(nvcc: str, logs: Path | None) -> dict[str, Uses]:
    """Source file -> its kernels."""
    found = {}
    for source in sorted(ROOT.glob("kernels/cuda/*.cu")):
        name = str(source.relative_to(ROOT))
        if logs is None:
            text = compile_log(nvcc, source)
        else:
            path = logs / Path(name).with_suffix(".o.ptxas")
            if not path.exists():
                sys.exit(f"{path} is missing; build first: make kernel-table")
            text = path.read_text()
        found[name] = parse(text)
    return found


def same_or_each(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "/".join(map(str, values))


def table(kernels: dict[str, Uses], version: str) -> str:
    lines = [HEAD.format(version=version)]
    for source, uses in kernels.items():
        if not uses:
            continue
        lines += [f"## {source}", "", "| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) +
                  " | shared | stack | spilled |", "|---|" + "--:|" * (len(ARCHITECTURES) + 3)]
        names = demangle(uses)
        for mangled in sorted(uses, key=lambda m: (names[m], m)):
            by_arch = uses[mangled]
            there = [by_arch[a] for a in ARCHITECTURES if a in by_arch]
            registers = [str(by_arch[a].registers or "inlined") if a in by_arch else "-" for a in ARCHITECTURES]
            lines.append(f"| `{names[mangled]}` | " + " | ".join(registers) +
                         f" | {same_or_each([u.shared for u in there])} | {same_or_each([u.stack for u in there])}"
                         f" | {same_or_each([u.spill_stores + u.spill_loads for u in there])} |")
        lines.append("")
    return "\n".join(lines)


def faults(kernels: dict[str, Uses]) -> list[str]:
    out = []
    for source, uses in kernels.items():
        names = demangle(uses)
        for mangled, by_arch in uses.items():
            for a, u in by_arch.items():
                if u.stack or u.spill_stores or u.spill_loads:
                    out.append(f"{source}: {names[mangled]} on sm_{a}: {u.stack} bytes of stack, "
                               f"{u.spill_stores} of spill stores, {u.spill_loads} of spill loads")
        for a in ARCHITECTURES if uses else ():
            if not any(a in by_arch for by_arch in uses.values()):
                out.append(f"{source}: not compiled for sm_{a}; build with the Makefile's own ARCH")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with docs/kernels.md instead of writing it")
    parser.add_argument("--logs", type=Path, help="folder of the *.o.ptxas files that the build left")
    parser.add_argument("--nvcc", default=os.environ.get("NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    version = nvcc_version(args.nvcc)
    kernels = collect(args.nvcc, args.logs)
    bad = faults(kernels)
    print("\n".join(bad), end="\n" if bad else "")
    text = table(kernels, version)
    n = sum(len(uses) for uses in kernels.values())
    if not args.check:
        args.table.write_text(text)
        print(f"{args.table}: {n} kernels of nvcc {version}")
        return 1 if bad else 0
    committed = args.table.read_text() if args.table.exists() else ""
    if f"nvcc {version} " not in committed and committed:
        print(f"{args.table} is of another nvcc than {version}: not compared")
        return 1 if bad else 0
    lines = difflib.unified_diff(committed.splitlines(), text.splitlines(), "committed", "now", lineterm="")
    if difference := "\n".join(lines):
        print(difference)
        print(f"{args.table} is out of date; make kernel-table rewrites it")
        return 1
    print(f"{args.table}: {n} kernels, as committed" + ("" if bad else "; no spill, no stack frame"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
