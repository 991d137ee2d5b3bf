"""Training over several hosts: network namespaces with links of their own, ranks started by mpirun, its host file and a
stand-in for ssh.  Hosts share the machine's files unless a test mounts something over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from conftest import TRAIN, Lab, Result, Settings, run
from hosts import CLUSTER, Hosts

MakeHosts = Callable[..., Hosts]


def start(
    cluster: Hosts, lab: Lab, name: str, settings: Settings | None = None, np: int = 2, flags: Sequence[str] = ()
) -> Result:
    """mpirun over the hosts, a rank on each in turn."""
    command = [CLUSTER, "run", "-np", np, TRAIN, *flags, "--config", lab.config(name, settings)]
    return run(command, env=cluster.env)


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
