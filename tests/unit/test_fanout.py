"""How the budget is spread: the formulas of the paper, and the policy that learns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_runtime.speculation.fanout import (
    POWER_LAW_EXPONENT,
    AcceptanceEstimate,
    ConfidenceFanOut,
    fan_out_policy,
    geometric_counts,
    uniform_counts,
)
from ssd_runtime.speculation.sampling import Ranking

SURE = Ranking((10, 11, 12, 13), (0.0, 9.0, 9.5, 9.9))
TORN = Ranking((20, 21, 22, 23), (0.0, 0.01, 3.0, 4.0))


def expected_misses(counts: list[int] | tuple[int, ...], acceptance: float, exponent: float) -> float:
    """The chance of a miss: the outcome is at k with probability a^k (1 - a) (a^K at the end), missed with 1 / F^r."""
    last = len(counts) - 1
    at = [acceptance**k * (1 - acceptance if k < last else 1.0) for k in range(last + 1)]
    return sum(chance * (count**-exponent if count else 1.0) for chance, count in zip(at, counts, strict=True))


def spreads(budget: int, positions: int) -> Iterator[tuple[int, ...]]:
    """Every way to spread a budget over positions."""
    for cuts in itertools.combinations_with_replacement(range(budget + 1), positions - 1):
        edges = (0, *cuts, budget)
        yield tuple(after - before for before, after in itertools.pairwise(edges))


@given(budget=st.integers(1, 200), length=st.integers(0, 12), acceptance=st.floats(0, 1))
def test_counts_sum_to_the_budget(budget: int, length: int, acceptance: float) -> None:
    for counts in (uniform_counts, geometric_counts):
        found = counts(budget, length, acceptance)
        assert len(found) == length + 1
        assert sum(found) == budget
        assert min(found) >= 0


def test_uniform_is_even_and_gives_the_rest_to_the_end() -> None:
    assert uniform_counts(8, 3, 0.5) == [2, 2, 2, 2]
    assert uniform_counts(10, 3, 0.5) == [2, 2, 3, 3]
    assert uniform_counts(2, 4, 0.5) == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("acceptance", [0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("length", [0, 1, 4, 7])
def test_geometric_is_theorem_12(acceptance: float, length: int) -> None:
    r, budget = POWER_LAW_EXPONENT, 1000
    direct = [acceptance ** (k / (1 + r)) for k in range(length)]
    direct.append(acceptance ** (length / (1 + r)) * (1 - acceptance) ** (-1 / (1 + r)))
    shares = [budget * weight / sum(direct) for weight in direct]
    for count, share in zip(geometric_counts(budget, length, acceptance), shares, strict=True):
        assert abs(count - share) < 1


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("exponent", [0.5, 0.75, 1.5])
def test_geometric_cannot_be_bettered_by_moving_candidates(acceptance: float, exponent: float) -> None:
    """Lagrange's condition: at the optimum of a convex cost no exchange between two positions pays."""
    counts = geometric_counts(10_000, 4, acceptance, exponent)
    least = expected_misses(counts, acceptance, exponent)
    for giver, taker in itertools.permutations(range(5), 2):
        moved = list(counts)
        moved[giver] -= 20
        moved[taker] += 20
        assert expected_misses(moved, acceptance, exponent) > least


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.9])
@pytest.mark.parametrize(("budget", "length"), [(20, 1), (30, 2), (40, 3)])
def test_geometric_is_the_best_of_all_spreads_up_to_rounding(acceptance: float, budget: int, length: int) -> None:
    """By brute force, with at least two candidates a position: below that the power law says nothing."""
    found = geometric_counts(budget, length, acceptance)
    costs = {
        spread: expected_misses(spread, acceptance, POWER_LAW_EXPONENT)
        for spread in spreads(budget, length + 1)
        if min(spread) >= min(2, *found)
    }
    assert costs[tuple(found)] <= 1.01 * min(costs.values())
    assert costs[tuple(found)] <= expected_misses(uniform_counts(budget, length, 0), acceptance, POWER_LAW_EXPONENT)


def test_acceptance_estimate_moves_from_its_prior_to_what_it_sees() -> None:
    estimate = AcceptanceEstimate(prior=0.8)
    assert estimate.rate == pytest.approx(0.8)
    for _ in range(2000):
        estimate.observe(1, 4)  # one accepted, one rejected, two that say nothing
    assert estimate.rate == pytest.approx(0.5, abs=0.01)
    for _ in range(2000):
        estimate.observe(4, 4)
    assert estimate.rate > 0.99


@given(
    name=st.sampled_from(["uniform", "geometric", "confidence"]),
    known=st.lists(st.booleans(), min_size=1, max_size=5),
    budget=st.integers(1, 24),
    data=st.data(),
)
def test_forks_are_distinct_within_the_budget_and_never_what_the_speculation_denies(
    name: str, known: list[bool], budget: int, data: st.DataObject
) -> None:
    rankings = [data.draw(st.sampled_from([SURE, TORN])) if there else None for there in known]
    speculation = data.draw(st.lists(st.integers(10, 24), min_size=len(known) - 1, max_size=len(known) - 1))
    forks = fan_out_policy(name).forks(rankings, speculation, budget)  # type: ignore[arg-type]
    assert len(forks) == len(set(forks)) <= budget
    for k, token in forks:
        ranking = rankings[k]
        assert ranking is not None
        assert token in ranking.tokens
        assert k == len(speculation) or token != speculation[k]


def test_counted_policies_take_the_best_candidates_of_each_position() -> None:
    forks = fan_out_policy("uniform").forks([TORN, SURE], [20], 4)
    assert forks == [(0, 21), (0, 22), (1, 10), (1, 11)]


def test_confidence_forks_where_the_draft_is_torn_first() -> None:
    forks = ConfidenceFanOut().forks([SURE, TORN, SURE], [10, 20], 8)
    assert set(forks[:2]) == {(2, 10), (1, 21)}
    assert (0, 11) not in forks


def test_confidence_leaves_out_what_hardly_ever_happens() -> None:
    forks = ConfidenceFanOut(least=0.01).forks([SURE], [10], 8)
    assert forks == []  # a sure draft is right .99 of the time


def chance(policy: ConfidenceFanOut, ranking: Ranking, rank: int) -> float:
    return list(policy.chances(ranking))[rank]


def test_confidence_learns_that_a_sure_draft_is_wrong() -> None:
    policy = ConfidenceFanOut()
    before = chance(policy, SURE, 0)
    for _ in range(200):
        policy.observe([SURE, SURE], [10], 0, 11)
    assert chance(policy, SURE, 0) < 0.1 < 0.9 < before
    assert chance(policy, SURE, 1) > 0.8
    assert policy.forks([SURE], [10], 1) == [(0, 11)]
    assert chance(policy, TORN, 0) == pytest.approx(chance(ConfidenceFanOut(), TORN, 0))  # another class of margin


@given(outcomes=st.lists(st.tuples(st.sampled_from([SURE, TORN]), st.integers(0, 4)), max_size=60))
def test_the_chances_of_all_ranks_are_a_distribution(outcomes: list[tuple[Ranking, int]]) -> None:
    policy = ConfidenceFanOut()
    for ranking, rank in outcomes:
        token = ranking.tokens[rank] if rank < len(ranking.tokens) else 99
        policy.observe([ranking], [], 0, token)
    for ranking in (SURE, TORN):
        chances = list(policy.chances(Ranking(tuple(range(40)), (*ranking.margins[:2], *[9.0] * 38))))
        assert min(chances) >= 0
        assert sum(chances) == pytest.approx(1.0, abs=1e-6)
