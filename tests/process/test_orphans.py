"""From its first instruction no rank outlives whoever started it, and no folder outlives its run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.process.conftest import Start
from tests.process.orphans import FAULTS, Fault, prepared, strike

pytestmark = pytest.mark.process
WHEN = (0.05, 0.7, 0.6, 0.3, 0.8, 0.5, 0.2)  # `python -m tests.process.orphans` tries all faults at many moments
SOME = tuple(zip(FAULTS, WHEN, strict=False))


@pytest.fixture(scope="module")
def a_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("orphans"))


@pytest.mark.parametrize(("fault", "when"), SOME, ids=[str(fault) for fault, _ in SOME])
def test_nothing_is_left_whoever_is_killed_or_stopped_while_ranks_come_up(
    run: Start, a_draft: Path, fault: Fault, when: float
) -> None:
    strike(run, a_draft, fault, when * fault.longest_s)
