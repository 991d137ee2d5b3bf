"""scripts/prepare_data.py: what goes in comes out, whatever the jobs.  For failures: test_prepare_data_failures.py."""
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

import prepare_data
from prepared import END, documents, files, make, manifest_of, numbered, run, shard, tokens_of

# ---- content ----


def test_every_byte_value_comes_back_in_bytewise_order_of_names(tmp_path: Path) -> None:
    every = bytes(range(1, 256))
    texts = {"b/2.txt": every, "b.txt": "naïve café ☕\r\n".encode(), "B.txt": b"\n\n", "a": every[::-1], "é": b"x"}
    make(tmp_path / "in", texts)
    run(tmp_path / "in", "--out", tmp_path / "out", "--val-fraction", 0)
    assert documents(tmp_path / "out", "train") == [texts[n] for n in sorted(texts, key=os.fsencode)]
    assert not list((tmp_path / "out").glob("val*"))


@pytest.mark.parametrize("token_format, magic, version, width", [("v1", 20240520, 1, 2), ("u32", 20240801, 7, 4)])
def test_headers_counts_and_checksums(tmp_path: Path, token_format: str, magic: int, version: int, width: int) -> None:
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


def test_characters_are_their_places_in_the_sorted_list(tmp_path: Path) -> None:
    """Over several documents, shards and jobs: nothing between documents, and the end of one file is the val text."""
    texts = {"a": b"Zoo!\n" * 50, "b": b"a zoo?\n" * 30}
    run(make(tmp_path / "in", texts), "--chars", "--out", tmp_path / "two", "--val-fraction", 0, "--shard-tokens", 99)
    letters = "\n !?Zaoz"
    assert "".join(letters[t] for t in tokens_of(tmp_path / "two", "train")).encode() == texts["a"] + texts["b"]
    tokenizer = {"type": "chars", "vocab_size": 8, "end_of_text": None, "characters": letters}
    assert json.loads((tmp_path / "two" / "tokenizer.json").read_text()) == tokenizer
    manifest = manifest_of(tmp_path / "two")
    assert manifest["tokenizer"] == tokenizer and manifest["vocab_size"] == 8 and manifest["tokens"] == 460
    said = run(tmp_path / "in" / "a", "--chars", "--out", tmp_path / "one")
    assert "225 train + 25 val tokens in 2 shards of 4 characters" in said
    assert tokens_of(tmp_path / "one", "val") == [2, 3, 3, 1, 0] * 5
    (tmp_path / "in" / "c").write_text("café")
    said = run(tmp_path / "in", "--chars", "--out", tmp_path / "three", code=3)
    assert "in/c: byte 195 is no ASCII character; --chars needs ASCII text" in said


def test_both_formats_hold_the_same_tokens(tmp_path: Path) -> None:
    make(tmp_path / "in", numbered(12))
    for token_format in ("v1", "u32"):
        run(tmp_path / "in", "--out", tmp_path / token_format, "--format", token_format)
    for split in ("train", "val"):
        assert tokens_of(tmp_path / "v1", split) == tokens_of(tmp_path / "u32", split) != []


def test_same_bytes_for_any_jobs_and_any_order_on_disk(tmp_path: Path) -> None:
    texts = numbered(60)
    make(tmp_path / "one" / "in", texts)
    make(tmp_path / "two" / "in", dict(reversed(texts.items())))
    for place, jobs in (("one", 1), ("two", 4)):
        run("in", "--out", "out", "--jobs", jobs, "--shard-tokens", 250, cwd=tmp_path / place)
    got = files(tmp_path / "one" / "out")
    assert got == files(tmp_path / "two" / "out")
    assert len(got) > 6


def test_order_of_inputs_does_not_matter(tmp_path: Path) -> None:
    make(tmp_path / "a", {"2.txt": b"two", "4.txt": b"four"})
    make(tmp_path / "b", {"1.txt": b"one", "3.txt": b"three"})
    for out, inputs in (("ab", ("a", "b")), ("ba", ("b", "a"))):
        run(*inputs, "--out", out, "--val-fraction", 0, cwd=tmp_path)
        assert documents(tmp_path / out, "train") == [b"one", b"two", b"three", b"four"]


def test_documents_longer_than_a_shard_are_cut_and_none_is_lost(tmp_path: Path) -> None:
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


def test_document_longer_than_the_read_buffer(tmp_path: Path) -> None:
    text = bytes(1 + i % 255 for i in range(1 << 16)) * 150  # 9.8 MB
    make(tmp_path, {"long.txt": text})
    run(tmp_path / "long.txt", "--out", tmp_path / "out", "--val-fraction", 0.5, "--shard-tokens", "3M")
    parts = [b"".join(documents(tmp_path / "out", s)) for s in ("train", "val")]
    assert b"".join(parts) == text and len(parts[0]) == len(parts[1])


# ---- validation split ----


def test_split_follows_names_so_new_files_leave_old_ones_in_place(tmp_path: Path) -> None:
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
def test_neither_split_is_empty(tmp_path: Path, fraction: float, n: int) -> None:
    run(make(tmp_path / "in", numbered(n)), "--out", tmp_path / "out", "--val-fraction", fraction)
    train, val = (documents(tmp_path / "out", s) for s in ("train", "val"))
    assert len(train) >= 1 and len(val) >= 1 and len(train) + len(val) == n


SIZES = [(1000, 0.1, 100), (999, 0.05, 50), (3, 0.1, 1), (2, 0.9, 1), (1, 0.1, 0)]


@pytest.mark.parametrize("size, fraction, n_val", SIZES)
def test_a_single_file_gives_its_end_to_val(tmp_path: Path, size: int, fraction: float, n_val: int) -> None:
    text = bytes(97 + i % 26 for i in range(size))
    run(make(tmp_path, {"a.txt": text}) / "a.txt", "--out", tmp_path / "out", "--val-fraction", fraction)
    assert documents(tmp_path / "out", "train") == [text[: size - n_val]]
    assert documents(tmp_path / "out", "val") == ([text[size - n_val :]] if n_val else [])


# ---- what is read ----


def test_binary_files_are_skipped_and_counted_unless_wanted(tmp_path: Path) -> None:
    late = b"x" * (5 << 20) + b"\0"  # the NUL lies beyond the first chunk
    make(tmp_path / "in", {"a.txt": b"text", "late": late, "n.bin": b"\0"})
    said = run(tmp_path / "in", "--out", tmp_path / "out", "--val-fraction", 0)
    assert "skipped 2 binary" in said
    assert documents(tmp_path / "out", "train") == [b"text"]
    assert manifest_of(tmp_path / "out")["source"]["skipped"] == {"binary": 2}
    run(tmp_path / "in", "--out", tmp_path / "all", "--val-fraction", 0, "--binary")
    assert documents(tmp_path / "all", "train") == [b"text", late, b"\0"]


def test_links_loops_duplicates_and_things_that_are_no_files(tmp_path: Path) -> None:
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


def test_the_output_folder_is_not_an_input(tmp_path: Path) -> None:
    make(tmp_path, {"a.txt": b"A", "b.txt": b"B"})
    for _ in range(2):
        run(tmp_path, "--out", tmp_path / "out", "--overwrite", "--binary")
        assert manifest_of(tmp_path / "out")["source"]["documents"] == 2


def test_include_and_exclude_choose_within_folders(tmp_path: Path) -> None:
    make(tmp_path / "in", {"a.txt": b"A", "sub/b.txt": b"B", "sub/c.md": b"C", "skip/d.txt": b"D", "e.rst": b"E"})
    options = ("--include", "*.txt", "--include", "*.md", "--exclude", "skip/*", "--val-fraction", 0)
    run(tmp_path / "in", tmp_path / "in" / "e.rst", *options, "--out", tmp_path / "out")
    assert documents(tmp_path / "out", "train") == [b"A", b"E", b"B", b"C"]  # e.rst was named


def test_max_bytes_cuts_the_last_document(tmp_path: Path) -> None:
    make(tmp_path / "in", {"a": b"aaaa", "b": b"bbbb", "c": b"cccc"})
    for limit, expected in ((3, [b"aaa"]), (4, [b"aaaa"]), (6, [b"aaaa", b"bb"]), (99, [b"aaaa", b"bbbb", b"cccc"])):
        run(tmp_path / "in", "--out", tmp_path / "out", "--overwrite", "--val-fraction", 0, "--max-bytes", limit)
        assert documents(tmp_path / "out", "train") == expected


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """They sort as bytes: 0xff after the emoji's 0xf0, though as characters it would be before."""
    folder, out = (Path(os.fsdecode(os.fsencode(tmp_path) + name)) for name in (b"/in\xff", b"/out\xff"))
    make(folder, {os.fsdecode(b"\xff.txt"): b"second", "\U0001f600.txt": b"first"})
    run(folder, "--out", out, "--val-fraction", 0)
    assert documents(out, "train") == [b"first", b"second"]


def test_the_python_library(tmp_path: Path) -> None:
    sys_argv, sys.argv = sys.argv, ["prepare_data", "--python-stdlib", "--out", str(tmp_path)]
    try:
        args = prepare_data.arguments()
    finally:
        sys.argv = sys_argv
    names = [d.name for d in prepare_data.find(args, prepare_data.Counter())]
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
