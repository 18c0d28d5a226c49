"""Confidence under coupling "rejection", in worlds where the draft's and the target's distributions are known."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

from ssd_runtime.speculation.drafting.confidence import ConfidenceFanOut
from ssd_runtime.speculation.drafting.fan_out import Verified
from ssd_runtime.speculation.drafting.policies import fan_out_policy
from ssd_runtime.speculation.rejection.acceptance import residual_oracle
from ssd_runtime.speculation.sampling.ranking import Ranking
from ssd_runtime.speculation.types import Proposal

SIZE, LOOKAHEAD, BUDGET, ROUNDS, LEARNING = 40, 3, 6, 900, 200
Play = tuple[Verified, int, int]


@functools.cache
def rounds(temperature: float, apart: float) -> tuple[Play, ...]:
    """Verifications of sampled tokens: what the draft saw, k and t*. `apart`: how far the models' logits are."""
    return tuple(_rounds(temperature, apart))


def _rounds(temperature: float, apart: float) -> Iterator[Play]:
    chance = torch.Generator().manual_seed(5)
    for _ in range(ROUNDS):
        z_LV = 3.0 * torch.randn(LOOKAHEAD + 1, SIZE, generator=chance, dtype=torch.float64)
        noise_LV = apart * torch.randn(LOOKAHEAD + 1, SIZE, generator=chance, dtype=torch.float64)
        q_LV, p_LV = torch.softmax(z_LV / temperature, 1), torch.softmax((z_LV + noise_LV) / temperature, 1)
        drafted = torch.multinomial(q_LV, 1, generator=chance).squeeze(1).tolist()
        rankings = []
        for z_V, q_V, token in zip(z_LV, q_LV, drafted, strict=True):
            best = z_V.topk(BUDGET + 1)
            proposal = Proposal(tuple(range(SIZE)), tuple(q_V.tolist()))
            margins = tuple((best.values[0] - best.values).tolist())
            rankings.append(Ranking(tuple(best.indices.tolist()), margins, token, proposal))
        u_L = torch.rand(LOOKAHEAD + 1, generator=chance)
        ratio = [float(p_LV[k, token] / q_LV[k, token]) for k, token in enumerate(drafted[:LOOKAHEAD])]
        k = next((k for k in range(LOOKAHEAD) if u_L[k] >= ratio[k]), LOOKAHEAD)
        last_V = p_LV[k] if k == LOOKAHEAD else residual_oracle(p_LV[k], q_LV[k])
        bonus = int(torch.multinomial(last_V, 1, generator=chance))
        yield Verified(drafted[:LOOKAHEAD], rankings, temperature), k, bonus


def rates(name: str, plays: tuple[Play, ...]) -> tuple[float, float, float]:
    """Hits and outcomes prepared for, a round; hits that the policy expected. After some rounds to learn from."""
    policy = fan_out_policy(name)  # type: ignore[arg-type]
    hits, prepared, expected = 0, 0, 0.0
    for index, (verified, k, bonus) in enumerate(plays):
        forks = policy.forks(verified, BUDGET)
        if index >= LEARNING:
            hits += any((fork.position, fork.token) == (k, bonus) for fork in forks)
            prepared += len(forks)
            expected += sum(fork.gain for fork in forks)
        policy.observe(verified, k, bonus)
    count = len(plays) - LEARNING
    return hits / count, prepared / count, expected / count


@pytest.mark.parametrize(("temperature", "apart"), [(0.7, 0.5), (1.0, 1.0), (1.0, 2.0)])
def test_gains_are_chances_and_prepare_for_more_outcomes_than_counting(temperature: float, apart: float) -> None:
    plays = rounds(temperature, apart)
    hits, prepared, expected = rates("confidence", plays)
    assert hits == pytest.approx(expected, abs=0.05)
    assert hits > rates("uniform", plays)[0] + 0.02
    assert prepared <= BUDGET


def test_a_sampled_token_that_ranks_low_is_not_taken_for_a_lost_one() -> None:
    """It is accepted about as often as others of its q: outcomes behind it are prepared for."""
    plays = rounds(1.0, 1.0)
    policy = ConfidenceFanOut()
    for verified, k, bonus in plays:
        policy.observe(verified, k, bonus)
    low = [verified for verified, _, _ in plays if verified.speculation[0] not in verified.rankings[0].tokens[:2]]  # type: ignore[union-attr]
    assert len(low) > 20
    for verified in low:
        assert any(fork.position > 0 for fork in policy.forks(verified, BUDGET))


def test_nothing_that_the_speculation_denies_is_prepared_for() -> None:
    policy = ConfidenceFanOut()
    for verified, k, bonus in rounds(1.0, 2.0)[:200]:
        found = [(fork.position, fork.token) for fork in policy.forks(verified, BUDGET)]
        assert len(set(found)) == len(found)
        assert not set(found) & set(enumerate(verified.speculation))
        policy.observe(verified, k, bonus)


def test_an_ngram_token_counts_by_its_rank() -> None:
    """It was not sampled: its chance is that of a bonus."""
    verified, _, _ = rounds(0.7, 0.5)[0]
    ranking = verified.rankings[0]
    assert ranking is not None
    first, other = ranking.tokens[0], ranking.tokens[3]
    gains = []
    for token in (first, other):
        rankings = [Ranking(ranking.tokens, ranking.margins, ranking.tokens[5], ranking.proposal), ranking]
        forks = ConfidenceFanOut().forks(Verified([token], rankings, 0.7), 20, allowed=10**6)
        gains.append(sum(fork.gain for fork in forks if fork.position == 1))
    assert gains[0] > 3 * gains[1]
