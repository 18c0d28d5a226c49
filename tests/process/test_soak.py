"""A short soak; `python -m tests.soak` is the long one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.process.runs import Run
from tests.soak.attacks import ATTACKS
from tests.soak.faults import FAULTS

pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.mark.timeout(300)
def test_every_fault_and_every_attack_in_45_seconds_cost_no_answer(tmp_path: Path) -> None:
    """Wide limits of time, for a machine that others use; a draft waited for to the end would break them still."""
    limits = ["--stall-ms", "3000", "--grow-mib", "48"]
    soak = Run(
        tmp_path / "run",
        [
            sys.executable,
            "-m",
            "tests.soak",
            "--seconds",
            "45",
            "--faults",
            str(len(FAULTS | ATTACKS)),
            "--seed",
            "2",
            *limits,
        ],
    )
    try:
        assert soak.exit_code(280) == 0, soak.out + soak.err
        assert ", 0 wrong, 0 lost" in soak.out
        assert soak.out.splitlines()[-1] == "KEPT"
        soak.assert_nothing_is_left()
    finally:
        soak.kill()
