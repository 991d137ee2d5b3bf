#!/usr/bin/env python3
"""The wgmma instructions (HGMMA) in machine code: which, with which modifiers and descriptors.

    products.py KILN.cubin CUTE.cubin ATTENTION.o

The first two are products.cu by kiln and by CuTe: kernel by kernel, every HGMMA and every descriptor must be the same.
The third is kiln's attention kernels: each of their HGMMAs must be one of CuTe's products, by shape, operands in
registers or not, transposes, and every bit of the descriptor but the address, of which the place in the swizzle's
pattern of 1024 bytes must be one of CuTe's steps.

cuobjdump and nvdisasm are looked for as scripts/build/sass_check.py does; without them nothing is compared, which
counts as skipped.

The registers' bits are followed through the code, each as 0, 1 or unknown.  An address that depends on a loop leaves
its high bits unknown; the others stay known.
"""
from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts" / "build"))
from sass_check import NO_DISASSEMBLER, Disassembler

FUNCTION = re.compile(r"\s+Function : (\S+)")
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P\w+) )?([A-Z][\w.]*)\s*([^;]*);")
PREDICATE = re.compile(r"U?P\d")
WORD = (1 << 32) - 1


@dataclass(frozen=True)
class Bits:
    """A number of 32 bits, of which those of `known` are known."""
    known: int
    value: int

    @classmethod
    def of(cls, number: int) -> Bits:
        return cls(WORD, number & WORD)

    def join(self, other: Bits) -> Bits:
        known = self.known & other.known & ~(self.value ^ other.value)
        return Bits(known, self.value & known)

    def add(self, other: Bits) -> tuple[Bits, int | None]:
        """The sum, and its carry out where that is known.  A bit is known where both operands' bits and its carry are:
        the carry is known where the least and the greatest numbers that the operands can be have the same."""
        least = self.value + other.value
        greatest = (self.value | ~self.known & WORD) + (other.value | ~other.known & WORD)
        carries_least = least ^ self.value ^ other.value
        carries_greatest = greatest ^ (self.value | ~self.known & WORD) ^ (other.value | ~other.known & WORD)
        known = self.known & other.known & ~(carries_least ^ carries_greatest) & WORD
        return Bits(known, least & known), least >> 32 if least >> 32 == greatest >> 32 else None

    def shifted(self, n: int) -> Bits:
        """To the left; to the right where n is negative.  The bits that come in are zeros."""
        if n >= 0:
            return Bits((self.known << n | (1 << n) - 1) & WORD, self.value << n & WORD)
        return Bits(self.known >> -n | (WORD << 32 + n & WORD), self.value >> -n)

    def inverted(self) -> Bits:
        return Bits(self.known, ~self.value & self.known)


UNKNOWN = Bits(0, 0)
ZERO = Bits.of(0)


def lut3(operands: list[Bits], table: int) -> Bits:
    """Each bit of the result is the table's entry for the three operands' bits."""
    can_be = [0, 0]
    for entry in range(8):
        possible = WORD
        for x, bit in zip(operands, (entry >> 2 & 1, entry >> 1 & 1, entry & 1), strict=True):
            possible &= ~x.known | (x.value if bit else ~x.value)
        can_be[table >> entry & 1] |= possible
    known = ~(can_be[0] & can_be[1]) & WORD
    return Bits(known, can_be[1] & known)


@dataclass(frozen=True)
class Product:
    """An HGMMA.  Descriptors are (low word, high word), of A where it is in memory, then of B."""
    opcode: str
    a_in_registers: bool
    transposed: tuple[str, ...]
    adds: bool                                                  # to its accumulator, rather than to zero
    descriptors: tuple[tuple[Bits, Bits], ...]

    def kind(self) -> tuple[str, bool, tuple[str, ...]]:
        return self.opcode, self.a_in_registers, self.transposed

    def __str__(self) -> str:
        words = [self.opcode, *(["adds"] if self.adds else []), *self.transposed,
                 f"A in {'registers' if self.a_in_registers else 'memory'}"]
        text = " ".join(words)
        for low, high in self.descriptors:
            text += f" [start {(low.value & 0x3fff) << 4} leading {(low.value >> 16 & 0x3fff) << 4}"
            text += f" stride {(high.value & 0x3fff) << 4} swizzle {high.value >> 30}"
            text += f" known {low.known:08x} {high.known:08x}]"
        return text


State = dict[str, Bits]


@dataclass
class Instruction:
    address: int
    guarded: bool
    opcode: str
    operands: list[str]


def read(tools: Disassembler, path: str) -> dict[str, list[Instruction]]:
    functions: dict[str, list[Instruction]] = {}
    code: list[Instruction] | None = None
    for line in tools.listing(Path(path)).splitlines():
        if match := FUNCTION.match(line):
            code = functions.setdefault(match.group(1), [])
        elif code is not None and (match := LINE.match(line)):
            address, _, guard, opcode, operands = match.groups()
            code.append(Instruction(int(address, 16), bool(guard), opcode, [o.strip() for o in operands.split(",")]))
    names = subprocess.run(["c++filt"], input="\n".join(functions), text=True, capture_output=True, check=True).stdout
    short = [re.sub(r"^void |\(.*", "", n.replace("(anonymous namespace)::", "")) for n in names.splitlines()]
    return dict(zip(short, functions.values(), strict=True))


def operand(state: State, text: str) -> Bits:
    text = re.sub(r"\.reuse$", "", text)
    if text in ("RZ", "URZ"):
        return ZERO
    if re.fullmatch(r"U?R\d+", text):
        return state.get(text, UNKNOWN)
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", text):
        return Bits.of(int(text, 0))
    if match := re.fullmatch(r"-(U?R\d+|RZ)", text):  # two's complement
        return operand(state, match.group(1)).inverted().add(Bits.of(1))[0]
    if match := re.fullmatch(r"~(U?R\d+)", text):
        return operand(state, match.group(1)).inverted()
    return UNKNOWN


def constant(bits: Bits) -> int | None:
    return bits.value if bits.known == WORD else None


def next_register(name: str) -> str:
    match = re.fullmatch(r"(U?R)(\d+)", name)
    assert match
    return f"{match.group(1)}{int(match.group(2)) + 1}"


def carries_in(state: State, operands: list[str]) -> list[Bits]:
    """The predicates at an addition's end.  Those that are never set are written !PT or !UPT."""
    return [state.get(o, Bits(~1 & WORD, 0)) for o in operands[2:] if PREDICATE.fullmatch(o)]


def narrow_sum(state: State, operands: list[str], terms: list[Bits], extended: bool) -> Bits:
    total = ZERO
    carries: list[int | None] = []
    for term in terms + (carries_in(state, operands) if extended else []):
        total, carry = total.add(term)
        carries.append(carry)
    if PREDICATE.fullmatch(operands[1]):  # the carry out
        state[operands[1]] = UNKNOWN if None in carries else Bits.of(sum(c for c in carries if c))
    return total


def wide_sum(state: State, terms: list[str]) -> list[Bits]:
    """Of numbers of 64 bits: pairs of registers, and constants that are extended by their sign."""
    low, high, carries = ZERO, ZERO, 0
    for term in terms:
        low, carry = low.add(operand(state, term))
        if carry is None:
            return [low, UNKNOWN]
        carries += carry
        if re.fullmatch(r"U?R\d+", term):
            high = high.add(operand(state, next_register(term)))[0]
        elif term.startswith("-"):
            high = high.add(Bits.of(WORD))[0]
    return [low, high.add(Bits.of(carries))[0]]


def result(state: State, opcode: str, operands: list[str]) -> list[Bits]:
    """Of an instruction: the words of its result."""
    name, *modifiers = opcode.split(".")
    texts = [o for o in operands[1:] if not re.fullmatch(r"!?U?PT?\d*|!?U?PT", o)]
    values = [operand(state, t) for t in texts]
    wide = "64" in modifiers or "WIDE" in modifiers
    if name in ("UMOV", "MOV", "R2UR", "SHFL") and values:
        return [values[0]]
    if name in ("IMAD", "UIMAD") and "MOV" in modifiers:
        return [values[2]]
    if name in ("IMAD", "UIMAD") and not wide and "HI" not in modifiers and len(values) == 3:
        factor = next((c for v in values[:2] if (c := constant(v)) is not None), None)
        other = values[1] if constant(values[0]) == factor else values[0]
        if factor is None:
            return [UNKNOWN]
        total = values[2]
        for i in range(32):
            if factor >> i & 1:
                total = total.add(other.shifted(i))[0]
        return [total]
    if name in ("UIADD3", "IADD3") and wide:
        return wide_sum(state, texts[:3])
    if name in ("UIADD3", "IADD3", "VIADD", "UIADD", "IADD"):
        return [narrow_sum(state, operands, values[:3], "X" in modifiers)]
    if name in ("ULEA", "LEA") and "HI" not in modifiers and len(values) >= 3:
        n = constant(values[2])
        return [values[0].shifted(n).add(values[1])[0] if n is not None else UNKNOWN]
    if name in ("ULOP3", "LOP3") and len(values) >= 4:
        table = constant(values[3])
        return [lut3(values[:3], table) if table is not None else UNKNOWN]
    if name in ("USHF", "SHF") and len(values) >= 3 and "W" not in modifiers:
        n = constant(values[1])
        if n is not None and "U32" in modifiers and "HI" in modifiers and "R" in modifiers:
            return [values[2].shifted(-n)]
        if n is not None and "L" in modifiers:
            return [values[0].shifted(n)]
    if name in ("USGXT", "SGXT") and "U32" in modifiers:
        n = constant(values[1])
        if n is not None and n < 32:
            return [lut3([values[0], Bits.of((1 << n) - 1), ZERO], 0xc0)]
    if name in ("USEL", "SEL") and len(values) >= 2:
        return [values[0].join(values[1])]
    if name == "S2UR" and operands[1] == "SR_CgaCtaId":  # the block's place in its cluster of one
        return [ZERO]
    if name in ("UPRMT", "PRMT") and len(values) >= 3 and (selector := constant(values[1])) is not None:
        known = value = 0
        for i in range(4):
            byte = selector >> 4 * i & 15
            if byte < 8:
                source = values[0] if byte < 4 else values[2]
                known |= (source.known >> byte % 4 * 8 & 255) << 8 * i
                value |= (source.value >> byte % 4 * 8 & 255) << 8 * i
        return [Bits(known, value)]
    return [UNKNOWN, UNKNOWN] if wide else [UNKNOWN]


def hgmma(state: State, i: Instruction) -> Product:
    match = re.search(r"gdesc\[UR(\d+)\]", ",".join(i.operands))
    assert match, i
    first = int(match.group(1))
    in_registers = not i.operands[1].startswith("gdesc")
    # The descriptors of A and B follow one another.  Where A is in registers its two words are left out.
    words = [state.get(f"UR{first + w}", UNKNOWN) for w in (range(2, 4) if in_registers else range(4))]
    transposed = tuple(t for t in ("tnspA", "tnspB") if any(t in o for o in [i.opcode, *i.operands]))
    adds = "RZ" not in i.operands and "!UPT" not in i.operands
    return Product(i.opcode, in_registers, transposed, adds, tuple(zip(words[::2], words[1::2], strict=True)))


def execute(state: State, i: Instruction) -> None:
    if not i.operands or not re.fullmatch(r"U?R\d+", i.operands[0]):
        return
    if i.opcode.startswith(("ST", "RED", "BAR", "UTMA", "HGMMA", "SYNCS", "USETMAXREG")):
        return
    to = i.operands[0]
    words = result(state, i.opcode, i.operands)
    if i.opcode.split(".")[0] in ("LDS", "LDG", "LDC", "ULDC", "LD"):
        width = re.search(r"\.(64|128)", i.opcode)
        words = [UNKNOWN] * (int(width.group(1)) // 32 if width else 1)
    if i.opcode.startswith("LDSM"):
        words = [UNKNOWN] * 4
    for word in words:
        state[to] = state.get(to, UNKNOWN).join(word) if i.guarded else word
        to = next_register(to)


def join(into: State, other: State) -> bool:
    """True: `into` has become less known."""
    changed = False
    for name in list(into):
        joined = into[name].join(other.get(name, UNKNOWN))
        if joined != into[name]:
            into[name] = joined
            changed = True
    return changed


def products(code: list[Instruction]) -> list[Product]:
    """The HGMMAs in the order of the code, with what is known of their descriptors on every path that leads there."""
    at = {i.address: n for n, i in enumerate(code)}
    before: dict[int, State] = {0: {}}  # at the starts of blocks
    found: dict[int, Product] = {}
    todo = [0]
    while todo:
        start = n = todo.pop()
        state = dict(before[start])

        def flow(to: int, state: State = state) -> None:
            if to not in before:
                before[to] = dict(state)
                todo.append(to)
            elif join(before[to], state):
                todo.append(to)

        while n < len(code):
            if n != start and n in before:
                flow(n)
                break
            i = code[n]
            if i.opcode.startswith("HGMMA"):
                found[n] = hgmma(state, i)
            execute(state, i)
            if i.opcode.split(".")[0] in ("BRA", "BSSY", "CALL", "WARPSYNC"):
                targets = re.findall(r"0x[0-9a-f]+", ",".join(i.operands))
                if targets and int(targets[-1], 16) in at and not i.opcode.startswith(("BSSY", "WARPSYNC")):
                    flow(at[int(targets[-1], 16)])
                # A conditional branch goes on below.  So does one by a predicate among its operands.
                plain = not i.guarded and not any(re.match(r"!?U?P\d", o) for o in i.operands)
                if i.opcode.split(".")[0] == "BRA" and plain and "DIV" not in i.opcode:
                    break
                if i.opcode.split(".")[0] == "BRA":
                    flow(n + 1)
                    break
            if i.opcode.split(".")[0] in ("EXIT", "RET") and not i.guarded:
                break
            n += 1
    return [found[n] for n in sorted(found)]


def compare_pairs(kiln: dict[str, list[Instruction]], cute: dict[str, list[Instruction]]) -> tuple[int, list[Product]]:
    """(kernels that differ, all of CuTe's products)."""
    n_wrong, all_of_cute = 0, []
    for name in sorted(kiln | cute):
        ours, theirs = products(kiln.get(name, [])), products(cute.get(name, []))
        all_of_cute += theirs
        differences = [(a, b) for a, b in zip(ours, theirs, strict=False) if not same(a, b)]
        alike = len(ours) == len(theirs) > 0 and not differences
        n_wrong += not alike
        print(f"{'PASS' if alike else 'FAIL'}  SASS of {name}: {len(ours)} HGMMA")
        for a, b in differences:
            print(f"      kiln {a}\n      CuTe {b}")
    return n_wrong, all_of_cute


def uses_leading(p: Product) -> bool:
    """K-major with a swizzle: no.  MN-major: where mn has more than the 64 elements of a row of the swizzle."""
    return "tnspB" in p.transposed and "64x64x16" not in p.opcode


def same(a: Product, b: Product) -> bool:
    """All of it, but for the leading offset where hardware does not use it."""
    if (a.kind(), a.adds) != (b.kind(), b.adds) or len(a.descriptors) != len(b.descriptors):
        return False
    ignored = 0 if uses_leading(a) else 0x3fff << 16
    words = [(x, y, ignored if w == 0 else 0) for d, e in zip(a.descriptors, b.descriptors, strict=True)
             for w, (x, y) in enumerate(zip(d, e, strict=True))]
    return all(x.known == y.known == WORD and (x.value ^ y.value) & ~skip == 0 for x, y, skip in words)


def masked(p: Product) -> list[tuple[int, int]]:
    """Of each descriptor: its bits without the address, whose place in a pattern of 1024 bytes stays."""
    ignored = 0xffc0 | (0 if uses_leading(p) else 0x3fff << 16)
    return [(low.value & ~ignored, high.value) for low, high in p.descriptors]


def known_enough(p: Product) -> bool:
    wanted = WORD & ~0xffc0
    return all(low.known & wanted == wanted and high.known == WORD for low, high in p.descriptors)


def check_attention(kernels: dict[str, list[Instruction]], of_cute: list[Product]) -> int:
    allowed = {(p.kind(), tuple(masked(p))) for p in of_cute}
    n_wrong = 0
    for name, code in sorted(kernels.items()):
        found = products(code)
        n_all = sum(i.opcode.startswith("HGMMA") for i in code)
        if len(found) != n_all:
            n_wrong += 1
            print(f"FAIL  SASS of {name}: {len(found)} of {n_all} HGMMA were reached: a branch is not understood")
        bad = [p for p in found if not known_enough(p) or (p.kind(), tuple(masked(p))) not in allowed]
        n_wrong += bool(bad) or not found
        kinds = Counter(p.opcode.split(".")[1] + (" registers" if p.a_in_registers else " memory") +
                        (" transposed" if p.transposed else "") for p in found)
        print(f"{'FAIL' if bad or not found else 'PASS'}  SASS of {name}: {len(found)} HGMMA, each one of CuTe's: "
              + ", ".join(f"{n} x {kind}" for kind, n in sorted(kinds.items())))
        for p in bad:
            print(f"      {p}")
    return n_wrong


def main() -> int:
    tools = Disassembler.find("nvcc")
    if tools is None:
        print(f"SKIP  machine code: {NO_DISASSEMBLER}")
        return 0
    kiln, cute, attention = (read(tools, path) for path in sys.argv[1:4])
    n_wrong, of_cute = compare_pairs(kiln, cute)
    n_wrong += check_attention(attention, of_cute)
    print(f"machine code: {n_wrong} kernels wrong")
    return int(n_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
