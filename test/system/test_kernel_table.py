"""scripts/build/kernel_table.py: reads what ptxas says; fails on a spill, a stack frame, a serialized wgmma and an old
table.

Seen to fail: a spill of a function that was not inlined left out; an architecture that was not compiled taken for fine;
the Hopper kernels' counts lost where there is no disassembler.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kernel_table
import sass_check
from conftest import REPO, program
from test_sass_check import LISTING

SCRIPT = REPO / "scripts" / "build" / "kernel_table.py"
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


class Tool:
    """The script over logs that stand in for the build's, with an nvcc that only knows its version."""

    def __init__(self, root: Path) -> None:
        self.logs, self.table, self.nvcc = root / "logs", root / "kernels.md", root / "nvcc"
        self.bin = root / "bin"  # no disassembler in it
        self.bin.mkdir()
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
        done = subprocess.run([sys.executable, SCRIPT, *self.flags(*flags)], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def flags(self, *more: str) -> list[str]:
        paths = {"logs": self.logs, "nvcc": self.nvcc, "table": self.table, "disassembler": self.bin}
        return [*(f"--{name}={path}" for name, path in paths.items()), *more]

    def disassembler(self, listing: str) -> None:
        """One that knows a single object."""
        (self.bin / "listing").write_text(listing)
        program(self.bin / "cuobjdump", f"cat '{self.bin}/listing'")
        program(self.bin / "nvdisasm", "exit 1")


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


# ---- Hopper kernels ----
HOPPER = "kernels/cuda/attention_sm90.cu"
ROW = "| `attention_sm90_forward_kernel<64>` | 2 | 2 | 1 | 0 | 1 | 1 | 1 | 1 | 24/240 | 17 | R103 |"


@pytest.fixture
def hopper(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """A source of this kind beside gelu.cu, and a disassembler; to be run by `in_process`."""
    monkeypatch.setattr(kernel_table, "sources", lambda: [HOPPER, "kernels/cuda/gelu.cu"])
    tool.log("attention_sm90", entry("90a", 168))
    (tool.logs / HOPPER).with_suffix(".o").touch()
    tool.disassembler(LISTING)
    return tool


def in_process(tool: Tool, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    code = kernel_table.main(tool.flags(*flags))
    return code, capsys.readouterr().out


def test_hopper_kernels_have_a_column_and_their_instructions(hopper: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process(hopper, capsys)[0] == 0
    text = hopper.table.read_text()
    assert "| kernel | sm_90a | shared | stack | spilled |\n|---|--:|--:|--:|--:|\n" in text
    assert "| `gelu_forward_kernel<bf16>` | 168 | 0 | 0 | 0 |" in text
    assert "setmaxnreg moves them" in text and text.endswith(f"{ROW}\n")
    said = f"{hopper.table}: 2 kernels, as committed; no spill, no stack frame\n"
    assert in_process(hopper, capsys, "--check") == (0, said)
    hopper.disassembler(LISTING.replace("MUFU.RCP", "MUFU.EX2"))
    code, out = in_process(hopper, capsys, "--check")
    assert code == 1 and f"-{ROW}" in out and f"+{ROW.replace('| 0 | 1 |', '| 0 | 2 |')}" in out


def test_without_a_disassembler_the_counts_stay_as_they_are(hopper: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    in_process(hopper, capsys)
    text = hopper.table.read_text()
    (hopper.bin / "nvdisasm").unlink()
    for flags in ((), ("--check",)):
        code, out = in_process(hopper, capsys, *flags)
        assert code == 0 and "the Hopper kernels' instructions are not checked: cuobjdump and nvdisasm not found" in out
        assert hopper.table.read_text() == text


def test_a_broken_rule_fails_with_any_nvcc(hopper: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    in_process(hopper, capsys)
    hopper.disassembler(LISTING.replace("HGMMA.64x128x16", "HMMA.16816"))
    for version in ("13.0.88", "13.1.22"):
        hopper.version(version)
        code, out = in_process(hopper, capsys, "--check")
        assert code == 1 and f"{HOPPER}: attention_sm90_forward_kernel<64> has no HGMMA" in out
    hopper.disassembler(LISTING.replace("MUFU.RCP", "MUFU.EX2"))
    assert in_process(hopper, capsys, "--check")[0] == 0  # other counts of another nvcc


def test_hopper_kernels_must_be_compiled_for_hopper_without_losses(
    hopper: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    hopper.log("attention_sm90", entry("100"))
    code, out = in_process(hopper, capsys, "--check")
    assert code == 1 and f"{HOPPER}: not compiled for sm_90a" in out
    loss = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma instructions"
    hopper.log("attention_sm90", f"ptxas info    : (C7514) {loss}\n" + entry("90a", stack=8))
    code, out = in_process(hopper, capsys, "--check")
    assert code == 1 and f"{HOPPER}: {loss}\n" in out
    assert f"{HOPPER}: gelu_forward_kernel<bf16> on sm_90a: 8 bytes of stack" in out


def test_without_logs_each_source_is_compiled_for_its_architectures(
    hopper: Tool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_table.sass_check, "is_memory_bound", lambda source: False)  # one listing for all objects
    in_process(hopper, capsys)
    text = hopper.table.read_text()
    logs = "".join(f"{source.stem})\ncat <<'END'\n{Path(f'{source}.o.ptxas').read_text()}END\n;;\n"
                   for source in ((hopper.logs / s).with_suffix("") for s in (HOPPER, "kernels/cuda/gelu.cu")))
    calls = hopper.logs / "calls"
    program(hopper.nvcc, f"""\
[ "$1" != --version ] || {{ echo 'release 13.0, V13.0.88'; exit; }}
echo "$@" >>{calls}
while [ "$1" != -o ]; do shift; done
touch "$2"
case $(basename "$2" .o) in
{logs}esac""")
    flags = [flag for flag in hopper.flags("--check") if not flag.startswith("--logs")]
    assert kernel_table.main(flags) == 0, capsys.readouterr().out
    assert hopper.table.read_text() == text
    assert calls.read_text().splitlines()[0].split("code=")[1:] == ["sm_90a"]
    assert calls.read_text().splitlines()[1].count("code=sm_") == 5


def test_a_function_that_was_not_inlined_counts() -> None:
    text = entry("80") + f"""\
ptxas info    : Function properties for {HELPER}
    24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
"""
    uses = kernel_table.parse(text)
    assert uses[KERNEL]["80"] == kernel_table.Use(registers=32)
    assert uses[HELPER]["80"] == kernel_table.Use(stack=24, spill_stores=20, spill_loads=16)
    assert any("helper on sm_80: 24 bytes of stack" in f for f in kernel_table.faults({"gelu.cu": uses}))


@pytest.mark.parametrize(
    "demangled, short",
    [
        ("void (anonymous namespace)::add_kernel<float>(float*, unsigned long)", "add_kernel<float>"),
        ("(anonymous namespace)::hash_kernel(unsigned int*, int)", "hash_kernel"),
        ("void (anonymous namespace)::k<64, (a::Kind)1, true>(int (*)(int), bool)", "k<64, (a::Kind)1, true>"),
        ("plain_c_kernel", "plain_c_kernel"),
    ],
)
def test_names(demangled: str, short: str) -> None:
    assert sass_check.short_name(demangled) == short
