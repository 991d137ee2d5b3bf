"""The live progress line: what a person sees on a terminal, with and without mpirun, and what a file gets."""
import os
import pty
import subprocess

import pytest

from conftest import MPIRUN, TRAIN, Lab


def on_terminal(command: list[str]) -> str:
    """The output of a command that runs on a pseudo-terminal."""
    primary, secondary = pty.openpty()
    process = subprocess.Popen(command, stdout=secondary, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    os.close(secondary)
    chunks = []
    while True:
        try:
            chunk = os.read(primary, 65536)
        except OSError:  # the last writer has closed its end
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(primary)
    assert process.wait(timeout=60) == 0
    return b"".join(chunks).decode()


@pytest.mark.parametrize("launcher", [[], [MPIRUN, "-np", "2"]])
def test_progress_line_is_live_on_a_terminal(lab: Lab, launcher: list[str]) -> None:
    config = lab.config("run", {"train.max_steps": 200, "eval.interval": 0, "checkpoint.interval": 0})
    text = on_terminal([*map(str, launcher), str(TRAIN), "--config", str(config)])
    lines = text.split("\r\x1b[K")
    assert len(lines) >= 3, text
    last = lines[-1].split("\n")[0]
    for part in ("step 200/200", "loss ", "lr ", "norm ", "tok/s", "100%", "ETA 0s"):
        assert part in last


def test_a_file_gets_few_whole_lines(lab: Lab) -> None:
    result = lab.train("run", {"train.max_steps": 200, "eval.interval": 0, "checkpoint.interval": 0})
    assert "\r" not in result.out
    steps = [line for line in result.out.splitlines() if line.startswith("step ")]
    assert 2 <= len(steps) <= 4 and steps[-1].startswith("step 200/200")
