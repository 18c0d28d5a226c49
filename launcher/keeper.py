"""Keeps a command and all that comes of it: none of it outlives this process, nor this process its owner. Linux only.

    python -I -S keeper.py DIRECTORY GRACE_S COMMAND...

Its owner (`launcher/processes.py`) holds its standard input, and says there `start` when DIRECTORY is made, `end
SECONDS` when the command is to leave, and `done` at last. If the input ends before that, the owner is gone, and
DIRECTORY is removed too. When nothing is left of the command, its exit code is written to standard output. Signals that
ask processes to leave are the command's and the owner's to follow: the keeper goes when both have.

A program of its own that imports nothing but the standard library: it is up in a moment, with little in it to break.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import math
import os
import select
import signal
import sys
import time
from types import FrameType

AGENT = "SSD_AGENT_PID"  # the command as its descendants know it
LOG = "ranks.log"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
F_SETSIG = 10  # linux/fcntl.h
TICK_S = 0.02
START, END, DONE = "start", "end", "done"


def die_with(parent: int, signum: int = signal.SIGTERM) -> None:
    """Have the kernel send this process `signum` when its parent dies, however it dies; at once if it is dead already.

    Args:
        parent: the pid this process expects as its parent. It dies, for the kernel, with the thread that forked.
        signum: what to die of.
    """
    _prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        os.kill(os.getpid(), signum)


def die_with_the_writers_of(pipe: int) -> None:
    """Have the kernel kill this process when the last writer of a pipe is gone; at once if it is gone already.

    Args:
        pipe: its reading end. It is opened once more, since whom the kernel tells is a property of the open file.
    """
    own = os.open(f"/proc/self/fd/{pipe}", os.O_RDONLY | os.O_NONBLOCK)  # stays open as long as the process
    fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(own, F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(own, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    ending = select.poll()
    ending.register(own, 0)
    if ending.poll(0):
        os.kill(os.getpid(), signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The living children of a process and theirs, from /proc/PID/stat (proc(5)), parents first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as stat:
                state, parent, *_ = stat.read().rpartition(b")")[2].split()
                if state != b"Z":
                    children.setdefault(int(parent), []).append(int(entry))
    found = list(children.get(pid, []))
    for process in found:  # grows as it goes
        found += children.get(process, [])
    return found


class Keeper:
    """From the owner's `start` to its `done`.

    Args:
        directory: where the command's output goes, to a file LOG.
        grace_s: how long the command has to leave in order when nobody says it.
        command: whose first word is a path.
    """

    def __init__(self, directory: str, grace_s: float, command: list[str]) -> None:
        self._directory, self._grace_s, self._command = directory, grace_s, command
        self._agent = 0  # the command's pid while it runs
        self._exit_code = 0
        self._deadline = math.inf  # of everybody
        self._read = ""  # of an order whose end has not come yet
        self._orders: list[str] = []
        self._alone = False  # the owner is gone
        self._wakeup = -1  # readable after a signal

    def run(self) -> None:
        """Until owner and command are gone, or the owner says that it is done."""
        self._prepare()
        self._listen_for(START)
        if not self._alone:
            self._start()
            self._until_nothing_is_left()
            with contextlib.suppress(BrokenPipeError):
                os.write(1, f"{self._exit_code}\n".encode())
            self._listen_for(DONE)
        if self._alone:
            import shutil  # here, since it is seldom needed

            shutil.rmtree(self._directory, ignore_errors=True)

    def _prepare(self) -> None:
        self._wakeup, ending = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(ending, warn_on_full_buffer=False)
        for signum in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signum == signal.SIGCHLD or signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, _noted)  # an ignored signal would be ignored by the command too
        _prctl(PR_SET_CHILD_SUBREAPER, 1)  # whoever loses its parent down there becomes a child of this process
        _prctl(PR_SET_PDEATHSIG, signal.SIGCONT)  # if it is stopped when its owner dies, it goes on, and reads the end

    def _start(self) -> None:
        leash, self._held = os.pipe()  # the other end stays here: it closes with this process, whatever becomes of it
        log = os.open(os.path.join(self._directory, LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 2)
        keeper = os.getpid()
        self._agent = os.fork()
        if self._agent == 0:
            try:
                die_with(keeper, signal.SIGKILL)
                os.dup2(leash, 0)
                os.dup2(log, 1)
                os.execve(self._command[0], self._command, {**os.environ, AGENT: str(os.getpid())})
            except OSError as error:
                os.write(2, f"Error: {self._command[0]}: {error.strerror}\n".encode())
            finally:
                os._exit(127)
        os.close(leash)
        os.close(log)

    def _until_nothing_is_left(self) -> None:
        """Follow orders, and end whoever is still there at the deadline."""
        while self._reap():
            self._obey()
            left = self._deadline - time.monotonic()
            if left <= 0:
                _signal(descendants(os.getpid()), signal.SIGKILL)
            self._listen(None if left == math.inf else max(left, TICK_S))

    def _obey(self) -> None:
        while self._orders:
            name, _, seconds = self._orders.pop(0).partition(" ")
            if name == END:
                self._end(float(seconds))
        if self._alone and self._deadline == math.inf:
            self._end(self._grace_s)

    def _reap(self) -> bool:
        """Take leave of who has ended; whether anybody is left. What the command leaves behind is to end with it."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return True
                if pid == self._agent:
                    self._agent, code = 0, os.waitstatus_to_exitcode(status)
                    self._exit_code = code if code >= 0 else 128 - code
                    self._end(self._grace_s)
        return False

    def _end(self, grace_s: float) -> None:
        """Ask the command to leave, which passes it on, or whom it has left behind; everybody stopped goes on."""
        self._deadline = min(self._deadline, time.monotonic() + grace_s)
        everybody = descendants(os.getpid())
        _signal([self._agent] if self._agent else everybody, signal.SIGTERM)
        _signal(everybody, signal.SIGCONT)

    def _listen_for(self, order: str) -> None:
        while not self._alone and order not in self._orders:
            self._listen(None)
        if not self._alone:
            self._orders.remove(order)

    def _listen(self, timeout_s: float | None) -> None:
        """Take in what the owner says, until it says something, a child ends or the time has passed."""
        readable, _, _ = select.select([self._wakeup] if self._alone else [self._wakeup, 0], [], [], timeout_s)
        if self._wakeup in readable:
            os.read(self._wakeup, 4096)
        if 0 in readable:
            read = os.read(0, 4096).decode()
            self._alone = not read
            *orders, self._read = (self._read + read).split("\n")
            self._orders += orders


def _signal(pids: list[int], signum: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def _noted(signum: int, frame: FrameType | None) -> None:
    """A signal that only wakes."""


def _prctl(option: int, argument: int) -> None:
    ctypes.CDLL(None).prctl(option, argument, 0, 0, 0)


if __name__ == "__main__":
    Keeper(sys.argv[1], float(sys.argv[2]), sys.argv[3:]).run()
