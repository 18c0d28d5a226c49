"""Child processes end with their parent and take their own children along."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.processes import end, family, is_alive, start

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and prctl")

PARENT_OF_TWO = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print("started", flush=True)
time.sleep(60)
"""
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("started", flush=True)
time.sleep(60)
"""
STARTS_A_CHILD = """
import os, sys, time
from launcher.processes import start
code = "import time; print('started', flush=True); time.sleep(60)"
with open(sys.argv[1], "wb") as log:
    start([sys.executable, "-c", code], log, os.environ)
time.sleep(60)
"""


def started(code: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        process = start([sys.executable, "-c", code], file, os.environ)
    eventually(lambda: b"started" in log.read_bytes())
    return process


def eventually(condition, timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def test_end_takes_descendants_in_other_sessions_along(tmp_path: Path) -> None:
    process = started(PARENT_OF_TWO, tmp_path / "log")
    members = family(process.pid)
    assert len(members) == 2
    end(process, grace_s=0.5)
    assert not any(is_alive(member) for member in members)


def test_end_kills_what_does_not_listen_and_says_so(tmp_path: Path) -> None:
    process = started(DEAF, tmp_path / "log")
    assert not end(process, grace_s=0.2)
    assert process.returncode == -signal.SIGKILL


def test_end_of_a_process_that_is_gone_is_nothing(tmp_path: Path) -> None:
    process = started("print('started', flush=True)", tmp_path / "log")
    process.wait(10)
    assert end(process, grace_s=1)


def test_a_child_dies_when_its_parent_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", STARTS_A_CHILD, str(log)], cwd=root)
    eventually(lambda: log.exists() and b"started" in log.read_bytes())
    members = family(parent.pid)
    assert len(members) == 2
    parent.kill()
    parent.wait(10)
    eventually(lambda: not any(is_alive(member) for member in members))


def test_a_pid_is_not_taken_for_its_successor() -> None:
    ((pid, start_time), *_) = family(os.getpid())
    assert is_alive((pid, start_time))
    assert not is_alive((pid, start_time + 1))
