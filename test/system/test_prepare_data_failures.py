"""scripts/prepare_data.py when it cannot do what it was asked, is killed or is watched: it names the thing and the
remedy, and nothing half-written is ever called a shard."""
import fcntl
import hashlib
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import prepare_data
from prepared import DATA, IO, SCRIPT, files, make, manifest_of, numbered, run, shard

# ---- errors ----


@pytest.mark.parametrize(
    "args, code, words",
    [
        ([], 2, ["name a text file or folder", "--python-stdlib"]),
        (["in", "--val-fraction", "1"], 2, ["--val-fraction is 1.0", "expected 0 <= F < 1"]),
        (["in", "--val-fraction", "nan"], 2, ["--val-fraction is nan"]),
        (["in", "--val-fraction", "-0.1"], 2, ["--val-fraction"]),
        (["in", "--shard-tokens", "0"], 2, ["--shard-tokens", "'0'"]),
        (["in", "--jobs", "two"], 2, ["--jobs", "'two'"]),
        (["in", "--max-bytes", "K"], 2, ["--max-bytes", "'K'"]),
        (["in", "--format", "v2"], 2, ["--format", "v2", "u32"]),
        (["nowhere.txt"], DATA, ["nowhere.txt", "no such file or folder", "check the path"]),
        (["hollow"], DATA, ["no text", "--include"]),
        (["in", "--include", "*.pdf"], DATA, ["no text", "--include"]),
        (["in/zero"], DATA, ["no text", "skipped 1 binary", "--binary"]),
        (["in/none"], DATA, ["no text", "skipped 1 empty"]),
        (["/proc/self/mem"], IO, ["/proc/self/mem", "Input/output error", "--exclude"]),
    ],
)
def test_errors_name_the_thing_and_the_remedy(tmp_path: Path, args: list[str], code: int, words: list[str]) -> None:
    make(tmp_path / "in", {"a.txt": b"A", "zero": b"\0", "none": b""})
    (tmp_path / "hollow").mkdir()
    said = run(*args, "--out", "out", code=code, cwd=tmp_path)
    for word in words:
        assert word in said
    assert not (tmp_path / "out").exists() or files(tmp_path / "out") == {}


def test_out_is_required_and_must_be_a_folder(tmp_path: Path) -> None:
    make(tmp_path, {"a.txt": b"A", "out": b"a file"})
    assert "--out" in run("a.txt", code=2, cwd=tmp_path)
    assert "give --out a folder" in run("a.txt", "--out", "out", code=IO, cwd=tmp_path)
    assert (tmp_path / "out").read_bytes() == b"a file"


def test_a_file_that_shrinks_is_an_error_that_names_it(tmp_path: Path) -> None:
    make(tmp_path, {"a.txt": b"12345"})
    path = str(tmp_path / "a.txt")
    with pytest.raises(prepare_data.Failure) as e:
        shard = prepare_data.Shard("train_000000.bin", 9, [(path, 0, 8, True)])
        list(prepare_data.encode(shard, "v1", prepare_data.BYTES, lambda n: None))
    assert e.value.args[0] == IO and f"{path}: shrank" in e.value.args[1] and "3 bytes" in e.value.args[1]


# ---- the set on disk ----


def test_an_existing_set_is_kept_unless_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(tmp_path / "in", numbered(30))
    run(tmp_path / "in", "--out", out, "--shard-tokens", 100)
    (out / "notes.txt").write_text("mine")
    (out / "train_1.bin").write_text("not ours")
    before = files(out)
    assert "holds manifest.json already" in run(tmp_path / "in", "--out", out, code=2)
    assert files(out) == before
    run(tmp_path / "in", "--out", out, "--overwrite")
    mine = {"notes.txt", "train_1.bin"}
    assert set(files(out)) == mine | {"manifest.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"}


def test_a_failed_overwrite_leaves_the_old_set(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: write() fails in the middle of a shard."""
    out = tmp_path / "out"
    make(tmp_path / "in", numbered(30))
    run(tmp_path / "in", "--out", out)
    before = files(out)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    said = run(tmp_path / "in", "--out", out, "--overwrite", "--shard-tokens", 2000, code=IO, preexec_fn=limit)
    assert ".bin.tmp: File too large; free some space" in said
    assert files(out) == before


def test_two_writers_do_not_share_a_folder(tmp_path: Path) -> None:
    make(tmp_path, {"a.txt": b"A", "out/keep": b""})
    folder = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    assert "another prepare_data.py" in run(tmp_path / "a.txt", "--out", tmp_path / "out", code=IO)
    os.close(folder)
    run(tmp_path / "a.txt", "--out", tmp_path / "out")


# Runs the script as if the machine stopped at its n-th call that touches the folder: before the call takes effect.
KILL_AT = """
import os, runpy, signal, sys
left = int(sys.argv.pop(1))
def deadly(call):
    def wrapped(*args, **kw):
        global left
        left -= 1
        if left < 0: os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kw)
    return wrapped
for name in ("fsync", "replace", "unlink"): setattr(os, name, deadly(getattr(os, name)))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def is_whole(out: Path) -> bool:
    """With a manifest, the set is exactly what the manifest says; without one it is no set."""
    if not (out / "manifest.json").exists():
        return False
    entries = [s for v in manifest_of(out)["splits"].values() for s in v["shards"]]
    assert sorted(s["file"] for s in entries) == sorted(p.name for p in out.glob("*.bin"))
    for s in entries:
        assert hashlib.sha256((out / s["file"]).read_bytes()).hexdigest() == s["sha256"]
    assert json.loads((out / "tokenizer.json").read_text())["type"] == "bytes"
    return True


@pytest.mark.parametrize("old_set", [False, True], ids=["fresh", "overwrite"])
def test_killed_at_any_instant_no_half_set_passes_for_a_whole_one(tmp_path: Path, old_set: bool) -> None:
    """Killed before its n-th fsync, rename or unlink, for every n; then run again, to the same end."""
    out, new = tmp_path / "out", make(tmp_path / "new", numbered(6))
    options = ["--out", out, "--jobs", 1, *(["--overwrite"] if old_set else [])]
    run(new, "--out", tmp_path / "expected")
    if old_set:  # it has more shards than the new one
        run(make(tmp_path / "in", numbered(9)), "--out", tmp_path / "old", "--shard-tokens", 99)
    killed = untouched = 0
    while True:
        shutil.rmtree(out, ignore_errors=True)
        if old_set:
            shutil.copytree(tmp_path / "old", out)
        command = [sys.executable, "-I", "-S", "-c", KILL_AT, killed, SCRIPT, new, *options]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
        for path in out.glob("*.bin"):  # whatever has a shard's name is a whole shard
            header, tokens = shard(path)
            assert len(tokens) == header[2]
        whole, named = is_whole(out), {p.name for p in out.iterdir() if not p.name.startswith(".")}
        if done.returncode == 0:
            assert whole
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        killed += 1
        untouched += named == ({p.name for p in (tmp_path / "old").iterdir()} if old_set else set())
        run(new, *options, *(["--overwrite"] if named and not old_set else []))
        assert files(out) == files(tmp_path / "expected")  # and no temporary file is left
    assert killed >= 8
    assert untouched >= 5  # four files are synced before any is renamed


# ---- what the user sees ----


def test_one_plain_line_without_a_terminal(tmp_path: Path) -> None:
    said = run(make(tmp_path / "in", numbered(20)), "--out", tmp_path / "out")
    assert said.count("\n") == 1 and "\r" not in said and "\033" not in said
    manifest = manifest_of(tmp_path / "out")
    tokens = {name: v["tokens"] for name, v in manifest["splits"].items()}
    counts = f"{tokens['train']:,} train + {tokens['val']:,} val tokens in 2 shards"
    assert said == f"{tmp_path / 'out'}: 20 documents, {counts}\n"


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    make(tmp_path / "in", {f"{i}.txt": b"x" * 1000 for i in range(50)})
    ours, theirs = pty.openpty()
    command = [sys.executable, str(SCRIPT), str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert subprocess.run(command, stderr=theirs, timeout=60).returncode == 0
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 65536)
        except OSError:  # the terminal's other side is closed and all is read
            break
    os.close(ours)
    assert b"\rreading [" in said and b"\rwriting [" in said and b"100 %" in said
    last = said.rpartition(b"\r\033[K")[2]  # what stays when the bar has been wiped
    assert last.startswith(os.fsencode(tmp_path / "out") + b": 50 documents") and last.count(b"\n") == 1
