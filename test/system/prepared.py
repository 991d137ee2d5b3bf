"""Shared by the tests of scripts/prepare_data.py: a way to run it, and readers of what it leaves.

Shards are read back here by code of their own, from the description of the format, not by the script's.
"""
import array
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_data.py"
END = 256
DATA, IO = 3, 5


def run(
    *args: object, code: int = 0, cwd: Path | None = None, preexec_fn: Callable[[], object] | None = None
) -> str:
    """Runs the script (without site-packages), checks its exit code and returns stderr, all it ever prints."""
    command = [sys.executable, "-I", "-S", str(SCRIPT), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", timeout=120, cwd=cwd,
                          preexec_fn=preexec_fn)
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
    manifest: dict = json.loads((out / "manifest.json").read_text())
    return manifest


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


