"""What speculates after a miss: waiting against counting tokens, and `auto` against trying every choice."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.speculation.drafting.estimates import AcceptanceEstimate
from ssd_runtime.speculation.planning.backup import PATIENCE, AutoBackup, BackupChoice, JustInTime, Missed, waiting_pays
from ssd_runtime.speculation.planning.cost_model import CostModel, expected_tokens
from ssd_runtime.speculation.types import Outcome, Source, Speculation


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


def measured_costs(
    *, draft: float = 0.8, step_ms: float, verify_ms: float = 30.0, step_row_ms: float = 0.0, row_ms: float = 0.0
) -> CostModel:
    """A draft that is right so often, forwards that take so long, and rounds of two tokens a sequence."""
    costs = CostModel()
    for accepted in ([True] * round(10 * draft) + [False] * round(10 * (1 - draft))) * 80:
        costs.acceptance[Source.DRAFT].observe_one(accepted)
    for rows in (1, 2, 4, 8):
        costs.drafted((step_ms + step_row_ms * rows) / 1e3, rows)
        seconds = (verify_ms + row_ms * rows) / 1e3
        costs.verified([Speculation((1,) * (rows - 1))], [Outcome(0, 1)], seconds)
        costs.ended(2.0, seconds)
    costs.acceptance[Source.DRAFT] = AcceptanceEstimate(prior=draft)
    return costs


def choices(costs: CostModel, *missed: tuple[int, float, int], sequences: int = 0) -> list[BackupChoice]:
    """Of sequences given as (length of the match, its rate, most drafted)."""
    return AutoBackup(costs).choose([Missed(*one) for one in missed], sequences or len(missed))


def test_auto_takes_a_sure_ngram_and_the_draft_where_there_is_none() -> None:
    costs = measured_costs(draft=0.8, step_ms=1.0)
    assert choices(costs, (6, 0.9, 6)) == [BackupChoice(waits=False, ngram=6)]
    assert choices(costs, (0, 0.0, 6)) == [BackupChoice(waits=True, ngram=0)]
    assert choices(costs, (6, 0.9, 6), (0, 0.0, 6)) == [BackupChoice(False, 6), BackupChoice(True, 0)]  # each its own
    assert choices(costs, (6, 0.1, 6), (6, 0.1, 6)) == [BackupChoice(True, 6), BackupChoice(True, 6)]


def test_auto_does_not_wait_for_a_slow_draft_nor_where_nobody_can_be_waited_for() -> None:
    assert choices(measured_costs(step_ms=60.0), (0, 0.0, 6), (3, 0.3, 6)) == [
        BackupChoice(False, 0),
        BackupChoice(False, 3),
    ]
    assert choices(measured_costs(step_ms=1.0), (0, 0.0, 0), (3, 0.3, 0)) == [
        BackupChoice(False, 0),
        BackupChoice(False, 3),
    ]


def test_auto_verifies_no_row_that_costs_more_than_it_promises() -> None:
    """Two tokens take 32 ms: one that is half likely is worth 8 ms, the next one 4, and so on."""
    for row_ms, tokens in ((0.0, 6), (0.3, 5), (1.5, 3), (3.0, 2), (20.0, 0)):
        assert choices(measured_costs(step_ms=60.0, row_ms=row_ms), (6, 0.5, 6)) == [BackupChoice(False, tokens)]
    # A row holds up all of the batch.
    assert choices(measured_costs(step_ms=60.0, row_ms=0.3), (6, 0.5, 6), sequences=8) == [BackupChoice(False, 2)]


def test_auto_waits_in_small_batches_and_not_in_large_ones() -> None:
    """Theorem 17: a step for all takes longer, a match does not; there is one batch size where it turns."""
    costs = measured_costs(draft=0.9, step_ms=1.0, step_row_ms=1.5)
    waits = [all(one.waits for one in choices(costs, *[(6, 0.5, 6)] * size)) for size in range(1, 20)]
    assert waits[0]
    assert not waits[-1]
    assert waits == sorted(waits, reverse=True)


@settings(max_examples=60, deadline=None)
@given(
    missed=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([0.1, 0.5, 0.9]), st.integers(0, 3)), min_size=1, max_size=3
    ),
    draft=st.sampled_from([0.2, 0.6, 0.9]),
    step_ms=st.sampled_from([0.3, 2.0, 8.0, 40.0]),
    row_ms=st.sampled_from([0.0, 1.0, 4.0]),
    others=st.integers(0, 4),
)
def test_auto_chooses_what_trying_everything_finds_best(
    missed: list[tuple[int, float, int]], draft: float, step_ms: float, row_ms: float, others: int
) -> None:
    costs = measured_costs(draft=draft, step_ms=step_ms, row_ms=row_ms)
    sequences = len(missed) + (others if not any(most for _, _, most in missed) else 0)
    assert costs.rate is not None
    price = sequences * costs.rate

    def worth(takes: tuple[tuple[bool, int], ...]) -> float:
        """Of (drafted rather than the match, how many tokens) of each sequence."""
        steps = max((count for drafted, count in takes if drafted), default=0)
        total = -price * (costs.unfinished_seconds + steps * costs.step.at(len(missed))) if steps else 0.0
        for (drafted, count), (_, ngram, _) in zip(takes, missed, strict=True):
            total += expected_tokens(count, draft if drafted else ngram) - 1 - price * costs.verification.slope * count
        return total

    options = [
        [(False, count) for count in range(match + 1)] + [(True, count) for count in range(1, most + 1)]
        for match, _, most in missed
    ]
    best = max(itertools.product(*options), key=worth)
    found = choices(costs, *missed, sequences=sequences)
    drafted = [
        [(True, count) for count in range(1, most + 1)] if one.waits else [(False, one.ngram)]
        for one, (_, _, most) in zip(found, missed, strict=True)
    ]
    assert max(map(worth, itertools.product(*drafted))) == pytest.approx(worth(best))


def test_nothing_measured_yet_means_ngrams_and_no_wait() -> None:
    """The first round measures; until then the draft prepares for the next."""
    assert choices(CostModel(), (6, 0.4, 6), (0, 0.0, 6)) == [BackupChoice(False, 6), BackupChoice(False, 0)]
    just_in_time = JustInTime(CostModel())
    assert not just_in_time.enough([0, 6], [6, 6])
    assert just_in_time.enough([6, 3], [6, 3])


def test_a_batch_weighs_what_all_would_gain_against_what_all_would_wait() -> None:
    """One sequence with a long way to go waits less when others are ready and wait with it."""
    just_in_time = JustInTime(measured_costs(draft=0.8, step_ms=7.0))
    assert not just_in_time.enough([1], [6])
    assert just_in_time.enough([1, 6, 6, 6, 6], [6, 6, 6, 6, 6])
