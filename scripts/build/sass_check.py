#!/usr/bin/env python3
"""The machine code (SASS) of the Hopper kernels, kernels/cuda/*_sm90.cu: what it consists of, and rules that it keeps.
And of the memory-bound ones for the same GPU: whether they read and write 16 bytes at a time.

    make sass-check                                     compiles what has changed, then checks
    scripts/build/sass_check.py [--objects build/release/obj/cuda] [OBJECT ...]

Prints a line per kernel: how often its code holds an instruction (not how often it runs), the registers that setmaxnreg
asks for, and the highest register in use. Every kernel must multiply by wgmma (HGMMA) and move its tiles by
TMA (UTMALDG, and UTMASTG or UTMAREDG); none may use mma.sync (HMMA) or local memory (LDL, STL), which is where ptxas
puts spills and arrays that are indexed at run time. Every kernel of a file whose head says "bound: memory" must have
loads and stores of 128 bits, but for those that NARROW names with the reason, no local memory either, and in bf16 no
conversion of a single number (F2F): pairs take one instruction (F2FP).

cuobjdump and nvdisasm, which it calls, are looked for in CUDA_HOME/bin, beside nvcc, in PATH, and in build/deps/bin,
where scripts/install_deps.sh --disassembler puts them.
Exit code: 0 all rules kept, 1 a rule is broken or an object cannot be read, 2 no disassembler.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("80", "86", "89", "90a", "100")             # that cuda.mk compiles for
COUNTED = ("HGMMA", "UTMALDG", "UTMASTG", "UTMAREDG", "MUFU.EX2", "WARPGROUP.DEPBAR", "R2UR", "SHFL")
REQUIRED = (("HGMMA",), ("UTMALDG",), ("UTMASTG", "UTMAREDG"))  # one of each
FORBIDDEN = {"HMMA": "mma.sync instead of wgmma", "LDL": "a load from local memory", "STL": "a store to local memory"}
LOCAL = ("LDL", "STL")
# Kernels for which 16 bytes at a time would gain nothing, and what they may do without.
NARROW = {
    "grad_norm_chunk_kernel": (("STG",), "writes one number for each chunk"),
    "grad_norm_kernel": (("LDG", "STG"), "joins the chunks' numbers"),
    "layernorm_combine_kernel": (("LDG", "STG"), "joins the chunks' sums, a warp 128 bytes of each at a time"),
    "layernorm_backward_wide_columns_kernel<bf16>": (("LDG",), "a thread has four columns, 8 bytes"),
    "row_sum_kernel": (("LDG", "STG"), "4 bytes per token, of kilobytes that a token takes elsewhere"),
}
NO_DISASSEMBLER = ("cuobjdump and nvdisasm not found; "
                   "scripts/install_deps.sh --disassembler puts them into build/deps/bin")
COMPILED_FOR = re.compile(r"^Fatbin elf code:\n=+\narch = (\w+)", re.MULTILINE)
FUNCTION = re.compile(r"\s+Function : (\S+)")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
REGISTER = re.compile(r"\bR(\d+)\b")


# ---- the kernels' sources, and their names as people write them ----------------------------------------------------

def sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("kernels/cuda/*.cu"))


def is_hopper(source: str) -> bool:
    return source.endswith("_sm90.cu")


def is_memory_bound(source: str) -> bool:
    """By the word of its head."""
    return "bound: memory" in (ROOT / source).read_text()


def architectures(source: str) -> tuple[str, ...]:
    """As cuda.mk compiles it: the Hopper kernels' instructions exist nowhere else."""
    return ("90a",) if is_hopper(source) else ARCHITECTURES


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Name and template arguments, without return type, parameters and the file's anonymous namespace."""
    mangled = sorted(names)
    lines = subprocess.run(["c++filt"], input="\n".join(mangled), text=True, capture_output=True, check=True).stdout
    return {m: short_name(line) for m, line in zip(mangled, lines.splitlines(), strict=True)}


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


# ---- their machine code --------------------------------------------------------------------------------------------

class Unreadable(Exception):
    """An object that is not what cuda.mk makes, or a disassembler that fails on it."""


@dataclass
class Code:
    """Of one kernel, with the functions that were not inlined into it."""
    opcodes: Counter[str] = field(default_factory=Counter)      # with their modifiers: "HGMMA.64x128x16.F32.BF16"
    setmaxnreg: set[int] = field(default_factory=set)
    highest: int = 0                                            # register

    def count(self, instruction: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if f"{opcode}.".startswith(f"{instruction}."))

    def total(self) -> int:
        return self.opcodes.total() - self.count("NOP")         # NOPs fill the end up


@dataclass
class Disassembler:
    cuobjdump: str
    nvdisasm: str

    @classmethod
    def find(cls, nvcc: str | None, folder: Path | None = None) -> Disassembler | None:
        """In `folder` alone, where one is given."""
        home, compiler = os.environ.get("CUDA_HOME"), shutil.which(nvcc) if nvcc else None
        folders = [f"{home}/bin"] if home else []
        folders += [str(Path(compiler).resolve().parent)] if compiler else []
        folders += [os.environ.get("PATH", os.defpath), str(ROOT / "build" / "deps" / "bin")]
        path = str(folder) if folder else os.pathsep.join(folders)
        cuobjdump, nvdisasm = (shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm"))
        return cls(os.path.abspath(cuobjdump), os.path.abspath(nvdisasm)) if cuobjdump and nvdisasm else None

    def listing(self, obj: Path, *flags: str) -> str:
        if not obj.exists():
            raise Unreadable(f"{obj} is missing; build first: make sass-check")
        env = os.environ | {"PATH": os.path.dirname(self.nvdisasm) + os.pathsep + os.environ.get("PATH", os.defpath)}
        command = [self.cuobjdump, "-sass", *flags, str(obj)]
        done = subprocess.run(command, env=env, text=True, errors="replace", capture_output=True)
        if done.returncode != 0:
            raise Unreadable(f"{self.cuobjdump} -sass {obj}: exit {done.returncode}: {done.stderr.strip()}; is it of "
                             "an older CUDA than nvcc? scripts/install_deps.sh --disassembler brings one of CUDA 13")
        return done.stdout


def parse(listing: str) -> dict[str, Code]:
    """Mangled name -> code."""
    found: dict[str, Code] = {}
    code = Code()
    for line in listing.splitlines():
        if m := FUNCTION.match(line):
            found[m.group(1)] = code = Code()
        elif m := INSTRUCTION.match(line):
            opcode, operands = m.groups()
            code.opcodes[opcode] += 1
            code.highest = max(code.highest, highest_register(opcode, operands))
            if opcode.startswith("USETMAXREG"):
                code.setmaxnreg.add(int(operands.split()[-1], 16))
    return found


def highest_register(opcode: str, operands: str) -> int:
    """Several registers in a row are named by their first. Each is written by some instruction, and what an instruction
    writes comes first: the width of that is enough."""
    modifiers = opcode.split(".")[1:]
    n = 4 if {"128", "4"} & set(modifiers) else 2 if {"64", "2", "WIDE"} & set(modifiers) else 1
    if opcode.startswith("HGMMA."):
        n = int(modifiers[0].split("x")[1]) // 2                # fp32 accumulators: 64 x N over 128 threads
    named = [int(register) for register in REGISTER.findall(operands)]
    if m := REGISTER.match(operands.lstrip()):
        named.append(int(m.group(1)) + n - 1)
    return max(named, default=0)


def faults(where: str, name: str, code: Code) -> list[str]:
    out = [f"{where}: {name} has no {' or '.join(one_of)}" for one_of in REQUIRED if not any(map(code.count, one_of))]
    out += [f"{where}: {name} has {n} {instruction}: {what}" for instruction, what in FORBIDDEN.items()
            if (n := code.count(instruction))]
    return out


def cells(code: Code) -> list[str]:
    return [*(str(code.count(i)) for i in COUNTED), "/".join(map(str, sorted(code.setmaxnreg))) or "-",
            str(code.total()), f"R{code.highest}"]


def check(tools: Disassembler, objects: dict[str, Path]) -> tuple[dict[str, Code], list[str]]:
    """Objects by their source's name. Returns kernels by their short names, in order, and what breaks a rule."""
    kernels, bad = {}, []
    for where, obj in objects.items():
        listing = tools.listing(obj)
        if (compiled_for := sorted(COMPILED_FOR.findall(listing))) != ["sm_90a"]:
            raise Unreadable(f"{obj} holds code for {', '.join(compiled_for) or 'nothing'}, expected sm_90a once; "
                             "cuda.mk's rule for *_sm90.cu compiles for that alone")
        if not (found := parse(listing)):
            raise Unreadable(f"{obj} holds no kernel")
        names = demangle(found)
        for mangled in sorted(found, key=lambda m: (names[m], m)):
            kernels[names[mangled]] = found[mangled]
            bad += faults(where, names[mangled], found[mangled])
    return kernels, bad


def check_memory_bound(tools: Disassembler, objects: dict[str, Path]) -> tuple[dict[str, Code], list[str]]:
    """Returns kernels by their short names, in order, and what breaks a rule."""
    kernels: dict[str, Code] = {}
    bad = []
    for where, obj in objects.items():
        found = parse(tools.listing(obj, "-arch", "sm_90a"))
        if not found:
            raise Unreadable(f"{obj} holds no kernel for sm_90a; make native builds it for that, too")
        names = demangle(found)
        for mangled in sorted(found, key=lambda m: (names[m], m)):
            name, opcodes = names[mangled], found[mangled].opcodes
            narrow = NARROW.get(name, ((), ""))[0]
            wide = {i for i in ("LDG", "STG") if any(o.startswith(i) and ".128" in o for o in opcodes)}  # also LDGSTS
            bad += [f"{where}: {name} has no {i} of 128 bits" for i in ("LDG", "STG") if i not in wide | set(narrow)]
            bad += [f"{where}: {name} has {i} of 128 bits, which NARROW says it has not" for i in narrow if i in wide]
            bad += [f"{where}: {name} has {k} {i}: {FORBIDDEN[i]}" for i in LOCAL if (k := found[mangled].count(i))]
            if "<bf16" in name and (k := found[mangled].count("F2F")):
                bad.append(f"{where}: {name} has {k} F2F: rounds to bf16 one by one, not in pairs")
            kernels[name] = found[mangled]
    return kernels, bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objects", nargs="*", type=Path, metavar="OBJECT", help="instead of those of *_sm90.cu")
    parser.add_argument("--objects", dest="folder", type=Path, default=ROOT / "build/release/obj/cuda",
                        help="folder where the build left them")
    parser.add_argument("--nvcc", default=os.environ.get("NVCC") or "nvcc", help="the disassembler may lie beside it")
    parser.add_argument("--disassembler", type=Path, help="folder of cuobjdump and nvdisasm")
    args = parser.parse_args()
    objects = {str(obj): obj for obj in args.objects} or {
        source: args.folder / Path(source).with_suffix(".o") for source in sources() if is_hopper(source)}
    if not (tools := Disassembler.find(args.nvcc, args.disassembler)):
        print(NO_DISASSEMBLER, file=sys.stderr)
        return 2
    wide = {} if args.objects else {s: args.folder / Path(s).with_suffix(".o") for s in sources() if is_memory_bound(s)}
    try:
        kernels, bad = check(tools, objects)
        memory_bound, broken = check_memory_bound(tools, wide)
    except Unreadable as e:
        print(e, file=sys.stderr)
        return 1
    for name, code in kernels.items():
        words = (*COUNTED, "setmaxnreg", "instructions", "highest register")
        print(f"{name}: " + ", ".join(f"{word} {cell}" for word, cell in zip(words, cells(code), strict=True)))
    bad += broken
    print("\n".join(bad), end="\n" if bad else "")
    others = f" for Hopper, {len(memory_bound)} memory-bound" if wide else ""
    print(f"{len(kernels)} kernels{others}, {len(bad)} broken rules")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
