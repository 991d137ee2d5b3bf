#!/usr/bin/env python3
"""Writes docs/kernels.md: registers, shared memory, stack and spills of each CUDA kernel.

    make kernel-table                 compiles what has changed, then rewrites docs/kernels.md
    make kernel-table-check           fails, showing the difference, where the committed table is out of date
    scripts/build/kernel_table.py [--check] [--logs build/release/obj/cuda]

The script reads the output of `ptxas -v`, which the build keeps beside every object (*.o.ptxas); without --logs it
compiles the files, which takes minutes. A spill, a stack frame or a wgmma that ptxas has serialized always fails, with
or without --check. Another nvcc gives other numbers: then the table is not compared, and only these faults fail. The
Hopper kernels' instructions are counted where a disassembler is at hand (sass_check.py).
Exit code: 0 written, or as committed; 1 a fault, a difference, or a file that is missing or does not compile; 2 usage.
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
from dataclasses import dataclass
from pathlib import Path

import sass_check
from sass_check import ROOT, architectures, demangle, is_hopper, sources

TABLE = ROOT / "docs" / "kernels.md"
COMPILING = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
PROPERTIES = re.compile(r"Function properties for (\S+)")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
HEAD = """\
# Kernels

This file lists each kernel as `ptxas` of nvcc {version} reports it. `make kernel-table` rewrites the file;
`make kernel-table-check` compares it with the build. Registers are per thread and architecture. Static shared memory,
stack and spills are in bytes, one number where all architectures agree. Dynamic shared memory is chosen at launch and
not listed. A spill or a stack frame fails the check.
"""
LOSS = re.compile(r"Potential Performance Loss.*|.*setmaxnreg'? ignored.*")
HOPPER = """\
Compiled for compute capability 9.0a alone. A thread starts with these registers; setmaxnreg moves them between
warpgroups afterwards.
"""
INSTRUCTIONS = "## Instructions of the Hopper kernels"
INSTRUCTIONS_HEAD = """\
Counts of instructions in the code of `kernels/cuda/*_sm90.cu`, as `nvdisasm` shows it; an instruction in a loop counts
once. HGMMA is wgmma, and WARPGROUP.DEPBAR waits for wgmma. UTMALDG, UTMASTG and UTMAREDG are TMA's load, store and
addition. R2UR moves an address or a descriptor to a uniform register. setmaxnreg: the registers that warpgroups
request. highest: the last register in use. all: instructions without NOPs. `scripts/build/sass_check.py` has the rules
for these kernels.
"""
MEMORY_BOUND = ("LDG", "STG", "MUFU", "F2FP", "F2F", "PRMT")
MEMORY_BOUND_HEAD = """\
## Instructions of the memory-bound kernels in bf16

Of compute capability 9.0, counted likewise. MUFU is ex2, lg2, a reciprocal or a root; F2FP packs two numbers into a
pair of bf16; F2F would convert one number; PRMT picks bytes, as unpacking without a mask does.
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


def nvcc_version(nvcc: str) -> str:
    out = subprocess.run([nvcc, "--version"], text=True, capture_output=True, check=True).stdout
    version: str = re.findall(r"V(\d+\.\d+)", out)[0]
    return version


def compile_all(nvcc: str, folder: Path) -> None:
    """As the build compiles them, objects and logs where the build would have them."""
    for source in sources():
        obj = folder / Path(source).with_suffix(".o")
        obj.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-std=c++20", "-O3", "-lineinfo", "-I.", "-DKILN_CUDA=1", "-DFMT_USE_CONSTEXPR=1", "-DNDEBUG",
                   "-Xcompiler", "-Wall,-fopenmp", "-Xptxas", "-v", "-c", source, "-o", str(obj)]
        for a in architectures(source):
            command += ["-gencode", f"arch=compute_{a},code=sm_{a}"]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
        if done.returncode != 0:
            sys.exit(f"{source}: does not compile\n{done.stderr}")
        Path(f"{obj}.ptxas").write_text(done.stdout + done.stderr)


def collect(logs: Path) -> tuple[dict[str, Uses], list[str]]:
    """Source file -> its kernels, and what ptxas only informs of but must not be."""
    found, bad = {}, []
    for source in sources():
        path = logs / Path(source).with_suffix(".o.ptxas")
        if not path.exists():
            sys.exit(f"{path} is missing; build first: make kernel-table")
        text = path.read_text()
        found[source] = parse(text)
        bad += [f"{source}: {loss}" for loss in LOSS.findall(text)]
    return found, bad


def same_or_each(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "/".join(map(str, values))


def table(kernels: dict[str, Uses], version: str) -> str:
    lines = [HEAD.format(version=version)]
    for source, uses in kernels.items():
        if not uses:
            continue
        compiled_for = architectures(source)
        lines += [f"## {source}", "", *([HOPPER] if is_hopper(source) else []),
                  "| kernel | " + " | ".join(f"sm_{a}" for a in compiled_for) + " | shared | stack | spilled |",
                  "|---|" + "--:|" * (len(compiled_for) + 3)]
        names = demangle(uses)
        for mangled in sorted(uses, key=lambda m: (names[m], m)):
            by_arch = uses[mangled]
            there = [by_arch[a] for a in compiled_for if a in by_arch]
            registers = [str(by_arch[a].registers or "inlined") if a in by_arch else "-" for a in compiled_for]
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
        for a in architectures(source) if uses else ():
            if not any(a in by_arch for by_arch in uses.values()):
                out.append(f"{source}: not compiled for sm_{a}; build with the Makefile's own ARCH")
    return out


def instructions(tools: sass_check.Disassembler, objects: dict[str, Path],
                 memory_bound: dict[str, Path]) -> tuple[str, list[str]]:
    """The tables of instructions, and the rules that kernels break."""
    codes, bad = sass_check.check(tools, objects)
    columns = (*sass_check.COUNTED, "setmaxnreg", "all", "highest")
    lines = ["", INSTRUCTIONS, "", INSTRUCTIONS_HEAD, "| kernel | " + " | ".join(columns) + " |",
             "|---|" + "--:|" * len(columns)]
    lines += [f"| `{name}` | " + " | ".join(sass_check.cells(code)) + " |" for name, code in codes.items()]
    others, broken = sass_check.check_memory_bound(tools, memory_bound)
    if not others:
        return "\n".join([*lines, ""]), bad
    lines += ["", MEMORY_BOUND_HEAD, "| kernel | " + " | ".join(MEMORY_BOUND) + " | all | highest |",
              "|---|" + "--:|" * (len(MEMORY_BOUND) + 2)]
    lines += [f"| `{name}` | " + " | ".join(str(code.count(i)) for i in MEMORY_BOUND)
              + f" | {code.total()} | R{code.highest} |" for name, code in others.items() if "<bf16" in name]
    return "\n".join([*lines, ""]), bad + broken


def report(args: argparse.Namespace, logs: Path) -> int:
    version = nvcc_version(args.nvcc)
    kernels, bad = collect(logs)
    bad += faults(kernels)
    committed = args.table.read_text() if args.table.exists() else ""
    text, n = table(kernels, version), sum(len(uses) for uses in kernels.values())
    hopper = {source: logs / Path(source).with_suffix(".o") for source, uses in kernels.items()
              if uses and is_hopper(source)}
    tools = sass_check.Disassembler.find(args.nvcc, args.disassembler)
    if hopper and tools:
        try:
            wide = {source: obj for source, uses in kernels.items() if uses and sass_check.is_memory_bound(source)
                    and (obj := logs / Path(source).with_suffix(".o")).exists()}
            counts, broken = instructions(tools, hopper, wide)
        except sass_check.Unreadable as e:
            sys.exit(str(e))
        text += counts
        bad += broken
    elif hopper:                                                # what was counted elsewhere stays
        print(f"the Hopper kernels' instructions are not checked: {sass_check.NO_DISASSEMBLER}")
        text += committed[committed.index(f"\n{INSTRUCTIONS}"):] if INSTRUCTIONS in committed else ""
    print("\n".join(bad), end="\n" if bad else "")
    if not args.check:
        args.table.write_text(text)
        print(f"{args.table}: {n} kernels of nvcc {version}")
        return 1 if bad else 0
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with docs/kernels.md instead of writing it")
    parser.add_argument("--logs", type=Path, help="folder of the objects and *.o.ptxas files that the build left")
    parser.add_argument("--nvcc", default=os.environ.get("NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    parser.add_argument("--disassembler", type=Path, help="folder of cuobjdump and nvdisasm; looked for otherwise")
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args(argv)
    if args.logs is not None:
        return report(args, args.logs)
    with tempfile.TemporaryDirectory() as folder:
        compile_all(args.nvcc, Path(folder))
        return report(args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
