"""Runs of the command line over real ranks with tiny models: started, watched from outside, and cleaned up after."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
SSD = (sys.executable, "-c", "import sys; from launcher.cli import main; sys.exit(main())")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
START_S = 90.0  # a loaded machine; an idle one takes five
TAG = "SSD_TEST_RUN"
NOTES = ("engine ready", "with other drafts of this host")  # no errors; the latter is of runs beside this one
# Plain torch makes a tiny target of many layers ten times as slow as its draft of two, as real pairs are.
PLAIN = {"SSD_CUDA_EXT": "0", "OMP_NUM_THREADS": "1"}


@dataclass
class Run:
    """One command in a working directory. Whatever it starts inherits a tag in its environment, by which all of it is
    found."""

    directory: Path
    command: Sequence[str]
    tag: str = field(default_factory=lambda: uuid.uuid4().hex)
    variables: Mapping[str, str] = field(default_factory=lambda: PLAIN)
    cwd: Path = ROOT

    def __post_init__(self) -> None:
        self.directory.mkdir()
        self.temporary = self.directory / "tmp"
        self.temporary.mkdir()
        environment = {**os.environ, TAG: self.tag, "TMPDIR": str(self.temporary), **self.variables}
        with (self.directory / "out").open("wb") as out, (self.directory / "err").open("wb") as err:
            self.process = subprocess.Popen(
                self.command, cwd=self.cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment
            )

    @property
    def out(self) -> str:
        return (self.directory / "out").read_text()

    @property
    def err(self) -> str:
        return (self.directory / "err").read_text()

    def until(self, text: str, timeout_s: float = START_S) -> str:
        """Wait until the command has printed `text`; returns what follows it, up to the next white space."""
        eventually(lambda: text in self.out + self.err or self.ended, timeout_s, f"{text!r} in the output")
        said = self.out + self.err
        assert text in said, f"it ended with {self.process.returncode}: {said[-2000:]}"
        eventually(lambda: (self.out + self.err).partition(text)[2].split() != [], 10, f"more after {text!r}")
        return (self.out + self.err).partition(text)[2].split()[0]

    def exit_code(self, timeout_s: float = 30.0) -> int:
        return self.process.wait(timeout_s)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def members(self) -> list[psutil.Process]:
        """Every process of this run that lives, the command itself included."""
        return [process for process in psutil.process_iter() if _environment(process).get(TAG) == self.tag]

    def rank(self, rank: int) -> psutil.Process:
        (found,) = [process for process in self.members() if _environment(process).get("RANK") == str(rank)]
        return found

    def assert_nothing_is_left(self, within_s: float = 5.0) -> None:
        eventually(lambda: not self.members(), within_s, f"no process left of {self.command[-6:]}")

    def kill(self) -> None:
        """At the end of a test, whatever became of it."""
        for process in self.members():
            process.kill()
        self.process.wait(10)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return {} if process.status() == psutil.STATUS_ZOMBIE else process.environ()
    except psutil.Error:
        return {}


def eventually(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


def error_line(text: str) -> str:
    """The one line that a failing command says; a traceback or a second line fails."""
    lines = [line for line in text.splitlines() if line.strip() and not any(note in line for note in NOTES)]
    assert len(lines) == 1, text
    assert lines[0].startswith("ssd: error: "), text
    assert "Traceback" not in text
    return lines[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
