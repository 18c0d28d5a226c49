"""Rows that leave nothing to choose, and parameters at their extremes: one answer, or one refusal, by everybody."""

from __future__ import annotations

import math
import unittest.mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.errors import RequestError
from ssd_runtime.leader.forward_codec import decode_choices, encode_choices
from ssd_runtime.speculation.limits import check_sampling
from ssd_runtime.speculation.rejection.acceptance import verify_by_rejection
from ssd_runtime.speculation.rejection.proposal import ProposalRule, propose_tokens
from ssd_runtime.speculation.sampling import ranking as sampling
from ssd_runtime.speculation.sampling.ranking import (
    Choice,
    choose,
    count_rows,
    process_logits,
    rank_tokens,
    rank_tokens_oracle,
)
from ssd_runtime.speculation.sampling.vocab_parallel import decidable, decide, report
from ssd_runtime.speculation.types import GREEDY_UP_TO, NO_TOKEN, Outcome, SamplingParams, Speculation
from ssd_runtime.speculation.verify import tokens_decide, verify_by_logits

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 5e-324, 1e-38, GREEDY_UP_TO, 2e-5, 1e-3, 1.0, 100.0]),
    top_k=st.sampled_from([0, 1, 5, 2**62]),
    top_p=st.sampled_from([1.0, 0.9, 1e-12, 5e-324]),
    min_p=st.sampled_from([0.0, 5e-324, 1e-30, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
SPOILT = st.sampled_from(["no", "a NaN", "an inf", "all excluded", "all NaN", "too large"])


def row(spoilt: str, size: int, scale: float, entropy: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(entropy)
    logits_V = torch.randn(size, generator=generator) * scale
    if spoilt == "all excluded":
        return torch.full_like(logits_V, -torch.inf)
    if spoilt == "all NaN":
        return torch.full_like(logits_V, torch.nan)
    logits_V[torch.rand(size, generator=generator) < 0.3] = -torch.inf
    logits_V[1] = 0.5 * scale  # something is left
    spoiling = {"a NaN": torch.nan, "an inf": torch.inf}
    if spoilt in spoiling:
        logits_V[entropy % size] = spoiling[spoilt]
    if spoilt == "too large":  # finite, and beyond float32 when the temperature has divided it
        logits_V[0] = 3e38
    return logits_V


def plain():
    return unittest.mock.patch.object(sampling.ops, "backend", return_value="plain")


@settings(max_examples=300, deadline=None)
@given(
    params=PARAMS,
    spoilt=SPOILT,
    size=st.sampled_from([2, 7, 16, 33, 1500]),
    scale=st.sampled_from([1e-30, 1.0, 20.0, 1e4]),
    entropy=st.integers(0, 2**32),
    count=st.sampled_from([1, 3]),
)
def test_every_way_to_choose_gives_the_same_token_or_none(params, spoilt, size, scale, entropy, count):
    logits_V = row(spoilt, size, scale, entropy)
    choice, half = Choice(params, 17), size // 2
    (expected,) = rank_tokens_oracle(logits_V[None], [choice], count)
    (compiled,) = rank_tokens(logits_V[None], [choice], count)
    with plain():
        (by_torch,) = rank_tokens(logits_V[None], [choice], count)
    assert compiled.tokens == by_torch.tokens == expected.tokens
    assert all(logits_V[token] > -torch.inf for token in expected.tokens)
    assert bool(expected.tokens) == math.isfinite(process_logits(logits_V, params).max())
    if decidable(choice, size):
        parts = ((0, half), (half, size))
        reports = [report(logits_V[None, a:b], [choice.within(a, b)], a, size) for a, b in parts]
        (found,) = decide(torch.stack(reports), [choice], size)
        assert found is None or (found,) == expected.tokens[:1]
        assert found is None or bool(expected.tokens)


def test_noise_decides_among_equals_at_the_lowest_temperature_as_at_any():
    """Scores of many millions are coarse in float32: whoever sums them there must not lose a winner to rounding."""
    steps_V = torch.randint(0, 3, (3000,), generator=torch.Generator().manual_seed(1))
    logits_V = 1000.0 + steps_V * 2.0**-14
    choices = [Choice(SamplingParams(temperature=1.1e-5, seed=seed), 3) for seed in range(60)]
    logits_RV = logits_V.expand(len(choices), -1).contiguous()
    assert choose(logits_RV, choices) == [one.tokens[0] for one in rank_tokens_oracle(logits_RV, choices, 1)]


@settings(max_examples=200, deadline=None)
@given(
    params=PARAMS,
    spoilt=SPOILT,
    size=st.sampled_from([2, 7, 100]),
    entropy=st.integers(0, 2**32),
    rule=st.sampled_from([ProposalRule(), ProposalRule(top_m=1), ProposalRule(saguaro_c=0.0)]),
)
def test_rejection_sampling_chooses_what_is_allowed_or_nothing(params, spoilt, size, entropy, rule):
    logits_V = row(spoilt, size, 5.0, entropy)
    fit = math.isfinite(process_logits(logits_V, params).max())
    speculations = [Speculation((token,) * length) for token, length in ((0, 0), (0, 1), (1, 2))]
    choices = [Choice(params, 17, range(len(one.tokens) + 1), one.tokens, text=3) for one in speculations]
    logits_RV = logits_V.expand(count_rows(choices), size).contiguous()
    outcomes = verify_by_logits("rejection", logits_RV, choices, speculations)
    for speculation, outcome in zip(speculations, outcomes, strict=True):
        emitted = (*speculation.tokens[: outcome.num_accepted], outcome.bonus_token)
        assert emitted == (NO_TOKEN,) if not fit else all(logits_V[token] > -torch.inf for token in emitted)
    (proposed,) = propose_tokens(logits_V[None], [Choice(params, 17, text=3)], 2, rule)
    assert bool(proposed.tokens) == fit
    assert not fit or logits_V[proposed.draft_token] > -torch.inf


@pytest.mark.parametrize("spoilt", ["a NaN", "an inf", "all excluded", "all NaN"])
def test_a_row_that_leaves_nothing_spoils_no_row_beside_it(spoilt):
    good = [row("no", 40, 3.0, entropy) for entropy in range(3)]
    choices = [Choice(SamplingParams(temperature=heat, seed=5), 9) for heat in (0.0, 1.0, 0.0, 1.0, 0.7)]
    alone = [choose(logits_V[None], [choice])[0] for logits_V, choice in zip(good, choices[2:], strict=True)]
    bad = row(spoilt, 40, 3.0, 1)
    assert choose(torch.stack([bad, bad, *good]), choices) == [NO_TOKEN, NO_TOKEN, *alone]
    with plain():
        assert choose(torch.stack([bad, bad, *good]), choices) == [NO_TOKEN, NO_TOKEN, *alone]


def test_what_was_accepted_before_a_row_that_leaves_nothing_stays_accepted():
    good, bad = torch.tensor([0.0, 9.0, 0.0]), torch.full((3,), torch.nan)
    logits_RV, choice = torch.stack([good, good, bad, bad]), Choice(SamplingParams(), 4, range(4))
    accepted, rejected = Speculation((1, 1, 1)), Speculation((1, 2, 1))
    assert verify_by_logits("shared-noise", logits_RV, [choice], [accepted]) == [Outcome(2, NO_TOKEN)]
    assert verify_by_logits("shared-noise", logits_RV, [choice], [rejected]) == [Outcome(1, 1)]
    sampled = verify_by_rejection(torch.stack([good, bad]) * 100, Speculation((1,)), 0, 0)
    assert sampled == Outcome(1, NO_TOKEN)


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-6, GREEDY_UP_TO])
def test_a_temperature_near_zero_is_greedy_for_everybody(temperature):
    params = SamplingParams(temperature=temperature, seed=3, top_p=0.5)
    assert params.temperature == 0.0
    check_sampling(params)
    (choice,) = decode_choices(encode_choices([Choice(params, 5)]), 40)
    assert choice.params.temperature == 0.0
    assert tokens_decide("rejection", params)
    logits_V = row("no", 40, 3.0, 1)
    assert choose(logits_V[None], [Choice(params, 5)]) == choose(logits_V[None], [Choice(SamplingParams(), 5)])


def test_a_temperature_above_the_bound_is_kept_and_one_below_zero_is_refused():
    above = math.nextafter(GREEDY_UP_TO, 1.0)
    assert SamplingParams(temperature=above).temperature == above
    for wrong in (-1e-38, -GREEDY_UP_TO, math.nan, -math.inf, math.inf):
        with pytest.raises(RequestError, match="temperature"):
            check_sampling(SamplingParams(temperature=wrong))
