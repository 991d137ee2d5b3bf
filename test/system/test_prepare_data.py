"""scripts/prepare_data.py: what goes in comes out, whatever the jobs; nothing half-written is ever called a shard.

Shards are read back here by code of their own, from the description of the format, not by the script's.
"""
import array
import fcntl
import hashlib
import importlib.util
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

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_data.py"
END = 256
DATA, IO = 3, 5


def run(*args: object, code: int = 0, **options) -> str:
    """Runs the script (without site-packages), checks its exit code and returns stderr, all it ever prints."""
    command = [sys.executable, "-I", "-S", str(SCRIPT), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", timeout=120, **options)
    assert done.returncode == code, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    return done.stderr


def shard(path: Path) -> tuple[list[int], list[int]]:
    """(the 256 words of the header, the tokens)"""
    raw = path.read_bytes()
    header = array.array("i", raw[:1024])
    tokens = array.array({20240520: "H", 20240801: "I"}[header[0]], raw[1024:])
    assert sys.byteorder == "little" and header.itemsize == 4
    return list(header), list(tokens)


def tokens_of(out: Path, split: str) -> list[int]:
    return [t for p in sorted(out.glob(f"{split}_*.bin")) for t in shard(p)[1]]


def documents(out: Path, split: str) -> list[bytes]:
    """The split's tokens cut at each end-of-text."""
    tokens, docs, start = tokens_of(out, split), [], 0
    while start < len(tokens):
        end = tokens.index(END, start)  # a missing last end-of-text raises
        docs.append(bytes(tokens[start:end]))
        start = end + 1
    return docs


def manifest_of(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


def make(folder: Path, texts: dict[str, bytes]) -> Path:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return folder


def numbered(n: int) -> dict[str, bytes]:
    return {f"part{i % 7}/doc{i:03d}.txt": b"document %d, " % i * (i % 5 + 1) for i in range(n)}


def module():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["prepare_data"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


# ---- content ----


def test_every_byte_value_comes_back_in_bytewise_order_of_names(tmp_path):
    every = bytes(range(1, 256))
    texts = {"b/2.txt": every, "b.txt": "naïve café ☕\r\n".encode(), "B.txt": b"\n\n", "a": every[::-1], "é": b"x"}
    make(tmp_path / "in", texts)
    run(tmp_path / "in", "--out", tmp_path / "out", "--val-fraction", 0)
    assert documents(tmp_path / "out", "train") == [texts[n] for n in sorted(texts, key=os.fsencode)]
    assert not list((tmp_path / "out").glob("val*"))


@pytest.mark.parametrize("token_format, magic, version, width", [("v1", 20240520, 1, 2), ("u32", 20240801, 7, 4)])
def test_headers_counts_and_checksums(tmp_path, token_format, magic, version, width):
    texts = numbered(40)
    out = tmp_path / "new" / "out"  # made, parents too
    run(make(tmp_path / "in", texts), "--out", out, "--shard-tokens", 300, "--format", token_format)
    manifest, total = manifest_of(out), 0
    for name, split in manifest["splits"].items():
        assert [s["file"] for s in split["shards"]] == [f"{name}_{i:06d}.bin" for i in range(len(split["shards"]))]
        for entry in split["shards"]:
            header, tokens = shard(out / entry["file"])
            raw = (out / entry["file"]).read_bytes()
            assert header == [magic, version, entry["tokens"]] + [0] * 253
            assert len(tokens) == entry["tokens"] <= 300
            assert len(raw) == entry["bytes"] == 1024 + width * entry["tokens"]
            assert hashlib.sha256(raw).hexdigest() == entry["sha256"]
        assert split["documents"] == len(documents(out, name))
        assert split["tokens"] == sum(s["tokens"] for s in split["shards"]) == len(tokens_of(out, name))
        total += split["tokens"]
    assert manifest["tokens"] == total == sum(map(len, texts.values())) + len(texts)
    assert manifest["format_version"] == 1 and manifest["token_format"] == token_format
    assert manifest["tokenizer"] == json.loads((out / "tokenizer.json").read_text())
    assert manifest["tokenizer"] == {"type": "bytes", "vocab_size": 257, "end_of_text": 256}
    assert manifest["vocab_size"] == 257
    source = manifest["source"]
    assert (source["documents"], source["bytes"]) == (40, sum(map(len, texts.values())))
    assert source["inputs"] == [str(tmp_path / "in")]
    named = {"manifest.json", "tokenizer.json"} | {s["file"] for v in manifest["splits"].values() for s in v["shards"]}
    assert set(files(out)) == named


def test_both_formats_hold_the_same_tokens(tmp_path):
    make(tmp_path / "in", numbered(12))
    for token_format in ("v1", "u32"):
        run(tmp_path / "in", "--out", tmp_path / token_format, "--format", token_format)
    for split in ("train", "val"):
        assert tokens_of(tmp_path / "v1", split) == tokens_of(tmp_path / "u32", split) != []


def test_same_bytes_for_any_jobs_and_any_order_on_disk(tmp_path):
    texts = numbered(60)
    make(tmp_path / "one" / "in", texts)
    make(tmp_path / "two" / "in", dict(reversed(texts.items())))
    for place, jobs in (("one", 1), ("two", 4)):
        run("in", "--out", "out", "--jobs", jobs, "--shard-tokens", 250, cwd=tmp_path / place)
    got = files(tmp_path / "one" / "out")
    assert got == files(tmp_path / "two" / "out")
    assert len(got) > 6


def test_order_of_inputs_does_not_matter(tmp_path):
    make(tmp_path / "a", {"2.txt": b"two", "4.txt": b"four"})
    make(tmp_path / "b", {"1.txt": b"one", "3.txt": b"three"})
    for out, inputs in (("ab", ("a", "b")), ("ba", ("b", "a"))):
        run(*inputs, "--out", out, "--val-fraction", 0, cwd=tmp_path)
        assert documents(tmp_path / out, "train") == [b"one", b"two", b"three", b"four"]


def test_documents_longer_than_a_shard_are_cut_and_none_is_lost(tmp_path):
    """Tiny shards put the cut everywhere, also just before an end-of-text."""
    texts = {"a": b"abcdefgh", "b": b"i", "c": b"jk", "d": b"lmnopqrstuvwxyz"}
    make(tmp_path / "in", texts)
    whole = [t for text in texts.values() for t in (*text, END)]
    for size in (1, 2, 3, 5, 9, 29, 30, 31, 100):
        out = tmp_path / f"out{size}"
        run(tmp_path / "in", "--out", out, "--val-fraction", 0, "--shard-tokens", size)
        sizes = [len(shard(p)[1]) for p in sorted(out.glob("train_*.bin"))]
        assert tokens_of(out, "train") == whole
        assert len(sizes) == -(-len(whole) // size) and max(sizes) <= size and max(sizes) - min(sizes) <= 1


def test_document_longer_than_the_read_buffer(tmp_path):
    text = bytes(1 + i % 255 for i in range(1 << 16)) * 150  # 9.8 MB
    make(tmp_path, {"long.txt": text})
    run(tmp_path / "long.txt", "--out", tmp_path / "out", "--val-fraction", 0.5, "--shard-tokens", "3M")
    parts = [b"".join(documents(tmp_path / "out", s)) for s in ("train", "val")]
    assert b"".join(parts) == text and len(parts[0]) == len(parts[1])


# ---- validation split ----


def test_split_follows_names_so_new_files_leave_old_ones_in_place(tmp_path):
    texts = numbered(200)
    run(make(tmp_path / "in", texts), "--out", tmp_path / "before", "--val-fraction", 0.25)
    new = {f"new/{i}.txt": b"new %d" % i for i in range(50)}
    run(make(tmp_path / "in", new), "--out", tmp_path / "after", "--val-fraction", 0.25)
    val = set(documents(tmp_path / "before", "val"))
    assert 30 <= len(val) <= 70
    old = set(texts.values())
    assert {d for d in documents(tmp_path / "after", "val") if d in old} == val
    assert set(documents(tmp_path / "after", "train")).isdisjoint(documents(tmp_path / "after", "val"))
    run(tmp_path / "in", "--out", tmp_path / "other", "--val-fraction", 0.25, "--seed", 7)
    assert set(documents(tmp_path / "other", "val")) != set(documents(tmp_path / "after", "val"))


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.999999999])
@pytest.mark.parametrize("n", [2, 3, 9])
def test_neither_split_is_empty(tmp_path, fraction, n):
    run(make(tmp_path / "in", numbered(n)), "--out", tmp_path / "out", "--val-fraction", fraction)
    train, val = (documents(tmp_path / "out", s) for s in ("train", "val"))
    assert len(train) >= 1 and len(val) >= 1 and len(train) + len(val) == n


SIZES = [(1000, 0.1, 100), (999, 0.05, 50), (3, 0.1, 1), (2, 0.9, 1), (1, 0.1, 0)]


@pytest.mark.parametrize("size, fraction, n_val", SIZES)
def test_a_single_file_gives_its_end_to_val(tmp_path, size, fraction, n_val):
    text = bytes(97 + i % 26 for i in range(size))
    run(make(tmp_path, {"a.txt": text}) / "a.txt", "--out", tmp_path / "out", "--val-fraction", fraction)
    assert documents(tmp_path / "out", "train") == [text[: size - n_val]]
    assert documents(tmp_path / "out", "val") == ([text[size - n_val :]] if n_val else [])


# ---- what is read ----


def test_binary_files_are_skipped_and_counted_unless_wanted(tmp_path):
    late = b"x" * (5 << 20) + b"\0"  # the NUL lies beyond the first chunk
    make(tmp_path / "in", {"a.txt": b"text", "late": late, "n.bin": b"\0"})
    said = run(tmp_path / "in", "--out", tmp_path / "out", "--val-fraction", 0)
    assert "skipped 2 binary" in said
    assert documents(tmp_path / "out", "train") == [b"text"]
    assert manifest_of(tmp_path / "out")["source"]["skipped"] == {"binary": 2}
    run(tmp_path / "in", "--out", tmp_path / "all", "--val-fraction", 0, "--binary")
    assert documents(tmp_path / "all", "train") == [b"text", late, b"\0"]


def test_links_loops_duplicates_and_things_that_are_no_files(tmp_path):
    folder = make(tmp_path / "in", {"a.txt": b"A", "sub/b.txt": b"B", "empty.txt": b"", ".git/config": b"hidden"})
    make(tmp_path / "elsewhere", {"c.txt": b"C"})
    (folder / "sub" / "up").symlink_to(folder)  # a loop through the parent
    (folder / "me").symlink_to("me")  # a link to itself
    (folder / "gone").symlink_to("nowhere")
    (folder / "again.txt").symlink_to("sub/b.txt")
    (folder / "other").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe")  # to open it would wait for ever
    said = run(folder, folder / "a.txt", folder, "--out", tmp_path / "out", "--val-fraction", 0)
    assert documents(tmp_path / "out", "train") == [b"A", b"B", b"C"]
    skipped = manifest_of(tmp_path / "out")["source"]["skipped"]
    assert skipped == {"broken link": 4, "duplicate": 7, "empty": 1, "hidden": 2, "special": 2}  # the folder came twice
    assert "skipped 4 broken link, 7 duplicate, 1 empty, 2 hidden, 2 special" in said


def test_the_output_folder_is_not_an_input(tmp_path):
    make(tmp_path, {"a.txt": b"A", "b.txt": b"B"})
    for _ in range(2):
        run(tmp_path, "--out", tmp_path / "out", "--overwrite", "--binary")
        assert manifest_of(tmp_path / "out")["source"]["documents"] == 2


def test_include_and_exclude_choose_within_folders(tmp_path):
    make(tmp_path / "in", {"a.txt": b"A", "sub/b.txt": b"B", "sub/c.md": b"C", "skip/d.txt": b"D", "e.rst": b"E"})
    options = ("--include", "*.txt", "--include", "*.md", "--exclude", "skip/*", "--val-fraction", 0)
    run(tmp_path / "in", tmp_path / "in" / "e.rst", *options, "--out", tmp_path / "out")
    assert documents(tmp_path / "out", "train") == [b"A", b"E", b"B", b"C"]  # e.rst was named


def test_max_bytes_cuts_the_last_document(tmp_path):
    make(tmp_path / "in", {"a": b"aaaa", "b": b"bbbb", "c": b"cccc"})
    for limit, expected in ((3, [b"aaa"]), (4, [b"aaaa"]), (6, [b"aaaa", b"bb"]), (99, [b"aaaa", b"bbbb", b"cccc"])):
        run(tmp_path / "in", "--out", tmp_path / "out", "--overwrite", "--val-fraction", 0, "--max-bytes", limit)
        assert documents(tmp_path / "out", "train") == expected


def test_names_that_are_not_utf8(tmp_path):
    """They sort as bytes: 0xff after the emoji's 0xf0, though as characters it would be before."""
    folder, out = (Path(os.fsdecode(os.fsencode(tmp_path) + name)) for name in (b"/in\xff", b"/out\xff"))
    make(folder, {os.fsdecode(b"\xff.txt"): b"second", "\U0001f600.txt": b"first"})
    run(folder, "--out", out, "--val-fraction", 0)
    assert documents(out, "train") == [b"first", b"second"]


def test_the_python_library(tmp_path):
    script = module()
    sys_argv, sys.argv = sys.argv, ["prepare_data", "--python-stdlib", "--out", str(tmp_path)]
    try:
        args = script.arguments()
    finally:
        sys.argv = sys_argv
    names = [d.name for d in script.find(args, script.Counter())]
    assert {"argparse.py", "json/decoder.py"} <= set(names) and len(names) > 300
    assert names == sorted(names, key=os.fsencode) and all(n.endswith(".py") for n in names)
    assert not [n for n in names if {"test", "tests", "site-packages", "dist-packages", "idlelib"} & set(n.split("/"))]
    run("--python-stdlib", "--out", tmp_path / "out")
    manifest = manifest_of(tmp_path / "out")
    assert manifest["tokens"] == manifest["source"]["bytes"] + manifest["source"]["documents"] > 3_000_000
    assert 0.02 < manifest["splits"]["val"]["tokens"] / manifest["tokens"] < 0.3
    text = Path(argparse_file()).read_bytes()
    assert text in documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")


def argparse_file() -> str:
    import argparse

    return argparse.__file__


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
def test_errors_name_the_thing_and_the_remedy(tmp_path, args, code, words):
    make(tmp_path / "in", {"a.txt": b"A", "zero": b"\0", "none": b""})
    (tmp_path / "hollow").mkdir()
    said = run(*args, "--out", "out", code=code, cwd=tmp_path)
    for word in words:
        assert word in said
    assert not (tmp_path / "out").exists() or files(tmp_path / "out") == {}


def test_out_is_required_and_must_be_a_folder(tmp_path):
    make(tmp_path, {"a.txt": b"A", "out": b"a file"})
    assert "--out" in run("a.txt", code=2, cwd=tmp_path)
    assert "give --out a folder" in run("a.txt", "--out", "out", code=IO, cwd=tmp_path)
    assert (tmp_path / "out").read_bytes() == b"a file"


def test_a_file_that_shrinks_is_an_error_that_names_it(tmp_path):
    script = module()
    make(tmp_path, {"a.txt": b"12345"})
    path = str(tmp_path / "a.txt")
    with pytest.raises(script.Failure) as e:
        list(script.encode(script.Shard("train_000000.bin", 9, [(path, 0, 8, True)]), "v1", lambda n: None))
    assert e.value.args[0] == IO and f"{path}: shrank" in e.value.args[1] and "3 bytes" in e.value.args[1]


# ---- the set on disk ----


def test_an_existing_set_is_kept_unless_overwritten(tmp_path):
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


def test_a_failed_overwrite_leaves_the_old_set(tmp_path):
    """A limit on file size stands in for a full disk: write() fails in the middle of a shard."""
    out = tmp_path / "out"
    make(tmp_path / "in", numbered(30))
    run(tmp_path / "in", "--out", out)
    before = files(out)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # noqa: E731
    said = run(tmp_path / "in", "--out", out, "--overwrite", "--shard-tokens", 2000, code=IO, preexec_fn=limit)
    assert ".bin.tmp: File too large; free some space" in said
    assert files(out) == before


def test_two_writers_do_not_share_a_folder(tmp_path):
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
def test_killed_at_any_instant_no_half_set_passes_for_a_whole_one(tmp_path, old_set):
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


def test_one_plain_line_without_a_terminal(tmp_path):
    said = run(make(tmp_path / "in", numbered(20)), "--out", tmp_path / "out")
    assert said.count("\n") == 1 and "\r" not in said and "\033" not in said
    manifest = manifest_of(tmp_path / "out")
    tokens = {name: v["tokens"] for name, v in manifest["splits"].items()}
    counts = f"{tokens['train']:,} train + {tokens['val']:,} val tokens in 2 shards"
    assert said == f"{tmp_path / 'out'}: 20 documents, {counts}\n"


def test_a_bar_on_a_terminal(tmp_path):
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
