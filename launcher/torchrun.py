"""The ranks of one engine: starts them with torchrun, hears how they come up, ends them. Knows no requests.

Everything of one start lives in a run directory of its own, so two engines on one host share no name and no port.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import site
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from launcher.keeper import LOG
from launcher.nodes import ONE_NODE, Nodes, ranks_by_role
from launcher.processes import Kept
from launcher.ranks.announcer import KEY, Announcements
from ssd_runtime.comm.control.launcher_messages import Joined, Progress, Ready, WorkerFailed
from ssd_runtime.comm.control.messages import Message
from ssd_runtime.config import Config
from ssd_runtime.errors import ConfigError, SsdError
from ssd_runtime.host.cores import about_binding, forget_binding
from ssd_runtime.host.topology import Group

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]  # where our packages are
POLL_S = 0.2
LAST_WORDS_S = 1.0  # what a rank said before it ended is there by then
FAILED_RANK = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)\s*exitcode\s*: (-?\d+)")  # in torchrun's last words


@dataclass(frozen=True)
class Launch:
    """What the ranks are started with.

    Attributes:
        config: of the run; the ranks read a copy of it in the run directory.
        trace: where the ranks leave their parts of a trace; None for no trace.
        nodes: of the world, and which of them this one is.
        group: of ranks that have one role only.
    """

    config: Config
    _: KW_ONLY
    trace: Path | None = None
    nodes: Nodes = ONE_NODE
    group: Group | None = None

    @property
    def ranks_by_role(self) -> tuple[int, int]:
        """How many targets and how many drafts the whole world has."""
        return ranks_by_role(self.config, self.group.role if self.group else None)


class Ranks:
    """One torchrun and everything under it, from `start` to `stop`.

    Args:
        launch: what to start.
        directory: of the run, see `run_directory`; made at the start.
    """

    def __init__(self, launch: Launch, directory: Path) -> None:
        self.launch = launch
        self.directory = directory
        self.log_path = directory / LOG
        self._config_path = directory / "config.toml"
        self._announcements = Announcements()
        self._process: Kept | None = None
        self._keep = False
        self._failure: SsdError | None = None
        self._joined: list[Joined] = []  # heard of, whatever was being waited for, and not told yet

    def start(self) -> None:
        """Start torchrun; returns at once. Raises ConfigError where the directory cannot be made or written to."""
        self._announcements.open()
        environment = environment_of_ranks(os.environ, self.directory) | {KEY: self._announcements.key}
        grace_s = self.launch.config.timeouts.shutdown
        self._process = Kept.open(self.command(), environment, self.directory, grace_s)
        try:
            self._config_path.write_text(self.launch.config.to_toml(), encoding="utf-8")
        except OSError as error:
            remedy = "set TMPDIR to a folder with room in it"
            raise ConfigError(f"cannot write {self._config_path}: {error.strerror}; {remedy}") from None
        self._process.start()

    def command(self) -> list[str]:
        """The command line, which works by hand too."""
        launch = self.launch
        torchrun = [sys.executable, "-P", "-m", "launcher.agent", "--max-restarts", "0"]
        torchrun += ["--nproc-per-node", str(launch.nodes.ranks_here(*launch.ranks_by_role))]
        torchrun += launch.nodes.torchrun(launch.config.timeouts.load)
        torchrun += ["--log-dir", str(self.directory)]
        worker = ["-m", "launcher.worker", "--announce", self._announcements.address]
        worker += ["--config", str(self._config_path)]
        if launch.group is not None:
            worker += ["--role", launch.group.role]
            worker += ["--target", launch.group.target] if launch.group.target else []
        if launch.trace is not None:
            worker += ["--trace", str(launch.trace.resolve())]
        return torchrun + worker

    def wait_ready(self, on_progress: Callable[[Progress], None]) -> Ready:
        """Wait until the leader takes requests.

        Raises:
            ConfigError: a rank found something the user can mend.
            SsdError: a rank broke, ended, or is not ready by `timeouts.load` + `timeouts.handshake`.
        """
        timeouts = self.launch.config.timeouts
        waited = timeouts.load + timeouts.handshake
        if self.launch.nodes.count > 1:
            waited += timeouts.load  # the other nodes may come late
        deadline = time.monotonic() + waited
        while time.monotonic() < deadline:
            ended = not self.is_running()  # asked first: all that ranks said before their end is heard before it counts
            heard = self._heard(LAST_WORDS_S if ended else POLL_S)
            for message in heard:
                if isinstance(message, Ready):
                    return message
                if isinstance(message, Progress):
                    on_progress(message)
            if ended and not heard:
                raise self._end_of_ranks()
        raise SsdError(
            f"the engine is not ready after {waited:.0f} s (timeouts.load + timeouts.handshake); {self.see_log()}"
        )

    def joined(self) -> list[Joined]:
        """Drafts of this torchrun that a target has taken in since the last call, ranks of a draft's own torchrun."""
        if self._failure is None:
            self._heard(0.0)
        joined, self._joined = self._joined, []
        return joined

    def raise_if_failed(self) -> None:
        """Raise what a rank announced, or that the ranks have ended; nothing while all is well."""
        if self._failure is not None:  # it says more than whatever came of it
            raise self._failure
        ended = not self.is_running()
        while self._heard(LAST_WORDS_S if ended else 0.0):
            pass
        if ended:
            raise self._end_of_ranks()

    def raise_unless_ended_well(self) -> None:
        """Raise why the ranks ended, if it was not because they were asked to."""
        if self._process is None or self._process.poll() != 0:
            self.raise_if_failed()

    def is_running(self) -> bool:
        """Whether torchrun or a rank is there; all of them leave when one breaks."""
        return self._process is not None and self._process.poll() is None

    def stop(self, grace_s: float) -> None:
        """End torchrun and all it started; remove the run directory unless an error named its log.

        torchrun passes SIGTERM on, and its ranks then have `grace_s` seconds to say goodbye.
        """
        if self._process is not None:
            try:
                self._process.end(grace_s)
            finally:
                if not self._keep:
                    shutil.rmtree(self.directory, ignore_errors=True)
                self._process.close()
                self._process = None
        self._announcements.close()

    def wait(self, timeout_s: float) -> bool:
        """Give the ranks time to end by themselves after a shutdown request; whether they did, and well."""
        assert self._process is not None, "not started"
        return self._process.wait(timeout_s) == 0

    def see_log(self) -> str:
        """The end of an error message; keeps the log after `stop`."""
        self._keep = True
        return f"log: {self.log_path}"

    def _heard(self, timeout_s: float) -> Sequence[Message]:
        """What ranks have said; raises what one of them failed of."""
        heard = []
        for message in self._announcements.heard(timeout_s):
            if isinstance(message, WorkerFailed):
                if message.kind == "config":
                    raise ConfigError(message.reason)
                self._failure = SsdError(f"{message.reason}; {self.see_log()}")
                raise self._failure
            if isinstance(message, Joined):
                self._joined.append(message)
            heard.append(message)
        return heard

    def _end_of_ranks(self) -> SsdError:
        code = None if self._process is None else self._process.poll()
        return SsdError(f"the ranks ended (exit code {code}){self._last_words()}; {self.see_log()}")

    def _last_words(self) -> str:
        """What the log says of the end, for the one line the user sees: an error, or the rank that torchrun missed."""
        said = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        errors = [line.strip() for line in said.splitlines() if "Error" in line and "ChildFailedError" not in line]
        if errors:
            return f": {errors[-1][:300]}"
        if failed := FAILED_RANK.search(said, max(0, said.find("Root Cause"))):
            rank, code = int(failed[1]), int(failed[2])
            group, num_targets = self.launch.group, self.launch.config.target.tensor_parallel
            role = group.role if group else "target" if rank < num_targets else "draft"
            who = "the draft" if group and role == "draft" else f"{role} rank {rank}"
            how = f"was killed by signal {-code}" if code < 0 else f"left with exit code {code}"
            return f": {who} {how}"
        return ""


def environment_of_ranks(ours: Mapping[str, str], directory: Path) -> dict[str, str]:
    """The environment of torchrun and its ranks, made of ours.

    What they rely on does not come from where they are started: their cores, where modules are found (`-P`: not in the
    working directory, unless PYTHONPATH names it), where temporary files go (torch leaves a folder behind when it logs
    an exception, as a node's torchrun does at its end if node 0's is gone already).

    Args:
        ours: of this process.
        directory: of the run, which goes with everything in it.
    """
    environment = {**ours, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "TMPDIR": str(directory)}
    if ignored := forget_binding(environment):
        log.warning("%s", about_binding(ignored))
    # An empty word in PYTHONPATH would be the working directory.
    folders = [folder for folder in ours.get("PYTHONPATH", "").split(os.pathsep) if folder]
    if str(ROOT) not in [*folders, *_installed()]:
        folders.append(str(ROOT))  # a source tree that Python has not been told of
    environment.pop("PYTHONPATH", None)
    return environment | ({"PYTHONPATH": os.pathsep.join(folders)} if folders else {})


def _installed() -> list[str]:
    """Where Python looks for packages anyway; such a folder in PYTHONPATH could hide parts of the standard library."""
    return [*site.getsitepackages(), site.getusersitepackages(), *sysconfig.get_paths().values()]


def run_directory() -> Path:
    """A name for the directory of a run, whose own it is. Raises ConfigError where there is no room for one."""
    try:
        return Path(tempfile.gettempdir(), f"ssd-{secrets.token_hex(4)}")
    except OSError as error:
        raise ConfigError(f"{error.strerror}; set TMPDIR to a folder that can be written to") from None
