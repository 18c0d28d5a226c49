"""How the budget is spread: the formulas of the paper, and the policy that learns."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_runtime.speculation.drafting.confidence import ConfidenceFanOut, least_chance
from ssd_runtime.speculation.drafting.counts import GeometricFanOut, PowerLawEstimate, uniform_counts
from ssd_runtime.speculation.drafting.fan_out import UNKNOWN, FanOut, Fork, Verified, divide_budget
from ssd_runtime.speculation.drafting.policies import fan_out_policy
from ssd_runtime.speculation.planning.cost_model import AcceptanceEstimate
from ssd_runtime.speculation.sampling.ranking import Ranking

SURE = Ranking((10, 11, 12, 13), (0.0, 9.0, 9.5, 9.9))
TORN = Ranking((20, 21, 22, 23), (0.0, 0.01, 3.0, 4.0))


def geometric_shares(budget: float, length: int, acceptance: float, exponent: float) -> list[float]:
    """F_0..F_K by Theorem 12: F_k = F_0 a^{k/(1+r)} for k < K and F_K = F_0 a^{K/(1+r)} (1-a)^{-1/(1+r)}."""
    weights = [acceptance ** (k / (1.0 + exponent)) for k in range(length + 1)]
    weights[-1] *= (1.0 - acceptance) ** (-1.0 / (1.0 + exponent))
    return [budget * weight / sum(weights) for weight in weights]


def expected_misses(counts: Sequence[float], acceptance: float, exponent: float) -> float:
    """The chance of a miss: the outcome is at k with probability a^k (1 - a) (a^K at the end), missed with 1 / F^r."""
    last = len(counts) - 1
    at = [acceptance**k * (1 - acceptance if k < last else 1.0) for k in range(last + 1)]
    return sum(chance * (count**-exponent if count else 1.0) for chance, count in zip(at, counts, strict=True))


def spreads(budget: int, positions: int) -> Iterator[tuple[int, ...]]:
    """Every way to spread a budget over positions."""
    for cuts in itertools.combinations_with_replacement(range(budget + 1), positions - 1):
        edges = (0, *cuts, budget)
        yield tuple(after - before for before, after in itertools.pairwise(edges))


NAMES = ("uniform", "geometric", "confidence")


def policy(name: str) -> FanOut:
    return fan_out_policy(name)  # type: ignore[arg-type]


def counts(forks: Sequence[Fork], length: int) -> list[int]:
    return [sum(fork.position == k for fork in forks) for k in range(length + 1)]


def wide(length: int, candidates: int = 210, **changes: float) -> Verified:
    """A speculation whose rankings never run out."""
    ranking = Ranking(tuple(range(candidates)), tuple(map(float, range(candidates))))
    return Verified([0] * length, [ranking] * (length + 1), **changes)  # type: ignore[arg-type]


@given(budget=st.integers(1, 200), length=st.integers(0, 12))
def test_counts_sum_to_the_budget(budget: int, length: int) -> None:
    verified = wide(length)
    for name in ("uniform", "geometric"):
        forks = policy(name).forks(verified, budget)
        assert len(forks) == budget
        assert forks == sorted(forks, key=lambda fork: -fork.gain)


@given(budget=st.integers(1, 100), length=st.integers(0, 9))
def test_uniform_is_even_and_gives_the_rest_to_the_end(budget: int, length: int) -> None:
    found = counts(policy("uniform").forks(wide(length), budget), length)
    assert found == uniform_counts(budget, length)
    assert sum(found) == budget
    assert sorted(found) == found
    assert found[-1] - found[0] <= 1


@given(length=st.integers(1, 6), temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0]), data=st.data())
def test_geometric_is_theorem_12_with_what_was_learned(length: int, temperature: float, data: st.DataObject) -> None:
    """Its marginal gains give the theorem's shares to the nearest whole number, for the estimates of the class."""
    verified, geometric = wide(length, temperature=temperature), GeometricFanOut()
    for _ in range(data.draw(st.integers(0, 60))):
        geometric.observe(verified, data.draw(st.integers(0, length)), data.draw(st.integers(1, 40)))
    acceptance, power_law = geometric.estimates(verified)
    shares = geometric_shares(100, length, min(max(acceptance.rate, 0.01), 0.99), power_law.law[1])
    found = counts(geometric.forks(verified, 100), length)
    for count, share in zip(found, shares, strict=True):
        assert abs(count - share) <= 1.0 + 1e-6 * share


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("exponent", [0.5, 0.75, 1.5])
def test_theorem_12_cannot_be_bettered_by_moving_candidates(acceptance: float, exponent: float) -> None:
    """Lagrange's condition: at the optimum of a convex cost no exchange between two positions pays."""
    shares = geometric_shares(10_000, 4, acceptance, exponent)
    least = expected_misses(shares, acceptance, exponent)
    for giver, taker in itertools.permutations(range(5), 2):
        moved = list(shares)
        moved[giver] -= 20
        moved[taker] += 20
        assert expected_misses(moved, acceptance, exponent) > least


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.9])
@pytest.mark.parametrize(("budget", "length"), [(20, 1), (30, 2), (40, 3)])
def test_geometric_is_the_best_of_all_spreads_up_to_rounding(acceptance: float, budget: int, length: int) -> None:
    """By brute force, with at least two candidates a position: below that the power law says nothing."""
    geometric = GeometricFanOut()
    estimate, power_law = geometric.estimates(wide(length))
    for accepted in ([True] * round(20 * acceptance) + [False] * round(20 * (1 - acceptance))) * 60:
        estimate.observe_one(accepted)
    exponent = power_law.law[1]
    found = counts(geometric.forks(wide(length), budget), length)
    costs = {
        spread: expected_misses(spread, acceptance, exponent)
        for spread in spreads(budget, length + 1)
        if min(spread) >= min(2, *found)
    }
    assert costs[tuple(found)] <= 1.01 * min(costs.values())
    assert costs[tuple(found)] <= expected_misses(uniform_counts(budget, length), acceptance, exponent)


def test_geometric_learns_apart_for_temperatures_and_after_misses() -> None:
    geometric = GeometricFanOut()
    kinds = [wide(2, temperature=t, after_hit=hit) for t in (0.0, 0.3, 0.7, 1.0) for hit in (True, False)]
    before = [geometric.estimates(kind)[0].rate for kind in kinds], [geometric.estimates(kind)[1].law for kind in kinds]
    for _ in range(50):
        geometric.observe(kinds[3], 0, 30)
    for index, (kind, rate, law) in enumerate(zip(kinds, *before, strict=True)):
        acceptance, power_law = geometric.estimates(kind)
        assert ((acceptance.rate, power_law.law) == (rate, law)) == (index != 3)


@pytest.mark.parametrize(("scale", "exponent"), [(0.5, 0.4), (0.3, 1.0), (0.9, 2.0)])
def test_a_power_law_is_found_in_draws_from_it(scale: float, exponent: float) -> None:
    estimate, generator = PowerLawEstimate(memory=1e9), random.Random(1)
    for _ in range(30_000):
        chance = generator.random()
        rank = next((f for f in range(1, 25) if scale * f**-exponent < chance), None)
        estimate.observe(rank, 24)
    found_scale, found_exponent = estimate.law
    assert found_scale == pytest.approx(scale, rel=0.1)
    assert found_exponent == pytest.approx(exponent, rel=0.1)


@given(ranks=st.lists(st.tuples(st.none() | st.integers(1, 40), st.integers(1, 40)), max_size=100))
def test_a_power_law_is_always_a_law(ranks: list[tuple[int | None, int]]) -> None:
    estimate = PowerLawEstimate(memory=5.0)
    for rank, candidates in ranks:
        estimate.observe(rank, candidates)
        scale, exponent = estimate.law
        assert 0 < scale <= 1
        assert 0.1 <= exponent <= 4


FORKS = st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 5), st.integers(0, 8)), max_size=7)


@given(wanted=st.lists(FORKS, min_size=1, max_size=5), budget=st.integers(-2, 20))
def test_no_other_sharing_of_the_budget_gains_more(wanted: list[list[tuple[int, int, int]]], budget: int) -> None:
    """Against the dearest sum by brute force: the oracle tries how much each sequence could get."""
    asked = [sorted((Fork(*one) for one in forks), key=lambda fork: -fork.gain) for forks in wanted]
    shares = divide_budget([[fork._replace(token=abs(fork.token)) for fork in forks] for forks in asked], budget)
    assert sum(map(len, shares)) == min(max(0, budget), sum(map(len, asked)))
    best = {0: 0.0}  # places taken -> most gain, sequence by sequence
    for forks in asked:
        sums = list(itertools.accumulate((fork.gain for fork in forks), initial=0.0))
        grown: dict[int, float] = {}
        for (places, gain), taken in itertools.product(best.items(), range(len(forks) + 1)):
            grown[places + taken] = max(grown.get(places + taken, 0.0), gain + sums[taken])
        best = grown
    most = max(gain for places, gain in best.items() if places <= max(0, budget))
    assert sum(fork.gain for share in shares for fork in share) == most
    kept = divide_budget(asked, budget)
    assert UNKNOWN not in [fork.token for share in kept for fork in share]
    assert sum(map(len, kept)) <= max(0, budget)


def test_a_torn_sequence_takes_the_budget_of_a_sure_one() -> None:
    confidence = fan_out_policy("confidence")
    sure, torn = Verified([10], [SURE, SURE]), Verified([20], [TORN, TORN])
    sure_share, torn_share = divide_budget([confidence.forks(each, 8) for each in (sure, torn)], 5)
    assert len(torn_share) > len(sure_share)
    assert Fork(1, 10, sure_share[0].gain) == sure_share[0]


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
    name=st.sampled_from(NAMES),
    known=st.lists(st.booleans(), min_size=1, max_size=5),
    budget=st.integers(1, 24),
    data=st.data(),
)
def test_forks_are_distinct_within_the_budget_and_never_what_the_speculation_denies(
    name: str, known: list[bool], budget: int, data: st.DataObject
) -> None:
    rankings = [data.draw(st.sampled_from([SURE, TORN])) if there else None for there in known]
    speculation = data.draw(st.lists(st.integers(10, 24), min_size=len(known) - 1, max_size=len(known) - 1))
    wanted = policy(name).forks(Verified(speculation, rankings), budget)
    assert len(wanted) <= budget
    (forks,) = divide_budget([wanted], budget)
    assert len(forks) == len({fork[:2] for fork in forks})
    for k, token, _ in forks:
        ranking = rankings[k]
        assert ranking is not None
        assert token in ranking.tokens
        assert k == len(speculation) or token != speculation[k]


def test_counted_policies_take_the_best_candidates_of_each_position() -> None:
    forks = policy("uniform").forks(Verified([20], [TORN, SURE]), 4)
    assert {fork[:2] for fork in forks} == {(0, 21), (0, 22), (1, 10), (1, 11)}


def test_a_position_that_is_not_ranked_yet_keeps_its_places() -> None:
    for name in ("uniform", "geometric"):
        forks = policy(name).forks(Verified([20], [TORN, None]), 4)
        known = policy(name).forks(Verified([20], [TORN, SURE]), 4)
        (share,) = divide_budget([forks], 4)
        assert [fork for fork in known if fork.position == 0] == share


def test_confidence_forks_where_the_draft_is_torn_first() -> None:
    forks = [fork[:2] for fork in ConfidenceFanOut().forks(Verified([10, 20], [SURE, TORN, SURE]), 8)]
    assert set(forks[:2]) == {(2, 10), (1, 21)}
    assert (0, 11) not in forks


def test_confidence_leaves_out_what_hardly_ever_happens() -> None:
    forks = ConfidenceFanOut().forks(Verified([10], [SURE]), 10)
    assert forks == []  # a sure draft is right .99 of the time


def chance(policy: ConfidenceFanOut, ranking: Ranking, rank: int) -> float:
    return list(policy.chances(ranking))[rank]


def test_a_large_budget_means_the_improbable_too() -> None:
    """That of the sequence: however many others there are to spend that of a batch on."""
    confidence, verified = ConfidenceFanOut(), Verified([20, 20], [TORN, TORN, TORN])
    few, many = confidence.forks(verified, 24, allowed=4), confidence.forks(verified, 24, allowed=24)
    assert len(few) < len(many) < 24
    assert many[: len(few)] == few
    assert confidence.forks(verified, 24) == many
    for forks, allowed in ((few, 4), (many, 24)):
        assert min(fork.gain for fork in forks) >= least_chance(allowed)


@pytest.mark.parametrize(("allowed", "least"), [(0, 0.02), (7, 0.02), (8, 1 / 64), (24, 1 / 576)])
def test_what_an_outcome_must_have_of_a_chance_follows_from_what_is_allowed(allowed: int, least: float) -> None:
    assert least_chance(allowed) == pytest.approx(least)


def test_confidence_learns_how_far_the_models_are_apart() -> None:
    """Where the target's choices lie far behind the draft's first, distant candidates become worth a place."""
    spread = Ranking((1, 2, 3, 4, 5), (0.0, 0.5, 1.0, 1.5, 2.0))
    near, far = ConfidenceFanOut(), ConfidenceFanOut()
    for _ in range(60):
        near.observe(Verified([], [spread]), 0, 2)
        far.observe(Verified([], [spread]), 0, 5)
    assert chance(near, spread, 4) / chance(near, spread, 1) < 0.1 * chance(far, spread, 4) / chance(far, spread, 1)
    assert chance(near, spread, 0) == chance(far, spread, 0)  # how often they disagree is another matter


def test_confidence_learns_that_a_sure_draft_is_wrong() -> None:
    policy = ConfidenceFanOut()
    before = chance(policy, SURE, 0)
    for _ in range(200):
        policy.observe(Verified([10], [SURE, SURE]), 0, 11)
    assert chance(policy, SURE, 0) < 0.1 < 0.9 < before
    assert chance(policy, SURE, 1) > 0.8
    assert [fork[:2] for fork in policy.forks(Verified([10], [SURE]), 1)] == [(0, 11)]
    assert chance(policy, TORN, 0) == pytest.approx(chance(ConfidenceFanOut(), TORN, 0))  # another class of margin


@given(outcomes=st.lists(st.tuples(st.sampled_from([SURE, TORN]), st.integers(0, 4)), max_size=60))
def test_the_chances_of_all_ranks_are_a_distribution(outcomes: list[tuple[Ranking, int]]) -> None:
    policy = ConfidenceFanOut()
    for ranking, rank in outcomes:
        token = ranking.tokens[rank] if rank < len(ranking.tokens) else 99
        policy.observe(Verified([], [ranking]), 0, token)
    for ranking in (SURE, TORN):
        chances = list(policy.chances(Ranking(tuple(range(40)), (*ranking.margins[:2], *[9.0] * 38))))
        assert min(chances) >= 0
        assert sum(chances) == pytest.approx(1.0, abs=1e-6)
