"""How long the draft is waited for after a miss, against counting tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_runtime.speculation.planning.cost_model import AcceptanceEstimate, CostModel, expected_tokens
from ssd_runtime.speculation.planning.planner import PATIENCE, drafted_enough, waiting_pays
from ssd_runtime.speculation.types import Outcome, Speculation


def worth_waiting(length: int, acceptance: float, token_seconds: float, round_seconds: float) -> bool:
    """Of one sequence that has so many tokens already."""
    added = acceptance ** (length + 1)
    return waiting_pays(added, expected_tokens(length, acceptance), token_seconds, round_seconds)


@given(
    length=st.integers(0, 8),
    acceptance=st.floats(0.01, 0.99),
    step_ms=st.floats(0.1, 100),
    verify_ms=st.floats(0.1, 100),
    waited_ms=st.floats(0, 500),
)
def test_waiting_pays_when_a_token_more_is_worth_its_time(
    length: int, acceptance: float, step_ms: float, verify_ms: float, waited_ms: float
) -> None:
    """Against the rates themselves: tokens of this round over the time from now to its end. What was waited is gone."""

    def tokens_per_ms(tokens: int, further_wait_ms: float) -> float:
        expected = sum(acceptance**k * (1 - acceptance) * (k + 1) for k in range(tokens))
        expected += acceptance**tokens * (tokens + 1)
        return expected / (further_wait_ms + verify_ms)

    # Patience counts the tokens that are added for a little more than they are.
    now, later = tokens_per_ms(length, 0.0), tokens_per_ms(length + 1, step_ms)
    later += (PATIENCE - 1) * acceptance ** (length + 1) / (step_ms + verify_ms)
    if now != pytest.approx(later, rel=1e-9):
        assert worth_waiting(length, acceptance, step_ms / 1e3, verify_ms / 1e3) == (later > now)


def test_waiting_ends_for_good_once_it_does_not_pay() -> None:
    for acceptance in (0.3, 0.8, 0.95):
        worth = [worth_waiting(length, acceptance, 0.010, 0.060) for length in range(60)]
        assert worth == sorted(worth, reverse=True)
        assert worth[0]
        assert not worth[-1]


def test_a_draft_slower_than_the_target_is_not_waited_for() -> None:
    assert not worth_waiting(0, 0.99, 0.050, 0.040)


def test_nothing_measured_yet_means_a_wait_for_the_whole_branch() -> None:
    assert not drafted_enough(CostModel(), [0, 6], [6, 6])
    assert drafted_enough(CostModel(), [6, 3], [6, 3])


def test_a_batch_weighs_what_all_would_gain_against_what_all_would_wait() -> None:
    """One sequence with a long way to go waits less when others are ready and wait with it."""
    costs = CostModel()
    for rows in (1, 2, 4, 8):
        costs.drafted(0.007, rows)
        costs.verified([Speculation((1,) * (rows - 1))], [Outcome(0, 1)], 0.030)
    costs.acceptance = AcceptanceEstimate(prior=0.8)
    assert not drafted_enough(costs, [1], [6])
    assert drafted_enough(costs, [1, 6, 6, 6, 6], [6, 6, 6, 6, 6])
