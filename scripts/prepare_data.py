#!/usr/bin/env python3
"""Turn text files into the token shards that ./train reads.  Needs Python 3.10 or newer and nothing else.

    scripts/prepare_data.py --python-stdlib --out data/shards/python     # real text, no download
    scripts/prepare_data.py book.txt notes/ --out data/shards/mine       # your own files and folders
    scripts/prepare_data.py book.txt --chars --out data/shards/book      # a token for each different character

Tokens are the bytes 0..255; 256, end-of-text, follows every document.  With --chars they are the places of the
characters in the sorted list of those that occur, ASCII alone, and nothing follows a document.  One file is one
document.  --out receives
train_000000.bin ..., val_000000.bin ..., tokenizer.json and manifest.json (counts, checksums, source).

The layout of every shard is known before the first byte is written, so any number of jobs writes the same bytes.
Shards grow under temporary names; when all are on disk they are renamed, and the manifest comes last.  A run that
fails or is killed leaves the old files as they were; a set without manifest.json was cut off while being renamed.

Exit codes: 0 done, 2 usage, 3 nothing to tokenise, 5 the system refused a read or write, 130 interrupted.
"""
import argparse
import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import re
import stat
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

USAGE, DATA, IO = 2, 3, 5
BYTES = {"type": "bytes", "vocab_size": 257, "end_of_text": 256}
# Text read as Latin-1 is one character per byte; encoded again it is one token per byte, at the speed of C.
FORMATS = {"v1": (20240520, 1, "utf-16-le"), "u32": (20240801, 7, "utf-32-le")}  # magic, version, tokens
OURS = re.compile(r"(train|val)_\d{6,}\.bin|manifest\.json|tokenizer\.json")
STDLIB_SKIP = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib"})  # not the library itself
temporary = "{}/.{}.tmp".format  # of (out, file); no glob for *.bin finds it
CHUNK = 4 << 20  # bytes of text in memory at a time, per job


class Failure(Exception):
    """(exit code, message)"""


@contextlib.contextmanager
def naming(path: str, advice: str) -> Iterator[None]:
    """A failed write() does not say which file it was about; this does."""
    try:
        yield
    except OSError as e:
        raise Failure(IO, f"{path}: {e.strerror or e}; {advice}") from e


class Document(NamedTuple):
    name: str  # path below the input folder: it sorts the document and decides its split
    path: str
    start: int = 0
    size: int = 0  # bytes


def progress(label: str, total: int) -> Callable[[int], None]:
    """A bar on stderr, if a person is watching.  Threads share it: a count may be lost, which only the bar shows."""
    done, shown = 0, -1

    def advance(n: int) -> None:
        nonlocal done, shown
        done += n
        percent = min(100, 100 * done // max(total, 1))
        if percent != shown and sys.stderr.isatty():
            shown, bar = percent, ("#" * (percent // 4)).ljust(25, ".")
            print(f"\r{label} [{bar}] {percent:3d} % of {total / 1e6:,.1f} MB ", end="", file=sys.stderr, flush=True)

    return advance


def parallel(task: Callable, items: list, jobs: int) -> Iterator:
    """map() over threads, results in order: reading, hashing and writing run outside the interpreter's lock."""
    with ThreadPoolExecutor(jobs) as pool:
        for i in range(0, len(items), 1024):  # a million futures at once would be gigabytes
            yield from pool.map(task, items[i : i + 1024])


def walk(root: str, skip_folders: frozenset[str], out: os.stat_result, skipped: Counter) -> Iterator[Document]:
    """Every file below root.  Each folder is entered once, real ones before links to them, so loops end."""
    folders, links = [("", root)], list[tuple[str, str]]()
    seen = {(out.st_dev, out.st_ino)}  # never read what we write
    while folders or links:
        prefix, folder = folders.pop() if folders else links.pop(0)
        with naming(folder, "make it readable, or leave it out of the inputs"):
            info = os.stat(folder)
            if (info.st_dev, info.st_ino) in seen:
                continue
            names = sorted(os.listdir(folder), key=os.fsencode)
        seen.add((info.st_dev, info.st_ino))
        for name in names:
            path = os.path.join(folder, name)
            if name.startswith("."):
                skipped["hidden"] += 1
            elif not os.path.isdir(path):
                yield Document(prefix + name, path)
            elif name not in skip_folders:
                (links if os.path.islink(path) else folders).append((f"{prefix}{name}/", path))


def find(args: argparse.Namespace, skipped: Counter) -> list[Document]:
    """All documents, sorted bytewise by name; a file that is reached twice counts once."""
    roots: list[tuple[str, list[str], list[str], frozenset[str]]]  # path, globs in and out, folders to skip
    roots = [(path, args.include, args.exclude, frozenset()) for path in args.inputs]
    if args.python_stdlib:
        roots.append((sysconfig.get_path("stdlib"), ["*.py"], [], STDLIB_SKIP))
    found: dict[tuple[int, int], Document] = {}
    for root, include, exclude, skip_folders in roots:
        if not os.path.lexists(root):
            raise Failure(DATA, f"{root}: no such file or folder; check the path")
        if os.path.isdir(root):
            docs = [d for d in walk(root, skip_folders, os.stat(args.out), skipped)
                    if any(fnmatch.fnmatchcase(d.name, g) for g in include or ["*"])
                    and not any(fnmatch.fnmatchcase(d.name, g) for g in exclude)]
        else:  # named by the user: no filter applies
            docs = [Document(os.path.basename(root), root)]
        for doc in docs:
            if os.path.islink(doc.path) and not os.path.exists(doc.path):
                skipped["broken link"] += 1
                continue
            with naming(doc.path, "leave it out of the inputs"):
                info = os.stat(doc.path)
            if not stat.S_ISREG(info.st_mode):  # to open a pipe would be to wait for ever
                skipped["special"] += 1
            elif (info.st_dev, info.st_ino) in found:
                skipped["duplicate"] += 1
            else:
                found[info.st_dev, info.st_ino] = doc._replace(size=info.st_size)
    return sorted(found.values(), key=lambda d: os.fsencode(d.name))


def scan(docs: list[Document], args: argparse.Namespace, skipped: Counter) -> list[Document]:
    """The documents that hold text, with their true sizes; --max-bytes cuts the last one and drops what follows."""
    left = limit = args.max_bytes or 2**62

    def size_of(doc: Document) -> int:  # -1: not wanted
        size = 0
        with naming(doc.path, "make it readable, or leave it out with --exclude"), open(doc.path, "rb", 0) as f:
            while chunk := f.read(min(CHUNK, limit - size)):
                if not args.binary and b"\0" in chunk:
                    return -1
                size += len(chunk)
        return size

    kept, advance = [], progress("reading", sum(d.size for d in docs))
    for doc, size in zip(docs, parallel(size_of, docs, args.jobs), strict=True):
        advance(doc.size)
        if size <= 0:
            skipped["binary" if size < 0 else "empty"] += 1
            continue
        kept.append(doc._replace(size=min(size, left)))
        left -= kept[-1].size
        if left == 0:
            break
    return kept


def characters(docs: list[Document], args: argparse.Namespace) -> dict:
    """The tokenizer of --chars."""

    def found_in(doc: Document) -> set[int]:
        found, left = set(), doc.size
        with naming(doc.path, "it was readable a moment ago; run again"), open(doc.path, "rb", 0) as f:
            while left > 0 and (chunk := f.read(min(CHUNK, left))):
                found |= set(chunk)
                left -= len(chunk)
        if max(found) > 127:
            raise Failure(DATA, f"{doc.path}: byte {max(found)} is no ASCII character; --chars needs ASCII text, leave "
                                "it out for byte tokens")
        return found

    every = sorted(set().union(*parallel(found_in, docs, args.jobs)))
    return {"type": "chars", "vocab_size": len(every), "end_of_text": None, "characters": bytes(every).decode("ascii")}


def split(docs: list[Document], fraction: float, seed: int) -> dict[str, list[Document]]:
    """A document's split follows from its name and the seed alone, so new files leave the old ones in place."""
    if fraction == 0 or (len(docs) == 1 and docs[0].size < 2):
        return {"train": docs}
    if len(docs) == 1:  # one file: its end is the validation text
        d = docs[0]
        n = min(d.size - 1, max(1, round(d.size * fraction)))
        return {"train": [d._replace(size=d.size - n)], "val": [d._replace(start=d.size - n, size=n)]}
    scores = [int(hashlib.sha256(b"%d\0%s" % (seed, os.fsencode(d.name))).hexdigest(), 16) / 2**256 for d in docs]
    val = {i for i, s in enumerate(scores) if s < fraction} or {scores.index(min(scores))}  # neither may be empty
    if len(val) == len(docs):
        val.remove(scores.index(max(scores)))
    return {"train": [d for i, d in enumerate(docs) if i not in val], "val": [docs[i] for i in sorted(val)]}


class Shard(NamedTuple):
    file: str
    tokens: int
    segments: list[tuple[str, int, int, bool]]  # path, first byte, bytes, does end-of-text follow


def lay_out(name: str, docs: list[Document], shard_tokens: int, end_of_text: bool) -> list[Shard]:
    """Shards of one size, give or take a token, so that none is too small to hold a sequence."""
    total = sum(d.size + end_of_text for d in docs)
    n = -(-total // shard_tokens)
    shards = [Shard(f"{name}_{i:06d}.bin", total // n + (i < total % n), []) for i in range(n)]
    i, room = 0, shards[0].tokens
    for d in docs:
        at, end = 0, d.size + end_of_text  # in tokens; the last one is end-of-text
        while at < end:
            if room == 0:
                i, room = i + 1, shards[i + 1].tokens
            stop = min(at + room, end)
            shards[i].segments.append((d.path, d.start + at, min(stop, d.size) - at, end_of_text and stop == end))
            at, room = stop, room - (stop - at)
    return shards


def encode(shard: Shard, token_format: str, tokenizer: dict, advance: Callable[[int], None]) -> Iterator[bytes]:
    """The shard's bytes: 256 int32 of header, then the tokens; little-endian on every machine."""
    magic, version, codec = FORMATS[token_format]
    places = {ord(c): i for i, c in enumerate(tokenizer.get("characters", ""))}
    number = bytes(places.get(b, b) for b in range(256))  # a byte's token
    yield b"".join(n.to_bytes(4, "little") for n in (magic, version, shard.tokens, *[0] * 253))
    for path, start, left, ends in shard.segments:
        with naming(path, "it was readable a moment ago; run again"), open(path, "rb", 0) as f:
            f.seek(start)
            while left > 0:
                chunk = f.read(min(CHUNK, left))
                if not chunk:
                    raise Failure(IO, f"{path}: shrank while it was read, {left} bytes are missing; run again")
                yield chunk.translate(number).decode("latin-1").encode(codec)
                left -= len(chunk)
                advance(len(chunk))
        if ends:
            yield chr(tokenizer["end_of_text"]).encode(codec)


def write_temporary(out: str, file: str, pieces: Iterable[bytes]) -> dict:
    """Writes under the temporary name, checked down to the disk.  Returns what the manifest says of the bytes."""
    path, digest, size = temporary(out, file), hashlib.sha256(), 0
    with naming(path, "free some space or choose another --out"), open(path, "wb", CHUNK) as f:
        for piece in pieces:
            f.write(piece)
            digest.update(piece)
            size += len(piece)
        f.flush()
        os.fsync(f.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_shards(shards: list[Shard], tokenizer: dict, args: argparse.Namespace) -> dict[str, dict]:
    """All shards under their temporary names; what the manifest says of each, by name."""
    advance = progress("writing", sum(s.tokens for s in shards))

    def write(s: Shard) -> tuple[str, dict]:
        written = write_temporary(args.out, s.file, encode(s, args.format, tokenizer, advance))
        return s.file, {"file": s.file, "tokens": s.tokens, **written}

    return dict(parallel(write, shards, args.jobs))


def publish(out: str, folder: int, shards: list[str], tokenizer: dict, manifest: dict) -> None:
    """Gives the finished files their names.  While the set is neither the old nor the new, it has no manifest."""
    for file, value in (("tokenizer.json", tokenizer), ("manifest.json", manifest)):
        write_temporary(out, file, [(json.dumps(value, indent=2) + "\n").encode()])
    files = [*shards, "tokenizer.json"]
    with naming(out, "the set there is incomplete; run again with --overwrite"):
        # manifest.json sorts first; then what is left of a larger old set, which would be trained on
        for old in sorted({f for f in os.listdir(out) if OURS.fullmatch(f)}.difference(files)):
            os.unlink(os.path.join(out, old))
            os.fsync(folder)
        for file in (*files, "manifest.json"):
            os.replace(temporary(out, file), os.path.join(out, file))
            os.fsync(folder)


@contextlib.contextmanager
def output_folder(out: str, overwrite: bool) -> Iterator[int]:
    """The folder, ours alone until exit.  Temporary files are removed at the end, those of a killed run as well."""
    with naming(out, "give --out a folder that can be written"):
        os.makedirs(out, exist_ok=True)
        folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Failure(IO, f"{out}: another prepare_data.py is at work there; wait for it") from None
    except OSError:
        pass  # NFS cannot lock a folder
    old = sorted(f for f in os.listdir(out) if OURS.fullmatch(f))
    if old and not overwrite:
        raise Failure(USAGE, f"{out}: holds {old[0]} already; give --overwrite or another --out")
    try:
        yield folder
    finally:
        for f in os.listdir(out):
            if f.startswith(".") and f.endswith(".tmp") and OURS.fullmatch(f[1:-4]):
                os.unlink(os.path.join(out, f))


def prepare(args: argparse.Namespace, folder: int) -> str:
    skipped: Counter[str] = Counter()
    docs = scan(find(args, skipped), args, skipped)
    note = "; skipped " + ", ".join(f"{n} {why}" for why, n in sorted(skipped.items())) if skipped else ""
    if not docs:
        raise Failure(DATA, f"no text in the inputs{note}; check --include and --exclude, and --binary for NUL bytes")
    tokenizer = characters(docs, args) if args.chars else BYTES
    ends = tokenizer["end_of_text"] is not None
    limit = min(args.shard_tokens, 2**31 - 1)  # the header counts in 31 bits
    parts = split(docs, args.val_fraction, args.seed)
    shards = {name: lay_out(name, part, limit, ends) for name, part in parts.items()}
    written = write_shards([s for some in shards.values() for s in some], tokenizer, args)
    splits: dict[str, dict[str, Any]]
    splits = {name: {"documents": len(part), "tokens": sum(s.tokens for s in shards[name]),
                     "shards": [written[s.file] for s in shards[name]]} for name, part in parts.items()}
    source = {"documents": len(docs), "bytes": sum(d.size for d in docs), "skipped": dict(sorted(skipped.items())),
              "python": sysconfig.get_python_version(),
              **{k: v for k, v in vars(args).items() if k not in ("out", "jobs", "overwrite", "format")}}
    manifest = {"format_version": 1, "tokenizer": tokenizer, "vocab_size": tokenizer["vocab_size"],
                "token_format": args.format, "tokens": sum(part["tokens"] for part in splits.values()),
                "splits": splits, "source": source}
    publish(args.out, folder, list(written), tokenizer, manifest)
    kinds = f" of {tokenizer['vocab_size']} characters" if args.chars else ""
    tokens = " + ".join(f"{part['tokens']:,} {name}" for name, part in splits.items())
    return f"{args.out}: {len(docs):,} documents, {tokens} tokens in {len(written):,} shards{kinds}{note}"


def count(text: str) -> int:
    """4096, 500k, 100M or 2G: powers of ten."""
    scale = {"K": 10**3, "M": 10**6, "G": 10**9}.get(text[-1:].upper())
    value = int(text[:-1]) * scale if scale else int(text)
    if value < 1:
        raise ValueError
    return value


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description="Turn text files into token shards for ./train (bytes, vocab_size 257; or --chars).")
    p.add_argument("inputs", nargs="*", metavar="PATH", help="text file, or folder that is searched to the bottom")
    p.add_argument("--python-stdlib", action="store_true", help="the Python library's sources on this machine")
    p.add_argument("--out", required=True, metavar="DIR", help="folder for shards and manifest, made if absent")
    p.add_argument("--chars", action="store_true", help="a token for each different character; ASCII text only")
    p.add_argument("--val-fraction", type=float, default=0.1, metavar="F", help="part of the documents (default 0.1)")
    p.add_argument("--seed", type=int, default=1337, help="picks the val documents (default 1337)")
    p.add_argument("--include", action="append", default=[], metavar="GLOB", help="in folders, only these: '*.txt'")
    p.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="in folders, not these: 'build/*'")
    p.add_argument("--binary", action="store_true", help="keep files with NUL bytes, which are skipped otherwise")
    p.add_argument("--max-bytes", type=count, metavar="N", help="of text in all: 100M, 2G (default: no limit)")
    p.add_argument("--shard-tokens", type=count, default=10**8, metavar="N", help="at most, per shard (default 100M)")
    p.add_argument("--format", choices=FORMATS, default="v1", help="v1: 2 bytes per token, u32: 4 (default v1)")
    p.add_argument("--jobs", type=count, default=min(8, os.cpu_count() or 1), help="threads (default %(default)s)")
    p.add_argument("--overwrite", action="store_true", help="replace the set in --out")
    args = p.parse_args()
    if not args.inputs and not args.python_stdlib:
        p.error("name a text file or folder, or give --python-stdlib")
    if not 0 <= args.val_fraction < 1:
        p.error(f"--val-fraction is {args.val_fraction}, expected 0 <= F < 1")
    return args


def main() -> int:
    args = arguments()
    try:
        with output_folder(args.out, args.overwrite) as folder:
            code, message = 0, prepare(args, folder)
    except Failure as e:
        code, message = e.args
    except OSError as e:
        code, message = IO, str(e)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    print("\r\033[K" * sys.stderr.isatty() + "prepare_data: " * (code != 0) + message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
