"""Rejection sampling: the law by exact summation, the fast path against the definition, the draft's proposals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssd_runtime.speculation.noise import EMPTY_TEXT, Stream, extend_text, text_key, uniform_noise
from ssd_runtime.speculation.rejection.acceptance import (
    acceptance_oracle,
    dense,
    draw_oracle,
    point_mass,
    residual_oracle,
    verify_by_rejection,
    verify_oracle,
)
from ssd_runtime.speculation.rejection.proposal import ProposalRule, propose_oracle, propose_tokens
from ssd_runtime.speculation.rejection.saguaro import saguaro_logits
from ssd_runtime.speculation.sampling.ranking import Choice, process_logits, rank_tokens
from ssd_runtime.speculation.types import Outcome, Proposal, SamplingParams, Speculation

RULES = st.builds(
    ProposalRule,
    top_m=st.sampled_from([2, 3, 5, 32]),
    saguaro_c=st.sampled_from([1.0, 0.6, 0.1, 0.0]),
    saguaro_f=st.sampled_from([1, 2, 4]),
)


def random_logits(entropy: int, *shape: int, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(entropy)) * scale


# ---- the law, by summation over every token that the draft may sample ------------------------------------------------


def law(p_V: Tensor, sampled_V: Tensor, verified_V: Tensor | None = None, residual=residual_oracle) -> Tensor:
    """The distribution of what is emitted when tokens come from `sampled_V` and are verified against `verified_V`."""
    q_V = sampled_V if verified_V is None else verified_V
    emitted_V = torch.zeros_like(p_V)
    for token, chance in enumerate(sampled_V.tolist()):
        if chance > 0:
            accepted = acceptance_oracle(p_V, q_V, token)
            emitted_V[token] += chance * accepted
            emitted_V += chance * (1 - accepted) * residual(p_V, q_V)
    return emitted_V


@settings(max_examples=200, deadline=None)
@given(st.integers(4, 8), RULES, st.sampled_from([0.3, 0.7, 1.0]), st.integers(0, 2**32))
def test_what_is_emitted_has_the_targets_distribution_whatever_the_draft_samples_from(size, rule, temperature, entropy):
    z_V, draft_V = random_logits(entropy, 2, size) / temperature
    p_V = torch.softmax(z_V.double(), dim=0)
    _, proposal = propose_oracle(draft_V, rule, key=1)
    for q_V in (dense(proposal, size), dense(point_mass(proposal.tokens[0]), size)):
        torch.testing.assert_close(law(p_V, q_V), p_V, atol=1e-12, rtol=0)


P = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
Z_DRAFT = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64).log()
TRUNCATED = torch.softmax(torch.tensor([0.5, 0.25, 0.0, 0.0], dtype=torch.float64).log(), dim=0)
NOT_RENORMALISED = torch.tensor([0.5, 0.25, 0.0, 0.0], dtype=torch.float64)
MODIFIED = torch.softmax(saguaro_logits(Z_DRAFT[None], 0.3, 2)[0], dim=0)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda: law(P, MODIFIED, torch.softmax(Z_DRAFT, dim=0)), id="verified with the unmodified q"),
        pytest.param(
            lambda: law(P, MODIFIED, residual=lambda p_V, _: residual_oracle(p_V, torch.softmax(Z_DRAFT, dim=0))),
            id="residual from the unmodified q",
        ),
        pytest.param(lambda: law(P, TRUNCATED, NOT_RENORMALISED), id="truncated q not renormalised"),
        pytest.param(lambda: law(P, MODIFIED, residual=lambda p_V, _: p_V), id="p instead of the residual"),
    ],
)
def test_the_law_tells_mistakes(wrong: Callable[[], Tensor]):
    emitted_V = wrong()
    assert float(emitted_V.sum()) == pytest.approx(1.0)
    assert float((emitted_V - P).abs().sum()) / 2 > 0.02


def test_nothing_is_rejected_where_draft_and_target_agree():
    torch.testing.assert_close(residual_oracle(P, P), P)  # never used, but a distribution
    z_LV = P.log()[None].repeat(2, 1)
    proposal = Proposal((0, 1, 2, 3), tuple(P.float().tolist()))
    for text in range(200):
        outcome = verify_by_rejection(z_LV.float(), Speculation((text % 4,), proposals=(proposal,)), 0, text)
        assert outcome.num_accepted == 1


# ---- verification ----------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([4, 8, 300]), st.integers(0, 4), RULES, st.booleans(), st.integers(0, 2**32), st.integers(0, 2**64)
)
def test_the_fast_path_equals_the_definition(size, length, rule, sampled, entropy, seed):
    params = SamplingParams(temperature=0.8, top_k=size // 2, seed=seed)
    z_LV = torch.stack([process_logits(row, params) for row in random_logits(entropy, length + 1, size)])
    drafted = [propose_oracle(row, rule, entropy + k) for k, row in enumerate(random_logits(entropy + 1, length, size))]
    tokens = tuple(token for token, _ in drafted)
    speculation = Speculation(tokens, proposals=tuple(proposal for _, proposal in drafted) if sampled else ())
    fast = verify_by_rejection(z_LV, speculation, seed, entropy)
    assert fast == verify_oracle(z_LV, speculation, seed, entropy)
    assert z_LV[fast.num_accepted][fast.bonus_token] > -torch.inf


def test_a_token_that_the_processors_exclude_is_never_accepted():
    z_V = torch.tensor([0.0, -torch.inf, 1.0, 0.5])
    for text in range(300):
        outcome = verify_by_rejection(torch.stack([z_V, z_V]), Speculation((1,)), 3, text)
        assert outcome.num_accepted == 0
        assert outcome.bonus_token != 1


def test_the_bonus_after_nothing_is_a_plain_draw():
    z_LV = random_logits(5, 1, 16)
    p_V = torch.softmax(z_LV[0].double(), dim=0)
    for text in range(50):
        token = draw_oracle(p_V, text_key(9, text, Stream.CHOICE))
        assert verify_by_rejection(z_LV, Speculation(), 9, text) == Outcome(0, token)


# ---- the draft's side ------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(RULES, st.sampled_from([4, 8, 300]), st.sampled_from([1, 5]), st.integers(0, 2**32))
def test_proposals_equal_the_definition_and_candidates_are_ranked_by_logits(rule, size, count, entropy):
    logits_RV = random_logits(entropy, 3, size)
    params = [SamplingParams(t, top_k=size // 2, seed=entropy + row) for row, t in enumerate((0.3, 1.0, 1.7))]
    texts = [extend_text(EMPTY_TEXT, (entropy, row)) for row in range(3)]
    choices = [Choice(one, row, text=texts[row]) for row, one in enumerate(params)]
    for row, ranking in enumerate(propose_tokens(logits_RV, choices, count, rule)):
        z_V = process_logits(logits_RV[row], params[row])
        token, proposal = propose_oracle(z_V, rule, text_key(params[row].seed, texts[row], Stream.PROPOSAL))
        assert ranking.proposal is not None
        assert (ranking.draft_token, ranking.proposal.tokens) == (token, proposal.tokens)
        assert ranking.proposal.weights == pytest.approx(proposal.weights, rel=1e-6)
        best = z_V.topk(min(count, size // 2))
        assert ranking.tokens == tuple(best.indices.tolist())
        assert ranking.margins == pytest.approx(((best.values[0] - best.values) * params[row].temperature).tolist())
        assert token in ranking.proposal.tokens
        assert sum(ranking.proposal.weights) == pytest.approx(1.0, abs=1e-6)


def test_rows_at_temperature_0_are_ranked_as_ever():
    logits_RV = random_logits(1, 3, 40)
    choices = [Choice(SamplingParams(t, seed=5), 7, text=text) for text, t in enumerate((0.0, 1.0, 0.0))]
    rankings = propose_tokens(logits_RV, choices, 4, ProposalRule())
    assert rankings[0::2] == rank_tokens(logits_RV[0::2], choices[0::2], 4)
    assert rankings[0].draft_token == int(logits_RV[0].argmax())
    assert rankings[0].proposal is None


def test_a_draft_of_one_token_is_greedy_and_sends_nothing():
    logits_RV = random_logits(2, 1, 40)
    (ranking,) = propose_tokens(logits_RV, [Choice(SamplingParams(1.0), 7)], 4, ProposalRule(top_m=1))
    assert ranking.draft_token == int(logits_RV[0].argmax())
    assert ranking.proposal is None


def test_the_same_text_has_the_same_proposal_and_another_one_an_independent_one():
    logits_RV = random_logits(3, 1, 6).repeat(2000, 1)
    texts = [extend_text(EMPTY_TEXT, (1, last)) for last in range(2000)]
    choices = [Choice(SamplingParams(1.0, seed=8), 7, text=text) for text in texts]
    first, again = (propose_tokens(logits_RV, choices, 1, ProposalRule()) for _ in range(2))
    assert first == again
    q_V = torch.softmax(logits_RV[0].double(), dim=0)
    counts_V = torch.bincount(torch.tensor([ranking.draft_token for ranking in first]), minlength=6)
    # Five degrees of freedom: 30 is exceeded once in 10^5.
    assert float(((counts_V - 2000 * q_V) ** 2 / (2000 * q_V)).sum()) < 30


# ---- keys ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**31 - 1), max_size=6), st.integers(0, 2**31 - 1))
def test_keys_differ_by_seed_text_and_stream(seed, tokens, last):
    text = extend_text(EMPTY_TEXT, tokens)
    longer = extend_text(text, (last,))
    assert longer == extend_text(EMPTY_TEXT, [*tokens, last])
    assume(seed != 3)
    keys = [text_key(s, t, stream) for s in (seed, 3) for t in (text, longer) for stream in Stream]
    assert len(set(keys)) == 12


def test_uniform_noise_is_uniform():
    uniforms = torch.tensor([uniform_noise(text_key(4, text, Stream.ACCEPTANCE)) for text in range(20000)])
    assert 0.0 <= float(uniforms.min()) < float(uniforms.max()) < 1.0
    expected = (torch.arange(20000) + 0.5) / 20000
    assert float((uniforms.sort().values - expected).abs().max()) < 2.7 / 20000**0.5  # Kolmogorov-Smirnov at 1e-6
