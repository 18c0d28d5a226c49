"""Log-probabilities of emitted tokens against their definition."""

import math

import pytest
import torch

from ssd_runtime.speculation.sampling.logprobs import token_logprobs
from ssd_runtime.speculation.types import TokenLogprob


def test_they_are_those_of_the_softmax_with_the_best_beside_them():
    logits_RV = torch.log(torch.tensor([[0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])) + 7.0
    first, second = token_logprobs(logits_RV, [0, 2], 2)
    assert first.logprob == pytest.approx(math.log(0.1), abs=1e-5)
    assert [token for token, _ in first.top] == [1, 2]
    assert [logprob for _, logprob in first.top] == pytest.approx([math.log(0.6), math.log(0.3)], abs=1e-5)
    assert second.top[0] == (2, second.logprob)


def test_among_equals_the_lower_token_comes_first():
    (one,) = token_logprobs(torch.zeros(1, 2000), [1234], 3)
    assert [token for token, _ in one.top] == [0, 1, 2]


def test_no_alternatives_and_all_of_them():
    logits_RV = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    (none,) = token_logprobs(logits_RV, [3], 0)
    assert none == TokenLogprob(3, float(torch.log_softmax(logits_RV[0], 0)[3]))
    (every,) = token_logprobs(logits_RV, [3], 20)
    assert sorted(token for token, _ in every.top) == [0, 1, 2, 3, 4]
    assert sum(math.exp(logprob) for _, logprob in every.top) == pytest.approx(1.0)


def test_a_row_does_not_depend_on_its_neighbours():
    logits_RV = torch.randn(7, 49152, generator=torch.Generator().manual_seed(0)) * 5
    together = token_logprobs(logits_RV, list(range(7)), 5)
    assert list(together) == [token_logprobs(logits_RV[i : i + 1], [i], 5)[0] for i in range(7)]
