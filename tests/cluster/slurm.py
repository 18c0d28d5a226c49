"""A real Slurm over two hosts: one munged, one slurmctld, a slurmd on each host; started by hand, gone at the end.

Each daemon runs in the foreground in a PID namespace of its own, so whatever it started ends with it, and it ends with
the process that started it. Every file is in one directory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.keeper import die_with
from tests.cluster.hosts import Host, Lab
from tests.process.runs import eventually

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
REQUEUE_S = 6  # Slurm holds a requeued job until the credentials of its last run are void; by default 120 s
COMMAND_S = 30.0  # longest wait for a command
UP_S = 30.0
# In namespaces of its own for names, mounts and processes: with the first process of the last one, all of them end.
ISOLATED = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

CONFIGURATION = """
ClusterName=test
SlurmctldHost=node1({addresses[0]})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire={requeue_s}
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=1
ReturnToService=2
SlurmdTimeout=10
KillWait=10
NodeName=node1 NodeAddr={addresses[0]} CPUs=8 RealMemory=4000 State=UNKNOWN
NodeName=node2 NodeAddr={addresses[1]} CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=1:00:00 State=UP
"""


@dataclass
class Slurm:
    """A running cluster.

    Attributes:
        lab: its hosts.
        directory: configuration, logs and state.
        variables: what its commands need in their environment.
    """

    lab: Lab
    directory: Path
    variables: dict[str, str]

    def run(self, *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        """Run one of Slurm's commands on the first host; what it prints."""
        done = subprocess.run(
            self.lab.hosts[0].command(*command),
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            cwd=cwd,
            env={**os.environ, **(environment or {}), **self.variables},
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}\n{self.logs()}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job, by key."""
        said = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def await_state(self, job: str, *states: str, timeout_s: float = 60.0) -> None:
        """Wait until a job is in one of `states`."""
        eventually(lambda: self.job(job)["JobState"] in states, timeout_s, f"job {job} is {' or '.join(states)}")

    def logs(self) -> str:
        """The ends of all logs, for a failure."""
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in self.directory.glob("*.log"))


def reason_for_none() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"missing: {', '.join(missing)} (Debian: slurmctld, slurmd, slurm-client, munge)" if missing else None


@contextlib.contextmanager
def running(lab: Lab, directory: Path) -> Iterator[Slurm]:
    """A Slurm of two nodes, node1 and node2, ready for jobs."""
    for name in ("state", "spool-node1", "spool-node2"):
        (directory / name).mkdir(parents=True)
    addresses = [host.address for host in lab.hosts]
    configuration = directory / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(addresses=addresses, directory=directory, requeue_s=REQUEUE_S))
    hosts = directory / "hosts"
    names = "".join(f"{address} node{i}\n" for i, address in enumerate(addresses, 1))
    hosts.write_text(f"127.0.0.1 localhost\n{names}")
    slurm = Slurm(lab, directory, {"SLURM_CONF": str(configuration)})
    with contextlib.ExitStack() as daemons:
        key = directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        paths = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munged = [*ISOLATED, "munged", "--foreground", "--force"]
        munged += [f"--{option}={directory}/munge.{ending}" for option, ending in paths.items()]
        daemons.enter_context(_daemon("munged", munged, slurm))
        eventually((directory / "munge.socket").exists, UP_S, "munged listens")
        ctld = _on("node1", lab.hosts[0], hosts, f"slurmctld -D -c -f {configuration}")
        daemons.enter_context(_daemon("slurmctld", ctld, slurm))
        for i, host in enumerate(lab.hosts, 1):
            slurmd = _on(f"node{i}", host, hosts, f"slurmd -D -f {configuration} -N node{i}")
            daemons.enter_context(_daemon(f"slurmd {i}", slurmd, slurm))
        eventually(lambda: _idle_nodes(slurm) == 2, UP_S, f"both nodes are idle\n{slurm.logs()}")
        yield slurm


def _idle_nodes(slurm: Slurm) -> int:
    command = slurm.lab.hosts[0].command("sinfo", "--noheader", "--format=%D", "--states=idle")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_S, env={**os.environ, **slurm.variables}
    )
    return sum(map(int, done.stdout.split())) if done.returncode == 0 else 0


def _on(name: str, host: Host, hosts: Path, daemon: str) -> list[str]:
    """A command on a host that knows its name, and its neighbours' (`ip netns exec` would take /sys from slurmd)."""
    script = f"hostname {name} && mount --bind {hosts} /etc/hosts && exec {daemon}"
    return [*host.command(*ISOLATED, "sh", "-c", script)]


@contextlib.contextmanager
def _daemon(name: str, command: list[str], slurm: Slurm) -> Iterator[None]:
    """A command that is ISOLATED."""
    me = os.getpid()
    output = (slurm.directory / f"{name.replace(' ', '-')}.out.log").open("wb")
    with output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **slurm.variables},
            start_new_session=True,
            preexec_fn=lambda: die_with(me, signal.SIGKILL),
        )
    try:
        yield
        assert process.poll() is None, f"{name} ended by itself with {process.returncode}\n{slurm.logs()}"
    finally:
        for first in psutil.Process(process.pid).children():
            first.kill()  # and with it all processes of its namespace
        process.wait(COMMAND_S)
