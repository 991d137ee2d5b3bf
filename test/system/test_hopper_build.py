"""cuda.mk's rules for kernels/cuda/*_sm90.cu. A stand-in for nvcc prints messages that a real nvcc has printed.

Seen to fail: ARCH not overridden, a message left out, an object left behind that the next make takes for built.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from conftest import REPO, Result, program, run


def built(folder: Path, says: str, code: int = 0) -> tuple[Result, Path]:
    """make of a Hopper kernel's object, for other GPUs as well."""
    for name in ("Makefile", "cuda.mk", "scripts/build/nvcc.sh"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, folder / name)
    source = folder / "kernels" / "cuda" / "add_sm90.cu"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.touch()
    program(
        folder / "nvcc",
        f'echo "$@" >{folder}/flags\nwhile [ "$1" != -o ]; do shift; done; touch "$2"\n'
        f"cat <<'END'\n{says}\nEND\nexit {code}",
    )
    obj = folder / "build" / "release" / "obj" / "cuda" / "kernels" / "cuda" / "add_sm90.o"
    command = ["make", "-C", folder, f"NVCC={folder}/nvcc", "ARCH=80 100", "DEPS=0", obj.relative_to(folder)]
    return run(command, {"MAKEFLAGS": ""}), obj


def test_hopper_kernels_are_compiled_for_hopper_alone(tmp_path: Path) -> None:
    done, obj = built(tmp_path, "ptxas info    : Used 168 registers, used 1 barriers")
    assert done.code == 0 and obj.exists(), done
    assert re.findall(r"code=(\w+)", (tmp_path / "flags").read_text()) == ["sm_90a", "compute_90a"]


@pytest.mark.parametrize(
    "says, code",
    [
        (
            "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
            "wgmma pipeline crossing function boundary at a function call in the function 'add_kernel'",
            0,
        ),
        (
            "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
            "non wgmma instructions reading accumulator registers of  a wgmma between start and end of the "
            "pipeline stage",
            0,
        ),
        (
            "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register "
            "count at entry.",
            0,
        ),
        ("ptxas info    : setmaxnreg ignored to maintain minimum register requirements.", 0),
        ("ptxas error   : Registers are spilled to local memory in function 'add_kernel', 788 bytes spill stores", 255),
    ],
    ids=["C7510", "C7514", "C7508", "setmaxnreg", "spill"],
)
def test_what_ptxas_only_informs_of_fails_the_build(tmp_path: Path, says: str, code: int) -> None:
    done, obj = built(tmp_path, says, code)
    assert done.code == 2 and says in done.err
    assert not obj.exists()  # or the next make would find it up to date
