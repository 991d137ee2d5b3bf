"""scripts/plot_loss.py: the picture shows the numbers that the run wrote; what is no number is seen to be none."""
import json
import math
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import plot_loss

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "plot_loss.py"


def step(n: int, loss: object, **more: object) -> str:
    record = {"type": "step", "step": n, "tokens": 512 * n, "loss": loss, "grad_norm": 1 / n, "learning_rate": 1e-3}
    return json.dumps({**record, "step_ms": 50.0, "phase_ms": {"forward": 20.0}, **more})


def evaluation(n: int, loss: object) -> str:
    return json.dumps({"type": "eval", "step": n, "val_loss": loss, "perplexity": 5.0, "tokens": 65536})


def curve(n: int, floor: float = 1.5) -> list[str]:
    lines = ['{"type": "run", "world": 2}']
    for i in range(1, n + 1):
        lines.append(step(i, floor + 4 / i))
        if i % 10 == 0:
            lines.append(evaluation(i, floor + 4 / i + 0.125))
    return [*lines, '{"type": "event", "step": 3, "what": "checkpoint"}', '{"type": "sample", "step": 3, "text": "x"}']


def write(folder: Path, lines: list[str], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines) + tail)
    return folder


def axes_of(folders: list[Path], x: str = "step") -> dict:
    names = plot_loss.labels(list(map(str, folders)))
    runs = [plot_loss.read_run(str(f), label) for f, label in zip(folders, names, strict=True)]
    return dict(zip(("loss", "rate", "norm"), plot_loss.make_figure(runs, x).axes, strict=True))


def legend(ax: Any) -> list[str]:
    return [t.get_text() for t in ax.get_legend().get_texts()]


def run(*args: object, code: int = 0, python: Sequence[str] = (), cwd: Path | None = None) -> str:
    command = [sys.executable, *python, str(SCRIPT), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and (code or not done.stderr)  # no warning of matplotlib's either
    return done.stderr if code else done.stdout


def pixels(path: Path) -> tuple[int, int, bytes]:
    """Width, height and pixel rows of a PNG, with every checksum verified."""
    data, at, chunks = path.read_bytes(), 8, []
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + size
    assert chunks[0][0] == b"IHDR" and chunks[-1][0] == b"IEND"
    width, height = struct.unpack(">II", chunks[0][1][:8])
    return width, height, zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))


# ---- the picture ----


def test_one_run_shows_its_numbers(tmp_path: Path) -> None:
    axes = axes_of([write(tmp_path / "demo", curve(40))])
    raw, smooth, val = axes["loss"].lines
    assert list(raw.get_xdata()) == list(range(1, 41))
    assert list(raw.get_ydata()) == [1.5 + 4 / i for i in range(1, 41)]
    assert (list(smooth.get_xdata()), list(smooth.get_ydata())) == plot_loss.smoothed(range(1, 41), raw.get_ydata())
    assert list(val.get_xdata()) == [10, 20, 30, 40]
    assert list(val.get_ydata()) == [1.625 + 4 / i for i in (10, 20, 30, 40)]
    assert legend(axes["loss"]) == ["train", "val 1.725 at step 40"]
    assert "demo" in axes["loss"].get_title("left")
    assert [len(axes[k].lines) for k in ("rate", "norm")] == [1, 2]
    assert list(axes["rate"].lines[0].get_ydata()) == [1e-3] * 40
    assert list(axes["norm"].lines[0].get_ydata()) == [1 / i for i in range(1, 41)]


def test_several_runs_are_told_apart(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, curve(30, floor)) for name, floor in (("a", 1.0), ("b", 2.0), ("_c$x$", 3.0))]
    axes = axes_of(folders)["loss"]
    assert len(axes.lines) == 9
    assert len({line.get_color() for line in axes.lines}) == 3
    names = ["a", "b", r" _c\$x\$"]  # no hidden entry, no formula
    assert legend(axes) == [f"{name}: val {i}.258 at step 30" for i, name in enumerate(names, 1)]
    twins = [str(write(tmp_path / parent / "run", curve(3))) for parent in ("x", "y")]
    assert plot_loss.labels(twins) == twins


def test_tokens_axis_places_evaluations_by_what_was_trained(tmp_path: Path) -> None:
    """An eval record's own token count is that of the validation text; steps between logged ones are interpolated."""
    lines = [step(5, 4.0), step(11, 3.0), evaluation(1, 4.5), evaluation(6, 3.5), evaluation(11, 3.25)]
    raw, _, val = axes_of([write(tmp_path / "a", lines)], "tokens")["loss"].lines
    assert list(raw.get_xdata()) == [512 * 5, 512 * 11]
    assert list(val.get_xdata()) == [512, 512 * 6, 512 * 11]


def test_smoothing_follows_the_curve_and_calms_the_noise() -> None:
    x = list(range(3000))
    noisy = [2 + (-1) ** i * 0.5 for i in x]
    at, means = plot_loss.smoothed(x, noisy)
    assert at[0] == 0 and at[-1] == 2999 and 900 < len(at) < 1100
    assert max(abs(m - 2) for m in means[100:]) < 0.02
    falling = [6 - i / 1000 for i in x]
    at, means = plot_loss.smoothed(x, falling)
    assert max(abs(m - falling[int(i)]) for i, m in zip(at, means, strict=True) if i < 2900) < 1e-9  # it does not lag
    spiked = [1e30 if i == 100 else 2.0 for i in x]
    at, means = plot_loss.smoothed(x, spiked)
    assert all(m == 2.0 for i, m in zip(at, means, strict=True) if i > 200)  # a spike spoils nothing after it
    assert plot_loss.smoothed([5], [1.25]) == ([5], [1.25])


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "-Infinity", "null", '"NaN"', '"-inf"', "true", "[1]", '"x"'])
def test_a_loss_that_is_no_number_is_a_gap_and_a_mark(tmp_path: Path, bad: str) -> None:
    lines = curve(20)
    lines[5] = step(5, "LOSS").replace('"LOSS"', bad)
    axes = axes_of([write(tmp_path / "a", [*lines, evaluation(21, math.nan)])])["loss"]
    raw, _, mark, val = axes.lines
    assert [i for i, v in zip(raw.get_xdata(), raw.get_ydata(), strict=True) if not math.isfinite(v)] == [5]
    assert list(mark.get_xdata()) == [5]
    assert "not a number (1x)" in legend(axes)
    assert list(val.get_xdata()) == [10, 20]


def test_the_last_record_of_a_step_counts_and_order_does_not_matter(tmp_path: Path) -> None:
    raw = axes_of([write(tmp_path / "a", [step(2, 9.0), step(3, 3.0), step(1, 5.0), step(2, 4.0)])])["loss"].lines[0]
    assert list(raw.get_xdata()) == [1, 2, 3] and list(raw.get_ydata()) == [5.0, 4.0, 3.0]


def test_torn_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    junk = ["", "not json", "[1, 2]", "3", '"text"', '{"type": "step"}', '{"type": "step", "step": "NaN", "loss": 1}',
            '{"type": "novelty", "step": 5}', "\x00\x00", "[" * 100_000, '{"type": "step", "step": 1' + "0" * 400 + "}"]
    folder = write(tmp_path / "a", junk + curve(10) + junk, tail=step(11, 1.0)[:40])
    (folder / "metrics.jsonl").open("ab").write(b"\xff\xfe")
    raw = axes_of([folder])["loss"].lines[0]
    assert list(raw.get_xdata()) == list(range(1, 11))


# ---- the command ----


LITTLE = {"step": step(1, 5.5), "evaluation": evaluation(1, 5.5), "zero": step(1, 0.0),
          "NaN": step(1, math.nan), "NaN evaluation": evaluation(1, math.nan)}


@pytest.mark.parametrize("lines", [*([line] for line in LITTLE.values()), curve(300)], ids=[*LITTLE, "300 steps"])
def test_writes_a_valid_png_beside_the_metrics(tmp_path: Path, lines: list[str]) -> None:
    folder = write(tmp_path / "a", lines)
    assert run(folder).strip() == str(folder / "loss.png")
    assert sorted(p.name for p in folder.iterdir()) == ["loss.png", "metrics.jsonl"]
    width, height, rows = pixels(folder / "loss.png")
    assert width > 1200 and height > 800 and len(set(rows)) > 20


def test_where_the_picture_goes(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, curve(12)) for name in "ab")
    assert run(a, b, cwd=tmp_path).strip() == "loss.png"
    pixels(tmp_path / "loss.png")
    run(a, "--out", tmp_path / "here.png", "--x", "tokens")
    pixels(tmp_path / "here.png")
    assert not (a / "loss.png").exists()
    (a / "loss.png").write_text("an old one")
    assert run("metrics.jsonl", cwd=a).strip() == "loss.png"
    run(a, "--out", tmp_path / "again.png")
    pictures = (a / "loss.png", tmp_path / "again.png", tmp_path / "here.png")
    step_axis, again, token_axis = (p.read_bytes() for p in pictures)
    assert step_axis == again != token_axis


@pytest.mark.parametrize(
    "args, code, words",
    [
        ([], 2, ["RUN"]),
        (["a", "--x", "epochs"], 2, ["epochs", "tokens"]),
        (["none"], 3, ["none", "no such file", "expected a run's folder"]),
        (["hollow"], 3, ["hollow/metrics.jsonl", "no such file"]),
        (["empty"], 3, ["empty/metrics.jsonl", "no step and no eval record yet"]),
        (["start"], 3, ["start/metrics.jsonl", "no step and no eval record yet"]),
        (["a", "start"], 3, ["start/metrics.jsonl"]),
        (["bare", "--x", "tokens"], 3, ["bare", "use --x step"]),
        (["a", "--out", "nowhere/loss.png"], 5, ["nowhere/loss.png", "--out"]),
    ],
)
def test_errors_name_the_thing_and_the_remedy(tmp_path: Path, args: list[str], code: int, words: list[str]) -> None:
    write(tmp_path / "a", curve(5))
    write(tmp_path / "empty", [])
    write(tmp_path / "start", ['{"type": "run", "step": 0}'], tail='{"type":"step","st')
    write(tmp_path / "bare", ['{"type": "step", "step": 1, "loss": 2.0}'])
    (tmp_path / "hollow").mkdir()
    said = run(*args, code=code, cwd=tmp_path)
    for word in words:
        assert word in said
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.tmp"))


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path) -> None:
    said = run(write(tmp_path / "a", curve(5)), code=2, python=("-I", "-S"))
    assert "matplotlib" in said and "python3-matplotlib" in said
