"""scripts/build/sass_check.py: counts what a disassembler shows, and fails on each broken rule.

The listing is in cuobjdump's format and its lines are from real ones.  Seen to fail: an accumulator's registers counted
by the first alone, instructions under a predicate left out, each rule left out, an object for other GPUs taken.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

import sass_check
from conftest import REPO, Result, program, run

SCRIPT = REPO / "scripts" / "build" / "sass_check.py"
OBJECTS = REPO / "build" / "release" / "obj" / "cuda"
NAME = "_Z29attention_sm90_forward_kernelILi64EEvi"
LISTING = f"""\

Fatbin ptx code:
================
arch = sm_90a
code version = [9,0]

Fatbin elf code:
================
arch = sm_90a
code version = [1,8]
host = linux

\tcode for sm_90a
\t.target\tsm_90a

\t\tFunction : {NAME}
\t.headerflags\t@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                                    /* 0x00000a00ff017b82 */
                                                                                             /* 0x000fe20000000800 */
        /*0010*/                   USETMAXREG.DEALLOC.CTAPOOL 0x18 ;                         /* 0x00000018000079c8 */
        /*0020*/                   R2UR UR6, R10 ;                                           /* 0x000000000a0672ca */
        /*0030*/               @P0 UTMALDG.2D [UR8], [UR6] ;                                 /* 0x00000008060075b4 */
        /*0040*/                   UTMALDG.4D [UR12], [UR20] ;                               /* 0x0000000c140075b4 */
        /*0050*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ;                  /* 0x000000f0000079c8 */
        /*0060*/                   LDSM.16.M88.4 R100, [R2+UR4] ;                            /* 0x000000040264783b */
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, R100, gdesc[UR4], R24 ;     /* 0x41e0000464187df0 */
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;     /* 0x01e00000041879f0 */
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;                           /* 0x00008000000079c5 */
        /*00a0*/                   SHFL.BFLY PT, R5, R4, 0x1, 0x1f ;                         /* 0x0c201f0004057f89 */
        /*00b0*/                   MUFU.EX2 R4, R4.reuse ;                                   /* 0x0000000400047308 */
        /*00c0*/                   MUFU.RCP R6, R6 ;                                         /* 0x0000000600067308 */
        /*00d0*/                   HFMA2.MMA R7, -RZ, RZ, 0, 0 ;                             /* 0x00000000ff077435 */
        /*00e0*/                   UTMASTG.2D [UR4], [UR8] ;                                 /* 0x00000008040073b5 */
        /*00f0*/                   EXIT ;                                                    /* 0x000000000000794d */
.L_x_1:
        /*0100*/                   BRA `(.L_x_1);                                            /* 0xfffffffc00fc7947 */
        /*0110*/                   NOP;                                                      /* 0x0000000000007918 */
        /*0120*/                   NOP;                                                      /* 0x0000000000007918 */
"""


def without(instruction: str) -> str:
    return re.sub(rf"\n[^\n]* {instruction}[^\n]*", "", LISTING)


def with_also(instruction: str) -> str:
    return re.sub(r"(?=\n[^\n]*EXIT)", rf"\n        /*00e8*/              @!P1 {instruction} ;     /* 0x0 */", LISTING)


def check(folder: Path, listing: str) -> Result:
    """Over an object whose listing is this one."""
    (folder / "listing").write_text(listing)
    (folder / "attention_sm90.o").touch()
    program(folder / "cuobjdump", f"cat '{folder}/listing'")
    program(folder / "nvdisasm", "exit 1")
    return run([sys.executable, SCRIPT, "--disassembler", folder, folder / "attention_sm90.o"])


def test_what_is_counted(tmp_path: Path) -> None:
    done = check(tmp_path, LISTING)
    assert done.code == 0, done
    assert done.out == (
        "attention_sm90_forward_kernel<64>: HGMMA 2, UTMALDG 2, UTMASTG 1, UTMAREDG 0, MUFU.EX2 1, WARPGROUP.DEPBAR 1, "
        "R2UR 1, SHFL 1, setmaxnreg 24/240, instructions 17, highest register R103\n1 kernels, 0 broken rules\n"
    )
    assert "highest register R87" in check(tmp_path, without("LDSM").replace("R24, R100,", "R24, R56,")).out


def broken(done: Result) -> str:
    """The one rule that does not hold."""
    assert done.code == 1 and done.out.endswith("\n1 kernels, 1 broken rules\n")
    return re.search(r"attention_sm90\.o: attention_sm90_forward_kernel<64> (.*)", done.out).group(1)  # type: ignore[union-attr]


@pytest.mark.parametrize("missing, named", [("HGMMA",) * 2, ("UTMALDG",) * 2, ("UTMASTG", "UTMASTG or UTMAREDG")])
def test_each_instruction_that_is_needed(tmp_path: Path, missing: str, named: str) -> None:
    assert broken(check(tmp_path, without(missing))) == f"has no {named}"


@pytest.mark.parametrize(
    "instruction, message",
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "1 HMMA: mma.sync instead of wgmma"),
        ("LDL.LU R4, [R1+0x8]", "1 LDL: a load from local memory"),
        ("STL.64 [R1], R2", "1 STL: a store to local memory"),
    ],
)
def test_each_instruction_that_is_forbidden(tmp_path: Path, instruction: str, message: str) -> None:
    assert broken(check(tmp_path, with_also(instruction))) == f"has {message}"


def test_an_addition_by_tma_is_a_store(tmp_path: Path) -> None:
    assert check(tmp_path, LISTING.replace("UTMASTG.2D", "UTMAREDG.2D.ADD")).code == 0


def test_an_object_for_another_architecture_is_refused(tmp_path: Path) -> None:
    elf = LISTING[LISTING.index("Fatbin elf") :]
    done = check(tmp_path, elf.replace("arch = sm_90a", "arch = sm_80") + LISTING)
    assert done.code == 1 and "holds code for sm_80, sm_90a, expected sm_90a once" in done.err
    assert "holds code for nothing" in check(tmp_path, "").err
    assert "holds no kernel" in check(tmp_path, LISTING.replace("Function :", "")).err


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    done = run([sys.executable, SCRIPT, "--disassembler", tmp_path, tmp_path / "x.o"])
    assert done.code == 2 and "install_deps.sh --disassembler" in done.err
    check(tmp_path, LISTING)
    done = run([sys.executable, SCRIPT, "--disassembler", tmp_path, tmp_path / "x.o"])
    assert done.code == 1 and f"{tmp_path}/x.o is missing; build first" in done.err
    program(tmp_path / "cuobjdump", "echo too old >&2; exit 255")
    done = run([sys.executable, SCRIPT, "--disassembler", tmp_path, tmp_path / "attention_sm90.o"])
    assert done.code == 1 and "exit 255: too old; is it of an older CUDA than nvcc?" in done.err


WIDE = """\
\t\tFunction : _Z11gelu_kernelI4bf16Evi
        /*0010*/               @P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;                 /* 0x0 */
        /*0020*/                   LDG.E R8, desc[UR4][R2.64] ;                              /* 0x0 */
        /*0030*/                   STG.E.128 desc[UR4][R2.64], R4 ;                          /* 0x0 */
\t\tFunction : _Z14row_sum_kernelv
        /*0010*/                   LDG.E R8, desc[UR4][R2.64] ;                              /* 0x0 */
        /*0030*/                   STG.E desc[UR4][R2.64], R8 ;                              /* 0x0 */
"""


@pytest.mark.parametrize("before, after, broken", [
    ("", "", []),
    ("LDG.E.128.CONSTANT", "LDG.E.64", ["x: gelu_kernel<bf16> has no LDG of 128 bits"]),
    ("STG.E.128", "STG.E.64", ["x: gelu_kernel<bf16> has no STG of 128 bits"]),
    ("STG.E desc", "STG.E.128 desc", ["x: row_sum_kernel has STG of 128 bits, which NARROW says it has not"]),
    ("LDG.E R8", "STL R8", ["x: gelu_kernel<bf16> has 1 STL: a store to local memory"]),
    ("LDG.E R8", "F2F.BF16.F32 R8", ["x: gelu_kernel<bf16> has 1 F2F: rounds to bf16 one by one, not in pairs"]),
])
def test_memory_bound_kernels_move_16_bytes_at_a_time(tmp_path: Path, before: str, after: str, broken: list) -> None:
    (tmp_path / "listing").write_text(WIDE.replace(before, after, 1))
    (tmp_path / "x.o").touch()
    program(tmp_path / "cuobjdump", f"[ \"$2 $3\" = '-arch sm_90a' ] && cat '{tmp_path}/listing'")
    program(tmp_path / "nvdisasm", "exit 1")
    found = sass_check.Disassembler.find(None, tmp_path)
    assert found
    kernels, bad = sass_check.check_memory_bound(found, {"x": tmp_path / "x.o"})
    assert list(kernels) == ["gelu_kernel<bf16>", "row_sum_kernel"] and bad == broken


# ---- real objects, where nvcc has left some and a disassembler is at hand ----
@pytest.fixture
def tools() -> sass_check.Disassembler:
    found = sass_check.Disassembler.find(os.environ.get("NVCC") or "nvcc")
    if not found:
        pytest.skip(sass_check.NO_DISASSEMBLER)
    return found


def test_the_isa_tests_hold_the_instructions_that_they_are_of(tools: sass_check.Disassembler) -> None:
    obj = OBJECTS / "sm90" / "emulator" / "test" / "test_isa.o"
    if not obj.exists():
        pytest.skip(f"{obj} is not built")
    kernels, bad = sass_check.check(tools, {"test_isa": obj})
    assert kernels["isa_wgmma_kernel<128, true, 0, 0>"].count("HGMMA") >= 1
    assert kernels["isa_wgmma_kernel<128, true, 0, 0>"].count("WARPGROUP.DEPBAR") >= 1
    assert kernels["isa_wgmma_kernel<128, true, 0, 0>"].highest >= 63  # its accumulators alone are 64
    assert kernels["isa_tma_load_kernel<4>"].count("UTMALDG") == 1
    assert kernels["isa_tma_store_kernel<float>"].count("UTMAREDG") >= 1
    assert kernels["isa_shuffle_kernel"].count("SHFL") == 4
    assert kernels["isa_approximate_kernel"].count("MUFU.EX2") == 1
    assert "test_isa: isa_mma_kernel has 1 HMMA: mma.sync instead of wgmma" in bad


def test_the_hopper_kernels_keep_the_rules(tools: sass_check.Disassembler) -> None:
    objects = {s: OBJECTS / Path(s).with_suffix(".o") for s in sass_check.sources() if sass_check.is_hopper(s)}
    if not objects or not all(obj.exists() for obj in objects.values()):
        pytest.skip("no Hopper kernels are built")
    assert sass_check.check(tools, objects)[1] == []


def test_the_memory_bound_kernels_keep_theirs(tools: sass_check.Disassembler) -> None:
    objects = {s: OBJECTS / Path(s).with_suffix(".o") for s in sass_check.sources() if sass_check.is_memory_bound(s)}
    if not all(obj.exists() for obj in objects.values()):
        pytest.skip("the kernels are not built")
    kernels, bad = sass_check.check_memory_bound(tools, objects)
    assert bad == [] and len(kernels) > 40 and len(objects) >= 8
