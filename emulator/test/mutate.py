#!/usr/bin/env python3
"""Removes every barrier and asynchronous wait of the CUDA kernels, one at a time: do the tests notice?

    python3 emulator/test/mutate.py --record    all removals; writes emulator/test/removals.json
    python3 emulator/test/mutate.py --changed --every 8 --first 7     CI: all removals in files that differ from those
                                                of the recorded run, and each eighth of the others, from 7 mod 8
    python3 emulator/test/mutate.py --only gelu     the files whose name contains this

The script copies the kernels; in the copy each removable call asks an environment variable whether to run. The copy is
compiled once, with the race check, and its op tests run for each removal, in order and then under random schedules. A
removal counts as detected when a test fails or a report of the emulator appears. A barrier with a vote
(__syncthreads_or) is replaced by the thread's own vote. HARMLESS lists the calls whose removal no test can notice, with
the reason. Never removed: commits and arrivals by bytes, without which nothing moves on. Exit code 1: less than 95 % of
the unlisted removals were detected, one in Hopper's attention was not, or a listed one was.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "mutants" / "src"
BINARY = ROOT / "build" / "mutants" / "test_mutants"
REMOVABLE = re.compile(
    r"\b(__syncthreads(?:_or|_and|_count)?|__syncwarp|ptx::bar_sync|ptx::bar_arrive|ptx::cp_async_wait<[^<>;]*>"
    r"|ptx::bulk_wait(?:_read)?<[^<>;]*>|ptx::wgmma_wait<[^<>;]*>|ptx::wgmma_fence|ptx::mbar_wait|ptx::fence_proxy_async"
    r"|(?:\w+(?:\.|->))*(?:wait_full|wait_empty|give_back)|__threadfence)\s*\("
)
RECORD = ROOT / "emulator" / "test" / "removals.json"      # the last run of all: a hash and counts for each file
TIMEOUT_S = 300
ORDERS = ("", "1", "2", "3")        # of threads, tried until one notices: in order, then random by these seeds
NOTHING = 0                         # the number of no site
# (file, number of the call in the file, from 1, the call): why leaving the call out changes nothing.
HARMLESS: dict[tuple[str, int, str], str] = {
    ("kernels/cuda/attention_sm90_backward.cuh", 24, "ptx::wgmma_wait<0>()"):
        "leaves registers to the compiler: the wait for the next block's scores is also one for this product",
    ("kernels/cuda/attention_sm90_forward.cuh", 20, "ptx::bar_sync(kTurn, kThreadsOfTurn)"):
        "answers the last arrival at a barrier that nobody uses again: PTX does not ask for it",
}


@dataclass
class Site:
    number: int     # over all files
    file: str
    place: int      # in its file, from 1
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.place}) {self.text}"


def end_of_call(text: str, at: int) -> int:
    """The position after the parenthesis that closes the one at `at`."""
    depth = 0
    for i in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError("unbalanced parentheses")


def without_comments(text: str) -> str:
    """The same text with comments blanked, every position kept."""
    return re.sub(r"//[^\n]*", lambda m: " " * len(m.group()), text)


def copy_with_switches(path: Path, first: int) -> list[Site]:
    """Writes the file's copy: a statement `f(...);` becomes `if (!emulator::left_out(n)) f(...);`, and a barrier's vote
    `f(x)` becomes `(emulator::left_out(n) ? int(x) : f(x))`."""
    text = path.read_text()
    code, out, done = without_comments(text), [], 0
    sites: list[Site] = []
    name = str(path.relative_to(ROOT))
    for match in REMOVABLE.finditer(code):
        end = end_of_call(code, match.end() - 1)
        vote = re.match(r"__syncthreads_\w+", match.group())
        if not vote and not code[end:].lstrip().startswith(";"):
            continue                                # its value is used, and nothing can stand for it
        number = first + len(sites)
        call, argument = text[match.start():end], text[match.end():end - 1]
        sites.append(Site(number, name, len(sites) + 1, text.count("\n", 0, match.start()) + 1, call))
        switched = f"(emulator::left_out({number}) ? int({argument}) : {call})" if vote else \
                   f"if (!emulator::left_out({number})) {call}"
        out += [text[done:match.start()], switched]
        done = end
    target = COPY / name
    target.parent.mkdir(parents=True, exist_ok=True)
    new = "".join(out) + text[done:]
    if not target.exists() or target.read_text() != new:
        target.write_text(new)
    return sites


def make_copy() -> list[Site]:
    sites: list[Site] = []
    kernels = ROOT / "kernels"
    for path in sorted([*kernels.glob("*.cuh"), *(kernels / "cuda").glob("*.cu*")]):
        if path.name != "ptx.cuh":
            sites += copy_with_switches(path, len(sites) + 1)
    return sites


def tests_of(site: Site) -> list[str]:
    """doctest filters for the tests of the file's op; for the header that ops share, of all ops that call block_sum."""
    name = Path(site.file).stem
    if name.startswith("attention_sm90"):
        return ["attention sm90: forward and backward*"]
    op = re.split(r"[._]", name)[0]
    if op == "attention":
        return ["attention:*", "attention is*", "attention backward*"]
    named = {"cross": ["cross_entropy*"], "grad": ["*norm*"], "elementwise": ["*sum*"]}
    named["device"] = [pattern for patterns in named.values() for pattern in patterns]
    return named.get(op, [f"{op}*"])


def detected(site: Site, orders: tuple[str, ...] = ORDERS) -> str:
    """The kind of check that noticed the removal; empty: none did."""
    for order in orders:
        env = dict(os.environ, KILN_LEAVE_OUT=str(site.number), OMP_NUM_THREADS="1")
        if order:
            env["KILN_EMULATOR_SEED"] = order
        for pattern in tests_of(site):
            try:
                done = subprocess.run([str(BINARY), f"-tc={pattern}", "--abort-after=1"], env=env, text=True,
                                      errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                      timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                return "hangs"
            if done.returncode >= 0 and not re.search(r"test cases:\s*[1-9]", done.stdout):
                sys.exit(f"no test is named {pattern}: tests_of() is out of date")
            if done.returncode != 0:
                kind = re.search(r"(racecheck|memcheck|initcheck|synccheck|proxycheck|deadlock)", done.stdout)
                return kind.group(1) if kind else "wrong result" if done.returncode == 1 else f"exit {done.returncode}"
    return ""


def code_hash(file: str) -> str:
    """Of a kernel file without comments and white space at the ends of lines."""
    code = without_comments((ROOT / file).read_text())
    return hashlib.sha256("\n".join(line.rstrip() for line in code.splitlines()).encode()).hexdigest()[:16]


def changed_files(sites: list[Site]) -> set[str]:
    """The files whose code is not the code of the recorded run."""
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return {s.file for s in sites if recorded.get(s.file, {}).get("code") != code_hash(s.file)}


def write_record(sites: list[Site], missed: list[Site]) -> None:
    record = {}
    for file in sorted({s.file for s in sites}):
        there = [s for s in sites if s.file == file]
        harmless = sum((s.file, s.place, s.text) in HARMLESS for s in there)
        missing = sum(s.file == file for s in missed)
        record[file] = {"code": code_hash(file), "removals": len(there), "harmless": harmless,
                        "detected": len(there) - harmless - missing}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def choose(sites: list[Site], args: argparse.Namespace) -> list[Site]:
    """The removals to try, by the options."""
    named = [s for s in sites if not args.only or args.only in s.file]
    changed = changed_files(sites) if args.changed else set()
    if changed:
        print(f"changed since the recorded run: {', '.join(sorted(changed))}")
    others = [s for s in named if s.file not in changed][args.first % args.every::args.every]
    return sorted([s for s in named if s.file in changed] + others, key=lambda s: s.number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th removal")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="of these, beginning with K mod N")
    parser.add_argument("--changed", action="store_true", help="also every removal in files changed since the record")
    parser.add_argument("--only", help="only files whose name contains this")
    parser.add_argument("--record", action="store_true", help="all removals, and write the record")
    args = parser.parse_args()
    if args.record and (args.only or args.changed or args.every > 1):
        parser.error("--record tries all removals; leave the other options out")
    sites = make_copy()
    target = str(BINARY.relative_to(ROOT))
    subprocess.run(["make", "-C", str(ROOT), "--no-print-directory", "DEPS=0", target], check=True)
    chosen = choose(sites, args)
    pool = ThreadPoolExecutor(os.cpu_count())                           # each test runs on one core
    one_of_each = {tuple(tests_of(s)): s for s in chosen}.values()      # of the sets of tests
    whole = [replace(s, number=NOTHING) for s in one_of_each]
    for site, found in zip(whole, pool.map(lambda site: detected(site, ("",)), whole), strict=True):
        if found:
            print(f"{tests_of(site)} fail with nothing left out: {found}")
            return 1
    missed, surprising = [], []

    def timed(site: Site) -> tuple[str, float]:
        start = time.monotonic()
        return detected(site), time.monotonic() - start

    for site, (by, seconds) in zip(chosen, pool.map(timed, chosen), strict=True):
        reason = HARMLESS.get((site.file, site.place, site.text))
        print(f"{by or 'NOT DETECTED':14} {seconds:5.1f} s  {site}" + (f"  [{reason}]" if reason else ""), flush=True)
        if not by and not reason:
            missed.append(site)
        if by and reason:
            surprising.append(site)
    counted = [s for s in chosen if (s.file, s.place, s.text) not in HARMLESS]
    print(f"{len(counted) - len(missed)} of {len(counted)} removals detected, "
          f"{len(chosen) - len(counted)} listed as harmless")
    if args.record:
        write_record(sites, missed)
    unheard = [s for s in missed if "sm90" in s.file]           # here every miss counts
    for site in surprising:
        print(f"listed as harmless, yet detected: {site}")
    return 1 if surprising or unheard or len(missed) > 0.05 * len(counted) else 0


if __name__ == "__main__":
    sys.exit(main())
