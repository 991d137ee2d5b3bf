"""scripts/kernel_table.py: reads what ptxas says, fails on a spill, a stack frame and an old table.

Seen to fail: a spill of a function that was not inlined left out; an architecture that was not compiled taken for fine.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPO

SCRIPT = REPO / "scripts" / "kernel_table.py"
KERNEL = "_ZN39_GLOBAL__N__e8aef991_7_gelu_cu_16c3817a19gelu_forward_kernelI4bf16EEvPT_PKS2_mb"
HELPER = "_ZN39_GLOBAL__N__e8aef991_7_gelu_cu_16c3817a6helperEf"


def entry(arch: str, registers: int = 32, stack: int = 0, spill: int = 0, shared: int = 0, name: str = KERNEL) -> str:
    smem = f", {shared} bytes smem" if shared else ""
    return f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{name}' for 'sm_{arch}'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used {registers} registers, used 0 barriers{smem}, 385 bytes cmem[0]
ptxas info    : Compile time = 10.982 ms
"""


@pytest.fixture
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_table", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules["kernel_table"] = loaded
    spec.loader.exec_module(loaded)  # type: ignore[union-attr]
    return loaded


class Tool:
    """The script over logs that stand in for the build's, with an nvcc that only knows its version."""

    def __init__(self, root: Path) -> None:
        self.logs, self.table, self.nvcc = root / "logs", root / "kernels.md", root / "nvcc"
        self.version("13.0.88")
        for source in REPO.glob("kernels/cuda/*.cu"):
            self.log(source.stem, "ptxas info    : 0 bytes gmem\n")

    def version(self, v: str) -> None:
        self.nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {v[:4]}, V{v}'\n")
        self.nvcc.chmod(0o755)

    def log(self, stem: str, text: str) -> None:
        path = self.logs / "kernels" / "cuda" / f"{stem}.o.ptxas"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(self, *flags: str) -> tuple[int, str]:
        command = [sys.executable, SCRIPT, "--logs", self.logs, "--nvcc", self.nvcc, "--table", self.table, *flags]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr


ALL = ("80", "86", "89", "90a", "100")


@pytest.fixture
def tool(tmp_path: Path) -> Tool:
    t = Tool(tmp_path)
    t.log("gelu", "".join(entry(a, 30 + i, shared=16 * (a == "100")) for i, a in enumerate(ALL)))
    return t


def test_the_table_has_each_kernel_by_its_name(tool: Tool) -> None:
    assert tool.run()[0] == 0
    text = tool.table.read_text()
    assert "| `gelu_forward_kernel<bf16>` | 30 | 31 | 32 | 33 | 34 | 0/0/0/0/16 | 0 | 0 |" in text
    assert "nvcc 13.0 " in text
    code, out = tool.run("--check")
    assert code == 0 and "1 kernels, as committed; no spill, no stack frame" in out


def test_another_number_is_shown_and_fails(tool: Tool) -> None:
    tool.run()
    tool.log("gelu", "".join(entry(a, 40) for a in ALL))
    code, out = tool.run("--check")
    assert code == 1
    assert "-| `gelu_forward_kernel<bf16>` | 30 " in out and "+| `gelu_forward_kernel<bf16>` | 40 " in out
    assert "make kernel-table rewrites it" in out


@pytest.mark.parametrize("stack, spill", [(8, 8), (16, 0)])
def test_a_spill_or_a_stack_frame_fails_even_when_committed(tool: Tool, stack: int, spill: int) -> None:
    tool.log("gelu", "".join(entry(a, stack=stack if a == "89" else 0, spill=spill if a == "89" else 0) for a in ALL))
    for flags in ([], ["--check"]):
        code, out = tool.run(*flags)
        assert code == 1
        assert f"gelu_forward_kernel<bf16> on sm_89: {stack} bytes of stack, {spill} of spill stores" in out


def test_another_nvcc_is_not_compared_but_must_not_spill(tool: Tool) -> None:
    tool.run()
    tool.version("13.1.22")
    tool.log("gelu", "".join(entry(a, 40) for a in ALL))
    code, out = tool.run("--check")
    assert code == 0 and "of another nvcc than 13.1" in out
    tool.log("gelu", "".join(entry(a, 40, 8, 8) for a in ALL))
    assert tool.run("--check")[0] == 1


def test_an_architecture_that_was_left_out_fails(tool: Tool) -> None:
    tool.log("gelu", entry("90a"))
    code, out = tool.run("--check")
    assert code == 1 and "kernels/cuda/gelu.cu: not compiled for sm_80" in out


def test_a_missing_log_is_named(tool: Tool) -> None:
    (tool.logs / "kernels/cuda/gelu.o.ptxas").unlink()
    code, out = tool.run("--check")
    assert code == 1 and "gelu.o.ptxas is missing; build first" in out


def test_a_function_that_was_not_inlined_counts(module: ModuleType) -> None:
    text = entry("80") + f"""\
ptxas info    : Function properties for {HELPER}
    24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
"""
    uses = module.parse(text)
    assert uses[KERNEL]["80"] == module.Use(registers=32)
    assert uses[HELPER]["80"] == module.Use(stack=24, spill_stores=20, spill_loads=16)
    assert any("helper on sm_80: 24 bytes of stack" in f for f in module.faults({"gelu.cu": uses}))


@pytest.mark.parametrize(
    "demangled, short",
    [
        ("void (anonymous namespace)::add_kernel<float>(float*, unsigned long)", "add_kernel<float>"),
        ("(anonymous namespace)::hash_kernel(unsigned int*, int)", "hash_kernel"),
        ("void (anonymous namespace)::k<64, (a::Kind)1, true>(int (*)(int), bool)", "k<64, (a::Kind)1, true>"),
        ("plain_c_kernel", "plain_c_kernel"),
    ],
)
def test_names(module: ModuleType, demangled: str, short: str) -> None:
    assert module.short_name(demangled) == short
