"""scripts/build/bundle.sh: its archive is complete, small enough, and runs where nothing of this machine is but glibc.

The CPU's programs stand in for the GPU's, which take minutes to build and load the same libraries and CUDA's.  Seen to
fail: a library left out of the closure, hydra_pmi_proxy left out, a wrapper that forgets LD_LIBRARY_PATH, kernels of
four architectures packed, programs older than their kernels packed, a README whose demo has no data.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from conftest import REPO, TRAIN, Result, run

BUILD = TRAIN.resolve().parent
STANDS_IN = dict.fromkeys(("train", "bench_attention"), TRAIN.resolve().name) | dict.fromkeys(
    ("test_native", "test_mpi_native", "test_isa_native", "test_isa_sm90_native"), "test_mpi"
)
FROM_THE_MACHINE = re.compile(r"(lib(c|m|dl|rt|pthread|resolv|util|mvec)|ld-linux-x86-64|lib(cuda|cublasLt|nccl))\.so")
ARCHITECTURES = ("80", "86", "89", "90a", "100")
FEW = "-tc=*broadcast*,*gather*"

pytestmark = pytest.mark.skipif(
    not (BUILD / "test_mpi").exists() or not shutil.which("mpiexec.hydra"), reason="needs test_mpi and MPICH"
)


def pack(build: Path, archive: Path, **env: object) -> Result:
    return run([REPO / "scripts" / "build" / "bundle.sh", build, archive], {"LEVEL": 1} | env)


def compiled(build: Path, source: str, architectures: Sequence[str]) -> Path:
    """Makes the object that nvcc makes of a kernel's source, older than the programs; returns the objects' folder."""
    folder = build.parent / build.name.split("-")[0] / "obj" / "cuda" / "kernels" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    line = "ptxas info    : Compiling entry function '_Z3add' for 'sm_{}'\n"
    lines = [line.format(a) for a in architectures] or ["ptxas info    : 0 bytes gmem\n"]
    (folder / f"{source}.o.ptxas").write_text("".join(lines))
    (folder / f"{source}.o").touch()
    os.utime(folder / f"{source}.o", (0, 0))
    return folder


def programs(build: Path) -> Path:
    build.mkdir(exist_ok=True)
    for name, source in STANDS_IN.items():
        (build / name).symlink_to(BUILD / source)
    compiled(build, "backend", ())
    compiled(build, "gelu", ARCHITECTURES)
    compiled(build, "gelu_sm90", ["90a"])
    return build


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return programs(tmp_path_factory.mktemp("build") / "release-x86-64-v3")


@pytest.fixture(scope="module")
def unpacked(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle")
    archive = path / "new" / f"x.tar.{'zst' if shutil.which('zstd') else 'xz'}"
    done = pack(build, archive)
    assert done.code == 0, done.err
    assert list(archive.parent.iterdir()) == [archive]
    subprocess.run(["tar", "-C", path, "-xf", archive], check=True)
    shutil.rmtree(archive.parent)
    return path / "kiln-bundle"


def elf_files(bundle: Path) -> list[Path]:
    return [p for p in bundle.rglob("*") if p.is_file() and not p.is_symlink() and p.read_bytes()[:4] == b"\x7fELF"]


def test_every_library_is_inside_or_named_in_the_readme(unpacked: Path) -> None:
    inside = {p.name for p in (unpacked / "lib").iterdir()}
    files = elf_files(unpacked)
    assert {"train", "mpiexec.hydra", "hydra_pmi_proxy", "libmpich.so.12"} <= {p.name for p in files}
    for path in files:
        dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        for needed in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic):
            assert needed in inside or FROM_THE_MACHINE.match(needed), f"{path.name} needs {needed}"
    assert "libstdc++.so.6" in inside and "libgomp.so.1" in inside
    assert not [name for name in inside if FROM_THE_MACHINE.match(name)]


def test_the_readme_names_the_newest_glibc_that_is_used(unpacked: Path) -> None:
    symbols = subprocess.run(["objdump", "-T", *elf_files(unpacked)], capture_output=True, text=True).stdout
    newest = max(int(v) for v in re.findall(r"GLIBC_2\.(\d+)", symbols))
    assert f"glibc 2.{newest} or newer" in (unpacked / "README.txt").read_text()


def test_nothing_but_the_system_is_in_the_environment(unpacked: Path) -> None:
    clean = ["env", "-i", "PATH=/usr/bin:/bin"]
    one = run([*clean, unpacked / "train", "--help"])
    assert one.code == 0 and "--config" in one.out, one.err
    two = run([*clean, unpacked / "mpirun", "-np", 2, unpacked / "bin" / "test_mpi_native", FEW])
    assert two.code == 0 and " 0 failed" in two.out, two.out + two.err
    assert "0 passed" not in two.out


def test_two_ranks_where_only_glibc_and_a_shell_are(unpacked: Path, tmp_path: Path) -> None:
    jail = tmp_path / "jail"
    if os.geteuid() != 0 or run(["unshare", "--mount", "--pid", "--fork", "true"]).code != 0:
        pytest.skip("needs root and unshare")
    tools = [shutil.which(t) for t in ("bash", "env", "basename", "dirname", "readlink")]
    libraries = set()
    for tool in tools:
        libraries |= set(re.findall(r"(/\S+\.so\S*)", run(["ldd", tool]).out))
    glibc = Path(next(p for p in libraries if "/libc.so.6" in p)).parent
    parts = ("m.so.6", "dl.so.2", "pthread.so.0", "rt.so.1", "resolv.so.2", "util.so.1")
    libraries |= {str(glibc / f"lib{part}") for part in parts}
    for path in [*tools, *libraries]:
        target = jail / str(path).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    if not (jail / "bin").exists():
        (jail / "bin").symlink_to("usr/bin")  # scripts begin with #!/bin/bash
    for folder in ("proc", "dev", "tmp"):
        (jail / folder).mkdir(exist_ok=True)
    shutil.copytree(unpacked, jail / "kiln-bundle", symlinks=True)
    inside = f"mount -t proc proc {jail}/proc && mount --rbind /dev {jail}/dev && exec chroot {jail} " \
             f"env -i PATH=/usr/bin:/bin bash -c 'cd /kiln-bundle && ./mpirun -np 2 bin/test_mpi_native \"{FEW}\"'"
    done = run(["unshare", "--mount", "--pid", "--fork", "bash", "-c", inside])
    assert done.code == 0 and " 0 failed" in done.out, done.out + done.err
    assert "0 passed" not in done.out


def test_the_bundle_checks_itself(unpacked: Path, tmp_path: Path) -> None:
    """gpu_check.py in the bundle: finds the programs in bin/, and says that there is no GPU."""
    none = {"OUT": tmp_path, "STAGE": "tests", "CUDA_VISIBLE_DEVICES": ""}
    done = run([unpacked / "scripts" / "gpu" / "gpu_check.py"], none)
    assert done.code == 1 and "no usable GPU" in done.out, done.out + done.err


def test_the_demo_of_the_readme_runs(unpacked: Path) -> None:
    text = (unpacked / "README.txt").read_text()
    assert "Needed there: an x86-64-v3 CPU" in text
    data, train = re.findall(r"^    (python3 scripts/prepare_data.*|./mpirun .*)$", text, re.M)
    try:
        done = run(data.split(), cwd=unpacked)
        assert done.code == 0, done.err
        short = {"device.kind": "cpu", "train.max_steps": 2, "schedule.warmup_steps": 0, "eval.interval": 0}
        words = [word for key, value in short.items() for word in ("--set", f"{key}={value}")]
        done = run([*train.split(), *words], cwd=unpacked)
        assert done.code == 0, done.out + done.err
    finally:
        shutil.rmtree(unpacked / "runs", ignore_errors=True)


def test_over_the_limit_is_an_error(build: Path, tmp_path: Path) -> None:
    done = pack(build, tmp_path / "x.tar.xz", LEVEL=0, LIMIT_MB=1)
    assert done.code == 1
    assert "over its limit of 1 MB" in done.err and "lib/libmpich.so.12" in done.err


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    done = pack(tmp_path, tmp_path / "x.tar.xz")
    assert done.code == 2
    assert f"{tmp_path}/train is missing; make bundle builds it" in done.err


def test_kernels_must_be_compiled_for_every_architecture(tmp_path: Path) -> None:
    build = programs(tmp_path / "release-x86-64-v3")
    compiled(build, "gelu", ("80", "90", "100"))
    compiled(build, "add", ARCHITECTURES[1:])
    done = pack(build, tmp_path / "x.tar.xz")
    assert done.code == 2
    missing = re.findall(r"(\S+) is not compiled for (\S+); ARCH must have all of 80 86 89 90a 100", done.err)
    assert missing == [("add.cu", "sm_80"), ("gelu.cu", "sm_86"), ("gelu.cu", "sm_89"), ("gelu.cu", "sm_90a")]
    shutil.rmtree(tmp_path / "release")
    done = pack(build, tmp_path / "x.tar.xz")
    assert done.code == 2 and f"no compiled kernels in {tmp_path}/release/obj/cuda/kernels/cuda" in done.err
    assert not (tmp_path / "x.tar.xz").exists()


def test_programs_older_than_their_kernels_are_refused(tmp_path: Path) -> None:
    build = programs(tmp_path / "release")
    later = time.time() + 60
    os.utime(compiled(build, "gelu", ARCHITECTURES) / "gelu.o", (later, later))
    done = pack(build, tmp_path / "x.tar.xz")
    assert done.code == 2
    assert done.err.count("/gelu.o; make bundle builds it") == 4 and f"{build}/train is older than" in done.err


def test_an_archive_of_another_kind_is_refused(build: Path, tmp_path: Path) -> None:
    done = pack(build, tmp_path)
    assert done.code == 2 and done.err.startswith("usage: ")
