"""The sources of the CUDA kernels, what each is compiled for, and kernels' names as people write them."""
from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "86", "89", "90a", "100")


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
