"""Several hosts on this machine, for tests of training over a network: scripts/cluster/cluster.sh."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

CLUSTER = Path(__file__).resolve().parents[2] / "scripts" / "cluster" / "cluster.sh"
CANNOT = 3  # the script's exit code where the machine cannot have such hosts


class Hosts:
    """Hosts 1 to n, each with a link of that rate.  They end when this process ends, however it ends: the script holds
    them while its standard input is open."""

    def __init__(self, folder: Path, n: int, rate: str = "") -> None:
        self.env = {"CLUSTER": str(folder)}
        self.hostfile = folder / "hostfile"
        self.holder = subprocess.Popen(
            [CLUSTER, "hold", str(n), rate],
            env=os.environ | self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.holder.stdout
        if self.holder.stdout.readline() != "ready\n":
            why = self.holder.communicate(timeout=10)[1]
            if self.holder.returncode == CANNOT:
                pytest.skip(why.strip())
            raise RuntimeError(f"{CLUSTER.name}: exit {self.holder.returncode}: {why}")

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.holder.communicate(timeout=10)

    def __call__(self, *words: object) -> str:
        """A command of cluster.sh: its output."""
        command = [str(CLUSTER), *map(str, words)]
        done = subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def bytes_sent(self) -> list[int]:
        """By each host."""
        return [int(line.split()[2]) for line in self("bytes").splitlines()]

    def wait_until_idle(self, seconds: float) -> None:
        """Until no host has a process of a job."""
        end = time.monotonic() + seconds
        while left := [p for host in self.hosts() for p in self("processes", host).splitlines()]:
            assert time.monotonic() < end, f"still there after {seconds} s: {left}"
            time.sleep(0.1)

    def hosts(self) -> list[str]:
        return [line.split()[0] for line in self("bytes").splitlines()]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[..., Hosts]]:
    """hosts(n, rate): n hosts with links of that rate; skips the test where this machine cannot have them."""
    with ExitStack() as stack:
        yield lambda n, rate="": stack.enter_context(Hosts(tmp_path / "hosts", n, rate))
