"""A command that leaves nothing behind, however it or this process ends. Knows no torchrun, no ranks. Linux only.

A keeper (`launcher/keeper.py`) stands between: it ends the command's whole family, and removes its directory if this
process is killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher import keeper
from ssd_runtime.errors import ConfigError, SsdError

KILLED_S = 10.0  # a process in uninterruptible sleep may take a while to die
KEEPER = (sys.executable, "-I", "-S", keeper.__file__)


class Kept:
    """One command, which its keeper starts; to be closed."""

    def __init__(self, its_keeper: subprocess.Popen[bytes]) -> None:
        self._keeper = its_keeper
        self._started = False
        self._exit_code: int | None = None

    @classmethod
    def open(cls, command: Sequence[str], environment: Mapping[str, str], directory: Path, grace_s: float) -> Kept:
        """Make the directory of a command that is not started yet.

        Args:
            command: whose first word is a path; in a session of its own, without standard input.
            environment: of the command.
            directory: for the command's output, `keeper.LOG`, and whatever else; the caller's to remove.
            grace_s: how long the command may take to leave if this process is gone.

        Raises:
            ConfigError: the directory cannot be made.
        """
        process = subprocess.Popen(
            [*KEEPER, str(directory), str(grace_s), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(environment),
            bufsize=0,
            start_new_session=True,
        )
        kept = cls(process)
        try:
            directory.mkdir(mode=0o700)  # by now there is somebody to remove it
        except OSError as error:
            kept.close()
            raise ConfigError(
                f"cannot make {directory}: {error.strerror}; set TMPDIR to a folder that can be written to"
            ) from None
        return kept

    def start(self) -> None:
        """Start the command; returns at once."""
        self._say(keeper.START)
        self._started = True

    @property
    def pid(self) -> int:
        """Of the keeper, the first of the family."""
        return self._keeper.pid

    def poll(self) -> int | None:
        """The command's exit code when nothing is left of it; None before. 128 + n: ended by signal n."""
        return self.wait(0.0)

    def wait(self, timeout_s: float) -> int | None:
        """The same, after waiting for it."""
        assert self._keeper.stdout is not None
        if self._exit_code is None and select.select([self._keeper.stdout], [], [], timeout_s)[0]:
            said = self._keeper.stdout.read(64)
            self._exit_code = int(said) if said else self._keeper.wait(KILLED_S)
        return self._exit_code

    def end(self, grace_s: float) -> None:
        """SIGTERM to the command, `grace_s` seconds, SIGKILL to whoever of its family is left."""
        if not self._started:
            return
        self._say(f"{keeper.END} {grace_s:.3f}")
        self._keeper.send_signal(signal.SIGCONT)  # in case somebody has stopped it
        if self.wait(grace_s + KILLED_S) is None:
            raise SsdError(f"a process under {self._keeper.pid} does not die of SIGKILL within {KILLED_S:.0f} s")

    def close(self) -> None:
        """Let the keeper go; if the command was not ended before, the kernel kills it."""
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        if self._exit_code is not None:
            self._say(keeper.DONE)
        else:
            self._keeper.kill()
        self._keeper.stdin.close()
        self._keeper.stdout.close()
        self._keeper.wait(KILLED_S)

    def _say(self, order: str) -> None:
        assert self._keeper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            os.write(self._keeper.stdin.fileno(), f"{order}\n".encode())
