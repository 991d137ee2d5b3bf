#!/usr/bin/env python3
"""Does the oracle notice?  Changes one thing at a time in a copy of the emulator or of the kernels, builds the oracle
anew, and expects it to fail.

    make isa-oracle-mutants                             all of them
    emulator/test/oracle/mutants.py --only swizzle      those whose name contains this

Exit code: 0 all noticed, 1 one was not, or its text is no longer in the sources.
"""
from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
COPY = ROOT / "build" / "oracle-mutants"
PROGRAM = COPY / "build" / "release" / "isa_oracle"
TIMEOUT_S = 600


@dataclass
class Mutant:
    name: str
    file: str
    changes: list[tuple[str, str]]  # text that stands in the file once, and its replacement


def exchanged(first: str, second: str, pattern: str) -> list[tuple[str, str]]:
    """One change: the two words change places in `pattern`, which names them {0} and {1}."""
    return [(pattern.format(first, second), pattern.format(second, first))]


MMA, WGMMA, TMA = "emulator/mma.cpp", "emulator/wgmma.cpp", "emulator/tma.cpp"
PTX, TILE = "kernels/ptx.cuh", "kernels/cuda/attention_sm90_tile.cuh"
MUTANTS = [
    Mutant("mma: A's registers exchanged", MMA, [
        ("a[g + 8 * (i & 1)][t + 8 * (i / 2)]", "a[g + 8 * (i / 2)][t + 8 * (i & 1)]"),
        ("a[g + 8 * (i & 1)][t + 1 + 8 * (i / 2)]", "a[g + 8 * (i / 2)][t + 1 + 8 * (i & 1)]")]),
    Mutant("mma: halves of B exchanged", MMA, [
        ("b[t + 8 * i][g] = low_bf16", "b[t + 8 * i][g] = high_bf16"),
        ("b[t + 1 + 8 * i][g] = high_bf16", "b[t + 1 + 8 * i][g] = low_bf16")]),
    Mutant("mma: B's registers exchanged", MMA, [
        ("b[t + 8 * i]", "b[t + 8 * (1 - i)]"), ("b[t + 1 + 8 * i]", "b[t + 1 + 8 * (1 - i)]")]),
    Mutant("mma: D's registers in another order", MMA, [
        ("8 * (i / 2)][t + (i & 1)] = lane", "8 * (i & 1)][t + (i / 2)] = lane"),
        ("d[l / 4 + 8 * (i / 2)][2 * (l % 4) + (i & 1)]", "d[l / 4 + 8 * (i & 1)][2 * (l % 4) + (i / 2)]")]),
    Mutant("ldmatrix: .trans is ignored", MMA, [
        ("first.transposed ? matrix[j][i] : matrix[i][j]", "matrix[i][j]"),
        ("first.transposed ? matrix[j + 1][i] : matrix[i][j + 1]", "matrix[i][j + 1]")]),
    Mutant("ldmatrix: matrices in reverse", MMA, [("registers[m]", "registers[first.count - 1 - m]")]),
    Mutant("wgmma: leading and stride exchanged, MN-major with a swizzle", WGMMA, exchanged(
        "leading", "stride", "mn / width * {0} + mn % width * 2 + k / 8 * {1}")),
    Mutant("wgmma: leading and stride exchanged, MN-major without a swizzle", WGMMA, exchanged(
        "stride", "leading", "mn / 8 * {0} + mn % 8 * 2 + k / 8 * {1}")),
    Mutant("wgmma: leading and stride exchanged, K-major without a swizzle", WGMMA, exchanged(
        "stride", "leading", "mn / 8 * {0} + mn % 8 * 16 + k / 8 * {1}")),
    Mutant("wgmma: the swizzle counts from the descriptor's start", WGMMA, [
        ("return swizzled(a, kMode[field]);", "return start + swizzled(a - start, kMode[field]);")]),
    Mutant("wgmma: layout types of 64 and 32 bytes exchanged", WGMMA, [
        ("kWidth[] = {8, 64, 32, 16}", "kWidth[] = {8, 64, 16, 32}"),
        ("kMode[] = {0, 3, 2, 1}", "kMode[] = {0, 3, 1, 2}")]),
    Mutant("wgmma: the accumulator's registers in another order", WGMMA, [
        ("n / 8 * 4 + 2 * (row >> 3) + (n & 1)", "n / 8 * 4 + (row >> 3) + 2 * (n & 1)")]),
    Mutant("wgmma: A's registers in another order", WGMMA, exchanged("row", "k", "({0} >> 3) + 2 * ({1} >> 3)")),
    Mutant("wgmma: the warps' rows in reverse", WGMMA, [("self().warp % 4) * 16", "self().warp % 4 ^ 3) * 16")]),
    Mutant("swizzle: by address bits 8 to 10", TMA, [("address >> 7 & kRows", "address >> 8 & kRows")]),
    Mutant("TMA: neighbouring chunks of 16 bytes exchanged", TMA, [
        ("Chunk c{swizzled(linear + byte, m.swizzle)", "Chunk c{swizzled(linear + (byte ^ 16), m.swizzle)")]),
    Mutant("TMA: a swizzle of 64 bytes for 128", TMA, [
        ("Chunk c{swizzled(linear + byte, m.swizzle)",
         "Chunk c{swizzled(linear + byte, m.swizzle ? m.swizzle - 1 : 0)")]),
    Mutant("descriptor: leading and stride exchanged", PTX, exchanged(
        "leading", "stride", "uint64_t({0} >> 4) << 16 | uint64_t({1} >> 4) << 32")),
    Mutant("descriptor: another swizzle", PTX, [
        ("kSwizzle128 = uint64_t(1) << 62", "kSwizzle128 = uint64_t(2) << 62")]),
    Mutant("step_at: 16 columns are 64 bytes", TILE, [("k % 4 * 32) >> 4", "k % 4 * 64) >> 4")]),
    Mutant("multiply_tile: leading offset 1024", TILE, [
        ("wgmma_desc_sw128(b, R * 128, 1024)", "wgmma_desc_sw128(b, 1024, 1024)")]),
    Mutant("multiply_tile: leading and stride exchanged", TILE, [
        ("wgmma_desc_sw128(b, R * 128, 1024)", "wgmma_desc_sw128(b, 1024, R * 128)")]),
    Mutant("multiply_tile: kAdd is ignored", TILE, [("kAdd || k != 0", "k != 0")]),
    Mutant("chunk_at: by the row modulo 4", TILE, [("chunk ^ row % 8", "chunk ^ row % 4")]),
    Mutant("read_rows: halves of the matrices exchanged", TILE, [
        ("ptx::ldmatrix_x4(a[k], rows + k / 4 * kTile * 128 + chunk_at(row, k % 4 * 2 + lane / 16)",
         "ptx::ldmatrix_x4(a[k], rows + k / 4 * kTile * 128 + chunk_at(row, k % 4 * 2 + 1 - lane / 16)")]),
    Mutant("write_rows: halves of the matrices exchanged", TILE, [
        ("ptx::stmatrix_x4(r, rows + k / 4 * kTile * 128 + chunk_at(row, k % 4 * 2 + lane / 16)",
         "ptx::stmatrix_x4(r, rows + k / 4 * kTile * 128 + chunk_at(row, k % 4 * 2 + 1 - lane / 16)")]),
]


def copy_sources() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True).stdout.split()
    for file in files:
        source, copy = ROOT / file, COPY / file
        if source.is_file() and (not copy.exists() or copy.read_bytes() != source.read_bytes()):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
            shutil.copymode(source, copy)
    (COPY / "build").mkdir(parents=True, exist_ok=True)
    if not (COPY / "build" / "deps").exists():
        (COPY / "build" / "deps").symlink_to(ROOT / "build" / "deps")


def build() -> str:
    """Why the oracle could not be built; empty: it is there."""
    done = subprocess.run(["make", "-j2", "DEPS=0", str(PROGRAM.relative_to(COPY))], cwd=COPY, text=True,
                          capture_output=True)
    return done.stdout[-2000:] + done.stderr[-2000:] if done.returncode else ""


def verdict(mutant: Mutant) -> str:
    """Empty: noticed."""
    path = COPY / mutant.file
    original = path.read_text()
    text = original
    for old, new in mutant.changes:
        if text.count(old) != 1:
            return f"stands {text.count(old)} times in {mutant.file}: {old}"
        text = text.replace(old, new)
    path.write_text(text)
    try:
        if error := build():
            return "does not build: " + error
        try:
            done = subprocess.run([PROGRAM], text=True, capture_output=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return ""  # a hang is noticed
        return "MISSED" if done.returncode == 0 else ""
    finally:
        path.write_text(original)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    args = parser.parse_args()
    copy_sources()
    if error := build():
        print(f"the unchanged oracle does not build:\n{error}")
        return 1
    if subprocess.run([PROGRAM], capture_output=True).returncode:
        print("the unchanged oracle fails: run make isa-oracle")
        return 1
    chosen = [m for m in MUTANTS if args.only in m.name]
    n_noticed = 0
    for mutant in chosen:
        why = verdict(mutant)
        n_noticed += not why
        print(f"{'MISSED ' if why else 'noticed'}  {mutant.name}" + (f"\n    {why}" if why else ""), flush=True)
    print(f"{n_noticed} of {len(chosen)} mutants noticed")
    return int(n_noticed < len(chosen) or not chosen)


if __name__ == "__main__":
    sys.exit(main())
