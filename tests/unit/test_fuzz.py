"""A short run of the fuzzer; `python -m tests.fuzz` is the long one."""

from __future__ import annotations

import subprocess
import sys

import pytest

BROKEN = """
import sys
from tests.fuzz import __main__ as fuzz
whole = fuzz.decode
def decode(data, limits):
    message = whole(data, limits)
    if type(message).__name__ == "Cancel":
        raise RecursionError("planted")
    return message
fuzz.decode = decode
sys.argv = ["fuzz", "--messages", "300", "--frames", "0"]
sys.exit(fuzz.main())
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=150, check=False)


@pytest.mark.slow
def test_thousands_of_damaged_messages_and_frames_crash_and_hang_nobody() -> None:
    done = run("-m", "tests.fuzz", "--messages", "4000", "--frames", "5000", "--seed", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "NOTHING CRASHED OR HUNG"
    counts = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines()[:-1])
    for who in ("messages to a leader", "frames to a draft", "frames to a target", "engines beside a liar"):
        assert int(counts[who]) > 0, f"{who}: {done.stdout}"


def test_a_crash_is_counted_and_named() -> None:
    done = run("-c", BROKEN)
    assert done.returncode == 1
    assert "RecursionError" in done.stdout
    assert "planted" in done.stdout
    assert done.stdout.splitlines()[-1] == "CRASHED"
