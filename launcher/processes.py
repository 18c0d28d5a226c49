"""Processes that do not outlive their purpose. Knows nothing of torchrun or ranks. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from ssd_runtime.errors import SsdError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
KILLED_S = 10.0  # a process in uninterruptible sleep may take a while to die

Process = tuple[int, int]  # pid, start time in clock ticks: together they are never used twice


def die_with(parent: int, signum: int = signal.SIGTERM) -> None:
    """Have the kernel send this process `signum` when its parent dies, however it dies; at once if it is dead already.

    Args:
        parent: the pid this process expects as its parent.
        signum: what to die of.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signum)


def start(command: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, both outputs into `log`, to end with this process."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,
        preexec_fn=functools.partial(die_with, os.getpid()),
    )


def family(pid: int) -> list[Process]:
    """A process and all its descendants, the process first; empty if it is gone."""
    children: dict[int, list[Process]] = {}
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))):
            parent, started, state = stat
            if state == "Z":
                continue
            process = (int(entry.name), started)
            children.setdefault(parent, []).append(process)
            if process[0] == pid:
                found.append(process)
    for process in found:  # grows as it goes
        found += children.get(process[0], [])
    return found


def is_alive(process: Process) -> bool:
    """Whether this very process (not a later one with the same pid) still runs."""
    stat = _stat(process[0])
    return stat is not None and stat[1] == process[1] and stat[2] != "Z"


def end(popen: subprocess.Popen[bytes], grace_s: float) -> bool:
    """End a command with all its descendants: SIGTERM to it, `grace_s` seconds, SIGKILL to whoever is left.

    Returns:
        Whether everyone left of their own accord.
    """
    members = family(popen.pid)
    if popen.poll() is None:
        popen.terminate()
    if _all_gone(popen, members, grace_s):
        return True
    left = [member for member in {*members, *family(popen.pid)} if is_alive(member)]
    for pid, _ in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if not _all_gone(popen, left, KILLED_S):
        raise SsdError(f"process {left[0][0]} does not die of SIGKILL within {KILLED_S:.0f} s")
    return False


def _all_gone(popen: subprocess.Popen[bytes], members: Sequence[Process], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while popen.poll() is None or any(is_alive(member) for member in members):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _stat(pid: int) -> tuple[int, int, str] | None:
    """Parent, start time and state of a process from /proc/PID/stat (proc(5)); None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[1]), int(fields[19]), fields[0].decode()
