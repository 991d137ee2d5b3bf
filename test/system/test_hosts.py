"""Training over several hosts: network namespaces with links of their own, ranks started by mpirun, its host file and a
stand-in for ssh.  Hosts share the machine's files unless a test mounts something over them."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence

import pytest

from conftest import ENV, TRAIN, Lab, Result, Settings, run
from hosts import CLUSTER, Hosts

MakeHosts = Callable[..., Hosts]
PARAMETERS = 34208  # of the tiny model
STEPS = 20
SLOW = "20mbit"  # a step takes about 0.1 s


def start(
    cluster: Hosts, lab: Lab, name: str, settings: Settings | None = None, np: int = 2, flags: Sequence[str] = ()
) -> Result:
    """mpirun over the hosts, a rank on each in turn."""
    command = [CLUSTER, "run", "-np", np, TRAIN, *flags, "--config", lab.config(name, settings)]
    return run(command, env=cluster.env)


@pytest.mark.parametrize("n", [2, 4])
def test_hosts_give_the_weights_of_one(lab: Lab, hosts: MakeHosts, n: int) -> None:
    """`ordered` on n hosts has the bits of one rank.  Gradients cross the network: each host sends its parts of
    2 (n-1)/n buffers a step at least.  Seen to fail with: UCX_TLS=sm in a shared namespace of processes."""
    lab.train("one")
    cluster = hosts(n, "1gbit")
    before = cluster.bytes_sent()
    result = start(cluster, lab, "many", np=n)
    assert result.code == 0, result.err
    assert lab.run("many").losses() == lab.run("one").losses()
    assert lab.run("many").hashes(STEPS) == lab.run("one").hashes(STEPS)
    payload = STEPS * PARAMETERS * 4 * 2 * (n - 1) // n
    assert all(now - then > payload for then, now in zip(before, cluster.bytes_sent(), strict=True))


def test_a_host_with_another_config_is_refused(lab: Lab, hosts: MakeHosts) -> None:
    """An edit that reached one host only, and a program that was copied to one host only.  Seen to fail with:
    mpirun_ssh.sh without its checks."""
    cluster = hosts(2)
    ours, theirs = lab.config("run"), lab.config("run", {"optimizer.learning_rate": 0.02}, file="theirs")
    cluster("on", 2, "mount", "--bind", theirs, ours)
    result = start(cluster, lab, "run")
    assert result.code == 2, result.err
    assert "rank(s) 1 have another config than rank 0" in result.error()
    assert not lab.run("run").path.exists()

    cluster("on", 2, "umount", ours)
    cluster("on", 2, "mount", "--bind", "/bin/true", TRAIN.resolve())
    result = start(cluster, lab, "run")
    assert result.code == 2, result.err
    assert f"10.83.0.2 has {TRAIN.resolve()} as" in result.error() and "copy it there" in result.error()


def test_a_host_that_cannot_be_reached(lab: Lab, hosts: MakeHosts) -> None:
    """mpirun alone would wait for ever.  Seen to fail with: mpirun_ssh.sh without its checks."""
    cluster = hosts(2)
    lab.train("run", {"train.max_steps": 10})
    before = lab.run("run").everything()
    cluster("cut", 2)
    result = start(cluster, lab, "run", flags=["--resume"])
    assert result.code == 75, result.err
    assert result.error() == "host 10.83.0.2 cannot be reached: ssh.sh: connect to host 10.83.0.2: No route to host"
    assert lab.run("run").everything() == before


def cut_at_step(cluster: Hosts, lab: Lab, step: int, settings: Settings) -> subprocess.Popen[str]:
    """Starts a run over two hosts and pulls host 2's cable after that step."""
    command = [str(CLUSTER), "run", "-np", "2", str(TRAIN), "--config", str(lab.config("run", settings))]
    process = subprocess.Popen(
        command, env=ENV | cluster.env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    lab.wait_for_step("run", step, process)
    cluster("cut", 2)
    return process


def test_a_link_that_is_down_for_5_seconds(lab: Lab, hosts: MakeHosts) -> None:
    """TCP sends again; the run goes on.  Seen to fail with: run.timeout_seconds 1."""
    cluster = hosts(2, SLOW)
    process = cut_at_step(cluster, lab, 5, {"run.timeout_seconds": 60})
    time.sleep(5)
    cluster("heal", 2)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and not error, error
    assert max(record["step_ms"] for record in lab.run("run").records("step")) >= 4500
    lab.train("one")
    assert lab.run("run").hashes(STEPS) == lab.run("one").hashes(STEPS)


def test_a_link_that_is_down_for_good(lab: Lab, hosts: MakeHosts) -> None:
    """Exit 75 in time, and the run goes on from its checkpoint.  Seen to fail with: kNoDeadline."""
    cluster = hosts(2, SLOW)
    process = cut_at_step(cluster, lab, 12, {"run.timeout_seconds": 3})
    start_s = time.monotonic()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 75, error
    assert time.monotonic() - start_s < 30  # on a busy machine; about 4 s on a quiet one
    assert len(re.findall("error:", error)) == 1 and "no end within 3 s (run.timeout_seconds)" in error, error

    cluster("heal", 2)
    cluster.wait_until_idle(20)
    result = start(cluster, lab, "run", flags=["--resume"])
    assert result.code == 0, result.err
    assert "resuming from" in result.out and "step_10" in result.out
    lab.train("one")
    assert lab.run("run").hashes(STEPS) == lab.run("one").hashes(STEPS)
