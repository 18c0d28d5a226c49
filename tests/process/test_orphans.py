"""From its first instruction no rank outlives whoever started it, and no folder outlives its run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.process.conftest import Start
from tests.process.orphans import FAULTS, READY_S, Fault, prepared, strike

pytestmark = pytest.mark.process
SOME = FAULTS[:7]  # `python -m tests.process.orphans` tries the others too, at many moments


@pytest.fixture(scope="module")
def a_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("orphans"))


@pytest.mark.parametrize(
    ("fault", "after_s"),
    [(fault, READY_S * random.Random(f"{fault}").random() ** 2) for fault in SOME],  # rather early than late
    ids=[str(fault) for fault in SOME],
)
def test_nothing_is_left_whoever_is_killed_or_stopped_while_ranks_come_up(
    run: Start, a_draft: Path, fault: Fault, after_s: float
) -> None:
    strike(run, a_draft, fault, after_s)
