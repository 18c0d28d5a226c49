"""Commands end with who started them, with all that came of them, at whatever moment and however it happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launcher import keeper
from launcher.processes import Kept
from ssd_runtime.errors import ConfigError
from tests.process.runs import ROOT, eventually

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and prctl")

SOON_S = 10.0
PARENT_OF_TWO = """
import subprocess, sys, time
child = "import time; print('started', flush=True); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
time.sleep(60)
"""
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("started", flush=True)
time.sleep(60)
"""
# Its child is tied as a rank is, and deaf: only the keeper's end, or the keeper, can end it.
DEAF_RANK = """
import signal, subprocess, sys, time
child = '''
import os, signal, time
from launcher.worker import end_with_starters
signal.signal(signal.SIGTERM, signal.SIG_IGN)
end_with_starters(os.environ)
print("started", flush=True)
time.sleep(60)
'''
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
time.sleep(60)
"""
OWNER = """
import os, sys, time
from pathlib import Path
from launcher.processes import Kept
kept = Kept.open([sys.executable, "-c", sys.argv[2]], os.environ, Path(sys.argv[1]), float(sys.argv[3]))
kept.start()
time.sleep(60)
"""

Keep = Callable[..., Kept]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def keep(directory: Path) -> Iterator[Keep]:
    """Start a script, and wait until it says so."""
    made: list[Kept] = []

    def start(script: str, grace_s: float = 5.0, *, until: str = "started") -> Kept:
        made.append(
            Kept.open([sys.executable, "-c", script], {**os.environ, "PYTHONPATH": str(ROOT)}, directory, grace_s)
        )
        made[-1].start()
        eventually(lambda: until in said(directory), SOON_S, f"the script says {until!r}")
        return made[-1]

    yield start
    for kept in made:
        kept.close()


@pytest.fixture
def owner(directory: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a process that keeps a script, and wait until this says so."""
    made: list[subprocess.Popen[bytes]] = []

    def start(script: str, grace_s: float = 5.0) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", OWNER, str(directory), script, str(grace_s)]
        made.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}))
        eventually(lambda: "started" in said(directory), SOON_S, "the script has started")
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.wait(SOON_S)


def said(directory: Path) -> str:
    log = directory / keeper.LOG
    return log.read_text() if log.exists() else ""


def family(pid: int) -> list[psutil.Process]:
    """The process and all its descendants, from the top."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_end_takes_descendants_in_other_sessions_along(keep: Keep) -> None:
    kept = keep(PARENT_OF_TWO)
    members = family(kept.pid)
    assert len(members) == 3  # with the keeper
    kept.end(0.5)
    assert kept.poll() == 128 + signal.SIGTERM
    assert gone(members[1:])


def test_end_kills_what_does_not_listen_and_says_so(keep: Keep) -> None:
    kept = keep(DEAF)
    kept.end(0.2)
    assert kept.poll() == 128 + signal.SIGKILL


def test_end_lets_a_stopped_command_go_on_to_leave_in_order(keep: Keep) -> None:
    kept = keep(
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(3)); print('started', flush=True)\n"
        "while True: time.sleep(1)"
    )
    for member in family(kept.pid)[::-1]:
        member.suspend()
    kept.end(SOON_S)
    assert kept.poll() == 3


@pytest.mark.parametrize("code", [0, 7])
def test_a_command_that_ends_tells_its_exit_code(keep: Keep, code: int) -> None:
    kept = keep(f"import sys; print('started', flush=True); sys.exit({code})")
    assert kept.wait(SOON_S) == code
    kept.end(1.0)  # is nothing
    assert kept.poll() == code


def test_a_command_that_is_not_there_says_so_in_the_log(directory: Path) -> None:
    kept = Kept.open(["/no/such/program"], {}, directory, 1.0)
    kept.start()
    assert kept.wait(SOON_S) == 127
    kept.close()
    assert said(directory) == "Error: /no/such/program: No such file or directory\n"


def test_what_a_killed_command_leaves_behind_ends_too(keep: Keep) -> None:
    kept = keep(PARENT_OF_TWO)
    _, command, child = family(kept.pid)
    command.kill()
    assert kept.wait(SOON_S) == 128 + signal.SIGKILL
    assert gone([child])


def test_what_a_killed_command_leaves_behind_is_killed_if_it_does_not_listen(keep: Keep) -> None:
    kept = keep(DEAF_RANK, 0.2)
    _, command, child = family(kept.pid)
    command.kill()
    assert kept.wait(SOON_S) == 128 + signal.SIGKILL
    assert gone([child])


@pytest.mark.parametrize("stopped", [None, 1, 2, 3], ids=["nobody", "keeper", "command", "rank"])
def test_nothing_outlives_an_owner_that_was_killed_whoever_is_stopped(
    owner: Callable[..., subprocess.Popen[bytes]], directory: Path, stopped: int | None
) -> None:
    process = owner(DEAF_RANK, 0.2)
    members = family(process.pid)
    assert len(members) == 4
    if stopped is not None:
        members[stopped].suspend()
    process.kill()
    eventually(lambda: gone(members[1:]), SOON_S, "all of them end")
    assert not directory.exists()


def test_nothing_outlives_a_keeper_that_was_killed(keep: Keep) -> None:
    kept = keep(DEAF_RANK)
    members = family(kept.pid)
    members[1].suspend()
    members[2].suspend()
    members[0].kill()
    assert kept.wait(SOON_S) == -signal.SIGKILL
    eventually(lambda: gone(members), SOON_S, "all of them end")


def test_an_owner_that_is_killed_before_it_says_start_leaves_no_directory(directory: Path) -> None:
    command = [sys.executable, "-I", "-S", keeper.__file__, str(directory), "1.0", sys.executable, "-c", "print('ran')"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    directory.mkdir()
    out, _ = process.communicate(timeout=SOON_S)  # closes its input
    assert (process.returncode, out) == (0, b"")
    assert not directory.exists()


def test_a_command_that_was_never_started_is_ended_and_closed_like_another(directory: Path) -> None:
    kept = Kept.open([sys.executable, "-c", ""], {}, directory, 1.0)
    (process,) = family(kept.pid)
    assert directory.is_dir()
    kept.end(SOON_S)
    kept.close()
    assert gone([process])


def test_a_directory_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    before = psutil.Process().children()
    with pytest.raises(ConfigError, match=r"cannot make .*: No such file or directory; set TMPDIR"):
        Kept.open([sys.executable, "-c", ""], {}, tmp_path / "not" / "there", 1.0)
    assert psutil.Process().children() == before


# ---- the first instructions of a rank --------------------------------------------------------------------------------


def first_instructions(stdin: int, shell: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
    """A rank that can do nothing but start, and how it ends."""
    command = [sys.executable, "-m", "launcher.worker"]
    if shell:
        command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, stdin=stdin, env=environment, capture_output=True, text=True, timeout=60)


def test_a_rank_whose_torchrun_died_before_it_ends_at_its_first_instructions() -> None:
    ended = first_instructions(subprocess.DEVNULL, **{keeper.AGENT: "1"})
    assert ended.returncode == -signal.SIGTERM


def test_a_rank_whose_keeper_died_before_it_ends_at_its_first_instructions() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    ended = first_instructions(reading, **{keeper.AGENT: str(os.getpid())})
    os.close(reading)
    assert ended.returncode == -signal.SIGKILL


def test_a_rank_started_by_hand_ends_if_its_parent_is_no_torchrun() -> None:
    ended = first_instructions(subprocess.DEVNULL, shell=True, TORCHELASTIC_RUN_ID="x")
    assert (ended.returncode, ended.stderr) == (1, "torchrun is gone\n")
