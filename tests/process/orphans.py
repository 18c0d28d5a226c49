"""Whoever is killed while ranks come up, and whenever: nothing of the run is left. `python -m tests.process.orphans`.

Each fault starts a draft in a torchrun of its own, waits until those it concerns are there and a random while longer,
and strikes.
"""

from __future__ import annotations

import contextlib
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import psutil

from tests.process.conftest import CONFIG
from tests.process.runs import SSD, Run, eventually
from tests.tiny_models import write_hf

AT_MOST_S = 20.0  # `timeouts.shutdown` of 2 s, on a loaded machine
READY_S = 3.0  # most of what torchrun needs to come up, and a rank after it


@dataclass(frozen=True)
class Family:
    """The processes of a run by what they do; only those that are there yet."""

    launcher: psutil.Process
    keeper: psutil.Process | None
    agent: psutil.Process | None
    rank: psutil.Process | None

    @classmethod
    def of(cls, run: Run) -> Family:
        named = {_name(member): member for member in run.members()}
        launcher = psutil.Process(run.process.pid)
        return cls(launcher, named.get("keeper"), named.get("agent"), named.get("rank"))


def _name(process: psutil.Process) -> str:
    try:
        if "RANK" in process.environ():
            return "rank"
        words = process.cmdline()
        if any(word.endswith("keeper.py") for word in words):
            return "keeper"
        return "agent" if "--max-restarts" in words else "launcher"
    except psutil.Error:
        return "gone"


@dataclass(frozen=True)
class Fault:
    """What happens to a run.

    Attributes:
        stopped: of its processes, which are stopped first.
        struck: which one then gets the signal.
    """

    struck: str
    signum: signal.Signals
    stopped: tuple[str, ...] = ()

    def __str__(self) -> str:
        before = f"{' and '.join(self.stopped)} stopped, " if self.stopped else ""
        return f"{before}{self.struck} gets {self.signum.name}"

    @property
    def concerns(self) -> set[str]:
        return {self.struck, *self.stopped}

    @property
    def longest_s(self) -> float:
        """How long after those concerned are there the run is still coming up."""
        return READY_S if self.concerns & {"agent", "rank"} else 2 * READY_S


KILL, TERM, HUP = signal.SIGKILL, signal.SIGTERM, signal.SIGHUP
FAULTS = (
    Fault("agent", KILL),
    Fault("launcher", TERM),
    Fault("launcher", KILL),
    Fault("launcher", KILL, ("agent",)),
    Fault("launcher", HUP),
    Fault("keeper", KILL),
    Fault("launcher", KILL, ("launcher", "keeper", "agent", "rank")),
    Fault("agent", TERM),
    Fault("launcher", KILL, ("rank",)),
    Fault("keeper", KILL, ("agent", "rank")),
    Fault("launcher", TERM, ("rank",)),
    Fault("launcher", KILL, ("keeper",)),
    Fault("rank", KILL),
    Fault("rank", TERM),
)


def prepared(directory: Path) -> Path:
    """A configuration with a tiny pair; returns its path."""
    write_hf(directory / "target", seed=1)
    write_hf(directory / "draft", seed=1)
    path = directory / "run.toml"
    path.write_text(CONFIG.format(directory=directory).replace("shutdown = 5.0", "shutdown = 2.0"))
    return path


def strike(start: Callable[..., Run], config: Path, fault: Fault, after_s: float) -> None:
    """Start a run, do that to it, and see to it that nothing is left.

    Args:
        start: starts a command.
        after_s: how long those concerned have been there by then.
    """
    run = start(*SSD, "up", "--role", "draft", "--target", "127.0.0.1:9", "--config", str(config))
    family = Family.of(run)

    def are_there() -> bool:
        nonlocal family
        family = Family.of(run)
        return run.ended or all(getattr(family, name) is not None for name in fault.concerns)

    eventually(are_there, 60, f"there are {fault.concerns}")
    assert not run.ended, run.err
    time.sleep(after_s)
    everybody = run.members()
    for name in fault.stopped:
        getattr(family, name).suspend()
    getattr(family, fault.struck).send_signal(fault.signum)
    run.assert_nothing_is_left(within_s=AT_MOST_S)
    eventually(lambda: not any(_lives(process) for process in everybody), AT_MOST_S, "nobody is left")
    run.exit_code()
    left = [path.name for path in run.temporary.iterdir()]
    named = [name for name in left if name in run.err]  # an error names the log, which stays
    assert left == named, f"left behind: {left}"
    assert fault.struck != "launcher" or not left, f"left behind: {left}"


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@click.command()
@click.option("--faults", default=65, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(faults: int, seed: int) -> None:
    """Kill, stop and ask to leave whoever is there, at random moments of a start."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        config = prepared(directory)

        def start(*command: str) -> Run:
            run = Run(directory / f"run{number}", command)
            stack.callback(run.kill)
            return run

        for number in range(faults):
            fault = FAULTS[number % len(FAULTS)]
            after_s = fault.longest_s * chance.random()
            click.echo(f"{number}: {fault} after {after_s:.2f} s")
            strike(start, config, fault, after_s)
    click.echo(f"{faults} faults, nothing left")


if __name__ == "__main__":
    main()
