#!/usr/bin/env python3
"""Compares the PTX of kiln's wrappers with that of CUTLASS's for the same instructions (instructions.cu).

    instructions.py KILN.ptx CUTLASS.ptx

Each operand is followed back to the kernel's parameter that it comes from, so that exchanged operands show.
"""
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ENTRY = re.compile(r"\.visible \.entry (\w+)\(")
REGISTER = re.compile(r"%(?!tid|ctaid|%)\w+")
MMA = re.compile(r"(.*?\{)([^{}]*)(\}.*)")
STATEMENT = re.compile(r"(?:@!?%\w+ )?([\w.:]+)\s+(.*)")
IGNORED = (".reg", "ret", "bra", ".param", ".loc", ".file")


def statements(body: str) -> Iterator[tuple[bool, str]]:
    """(is inline asm, text) in order."""
    block: list[str] | None = None
    for line in body.splitlines():
        if "begin inline asm" in line:
            block = []
        elif "end inline asm" in line:
            assert block is not None
            yield True, re.sub(r"\s+", " ", " ".join(block))
            block = None
        elif block is not None:
            block.append(line.split("//")[0].strip())
        else:
            for statement in line.split("//")[0].split(";"):
                if statement.strip():
                    yield False, statement.strip()


class Kernel:
    """The instructions of one kernel, with the origins of their operands in the place of registers."""

    def __init__(self, name: str, body: str) -> None:
        self.name = name
        self.value: dict[str, str] = {}  # of a register: where it comes from
        self.text: list[str] = []
        self.n_results = 0
        for is_asm, text in statements(body):
            if is_asm:
                self.add_asm(re.sub(r"\.reg \.\w+ [^;]*;", "", text))
            elif text.startswith("st."):
                self.text.append(REGISTER.sub(lambda r: f"<{self.value.get(r.group(0), r.group(0))}>", text))
            else:
                self.follow(text)

    def origin(self, register: re.Match[str]) -> str:
        name = register.group(0)
        if name not in self.value:  # a result of this instruction
            self.value[name] = f"RESULT{self.n_results}"
            self.n_results += 1
        return f"<{self.value[name]}>"

    def add_asm(self, text: str) -> None:
        if "mma.sync" not in text:
            self.text.append(REGISTER.sub(self.origin, text))
            return
        # Results may lie in registers of their own, or in those of c.
        match = MMA.match(text.strip("{ }"))
        assert match
        head, results, rest = match.groups()
        rest = REGISTER.sub(self.origin, rest)
        registers = REGISTER.findall(results)
        for i, register in enumerate(registers):
            self.value[register] = f"D{i}"
        self.text.append(head + ",".join(f"<D{i}>" for i in range(len(registers))) + rest)

    def follow(self, text: str) -> None:
        match = STATEMENT.match(text)
        if not match or match.group(1).startswith(IGNORED):
            return
        operation, operands = match.groups()
        operands = operands.replace(f"{self.name}_param_", "param")
        vector = re.match(r"\{([^}]*)\}\s*,\s*(.*)", operands)
        if vector:
            results, rest = [r.strip() for r in vector.group(1).split(",")], vector.group(2)
        else:
            first, _, rest = operands.partition(",")
            results, rest = [first.strip()], rest.strip()
        rest = REGISTER.sub(lambda r: self.value.get(r.group(0), r.group(0)), rest)
        is_plain = operation.startswith(("ld.param", "mov.")) and not vector
        for i, register in enumerate(results):
            self.value[register] = rest if is_plain else f"{operation}({rest})" + (f".{i}" if vector else "")


def kernels(path: str) -> dict[str, Kernel]:
    pieces = ENTRY.split(Path(path).read_text())
    return {name: Kernel(name, body) for name, body in zip(pieces[1::2], pieces[2::2], strict=True)}


def normal(text: str) -> str:
    """Without that which may differ: blanks, names of predicates, a load's cache hint, cta for cluster of one block."""
    text = text.replace(".L2::cache_hint", "").replace(".L2::128B", "")
    text = re.sub(r"tensor\.(\d)d\.shared::(cta|cluster)\.global", r"tensor.\1d.shared::cluster.global", text)
    text = re.sub(r"\s+", "", text)
    text = text.replace("%%", "").replace("P1", "p").replace("selp.b32", "selp.u32")
    text = re.sub(r"aligned\.(x\d)((?:\.trans)?)\.m8n8", r"aligned.m8n8.\1\2", text)
    text = text.strip("{}").replace(";}", ";").rstrip(";")
    return text.removesuffix(",<77>")  # the hint that instructions.cu gives


def text_of(kernel: Kernel | None) -> list[str]:
    if kernel is None:
        return []
    text = [t for t in map(normal, kernel.text) if t]
    if kernel.name == "elect":  # CUTLASS moves the predicate into a register in another way
        return sorted({"elect.sync" for t in text if "elect.sync" in t})
    return text


def main() -> int:
    kiln, cutlass = kernels(sys.argv[1]), kernels(sys.argv[2])
    n_wrong = 0
    for name in sorted(kiln | cutlass):
        ours, theirs = text_of(kiln.get(name)), text_of(cutlass.get(name))
        if ours == theirs and ours:
            print(f"PASS  PTX of {name}")
            continue
        n_wrong += 1
        print(f"FAIL  PTX of {name}")
        for side, text in (("kiln", ours), ("CUTLASS", theirs)):
            for line in text:
                print(f"      {side:8}{line[:700]}")
    print(f"{len(kiln)} instructions' text, {n_wrong} wrong")
    return int(n_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
