"""Saguaro sampling against Definition 14, and what it is for: residual mass on the tokens that are prepared for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.speculation.rejection.acceptance import residual_oracle
from ssd_runtime.speculation.rejection.saguaro import saguaro_logits


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.sampled_from([0.01, 0.3, 1.0]), st.integers(0, 12), st.integers(0, 2**32))
def test_it_is_definition_14(vocab_size, c, f, entropy):
    z_V = torch.randn(vocab_size, generator=torch.Generator().manual_seed(entropy), dtype=torch.float64) * 3
    top = set(sorted(range(vocab_size), key=lambda token: -z_V[token])[:f])
    weights = [float(z_V[token].exp()) * (c if token in top else 1.0) for token in range(vocab_size)]
    expected = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    torch.testing.assert_close(torch.softmax(saguaro_logits(z_V[None], c, f)[0], dim=0), expected)


def test_no_mass_is_left_on_the_top_tokens_at_c_0():
    z_RV = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.0, 0.5, -1.0, 2.0]])
    q_RV = torch.softmax(saguaro_logits(z_RV, 0.0, 2), dim=1)
    assert q_RV[0, [1, 2]].tolist() == [0.0, 0.0]
    assert q_RV[1, [3, 1]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(q_RV.sum(dim=1), torch.ones(2))


def test_a_row_that_would_lose_every_token_stays_as_it_is():
    z_RV = torch.tensor([[1.0, -torch.inf, 2.0, -torch.inf], [1.0, 0.0, 2.0, 3.0]])
    assert torch.equal(saguaro_logits(z_RV, 0.0, 2)[0], z_RV[0])
    assert saguaro_logits(z_RV, 0.0, 2)[1].tolist() == [1.0, 0.0, -torch.inf, -torch.inf]


def test_the_input_is_not_changed():
    z_RV = torch.tensor([[1.0, 2.0]])
    saguaro_logits(z_RV, 0.5, 1)
    assert z_RV.tolist() == [[1.0, 2.0]]


def test_residual_mass_of_the_top_tokens_rises_and_acceptance_falls_as_c_falls():
    generator = torch.Generator().manual_seed(3)
    p_V = torch.softmax(torch.randn(8, generator=generator, dtype=torch.float64), dim=0)
    z_V = p_V.log() + 0.3 * torch.randn(8, generator=generator, dtype=torch.float64)
    hits, acceptances = [], []
    for c in (1.0, 0.7, 0.4, 0.1, 0.0):
        q_V = torch.softmax(saguaro_logits(z_V[None], c, 3)[0], dim=0)
        hits.append(float(residual_oracle(p_V, q_V)[z_V.topk(3).indices].sum()))
        acceptances.append(float(torch.minimum(p_V, q_V).sum()))
    assert hits == sorted(hits)
    assert acceptances == sorted(acceptances, reverse=True)
    assert hits[0] < hits[2] < hits[-1] + 1e-9
    assert acceptances[0] > acceptances[-1] + 0.2


@pytest.mark.parametrize(("c", "f"), [(-0.1, 2), (1.1, 2), (0.5, -1)])
def test_impossible_values_are_refused(c, f):
    with pytest.raises(ValueError, match=r"must be"):
        saguaro_logits(torch.zeros(1, 4), c, f)
