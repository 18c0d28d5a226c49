"""Sampling: the fast path against the definition, the processors, and the distribution against enumeration."""

import itertools
import math
import unittest.mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.errors import RequestError
from ssd_runtime.speculation.limits import check_sampling
from ssd_runtime.speculation.sampling import ranking as sampling
from ssd_runtime.speculation.sampling.ranking import (
    Choice,
    choose,
    process_logits,
    rank_tokens,
    rank_tokens_oracle,
)
from ssd_runtime.speculation.types import SamplingParams

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 5, 40]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    seed=st.integers(0, 2**64 - 1),
)


def rank_tokens_without_operators(*arguments):
    """The path of devices and installations without the compiled extension."""
    with unittest.mock.patch.object(sampling.ops, "backend", return_value="plain"):
        return rank_tokens(*arguments)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(PARAMS, min_size=1, max_size=4),
    vocab_size=st.sampled_from([3, 8, 65, 1500]),
    count=st.sampled_from([1, 2, 5]),
    scale=st.sampled_from([0.1, 3.0, 20.0]),
    entropy=st.integers(0, 2**32),
    excluded=st.sampled_from([0.0, 0.0, 0.3, 0.95]),
)
def test_fast_ranking_equals_the_definition(rows, vocab_size, count, scale, entropy, excluded):
    generator = torch.Generator().manual_seed(entropy)
    logits_RV = torch.randn(len(rows), vocab_size, generator=generator) * scale
    out_RV = torch.rand(len(rows), vocab_size, generator=generator) < excluded
    out_RV[:, 1] = False  # what processors.py excludes is never all
    logits_RV = logits_RV.masked_fill(out_RV, -torch.inf)
    choices = [Choice(params, position=17 + row) for row, params in enumerate(rows)]
    plain = rank_tokens_oracle(logits_RV, choices, count)
    for fast in (rank_tokens(logits_RV, choices, count), rank_tokens_without_operators(logits_RV, choices, count)):
        assert [ranking.tokens for ranking in fast] == [ranking.tokens for ranking in plain]
        for mine, theirs in zip(fast, plain, strict=True):
            assert mine.margins == pytest.approx(theirs.margins, abs=1e-5)


def test_greedy_takes_the_lowest_of_equal_tokens():
    logits_RV = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    assert choose(logits_RV, [Choice(SamplingParams(), 3)]) == [1]


def test_processors_keep_what_they_should():
    logits_V = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))

    def kept(**changes):
        processed = process_logits(logits_V, SamplingParams(temperature=1.0, **changes))
        return [token for token in range(4) if processed[token] > -torch.inf]

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_p=0.5) == [0]
    assert kept(top_p=0.51) == [0, 1]
    assert kept(min_p=0.25) == [0, 1, 2]
    assert kept(top_k=3, top_p=0.9, min_p=0.4) == [0, 1]


def test_nucleus_renormalises_after_top_k():
    logits_V = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    processed = process_logits(logits_V, SamplingParams(temperature=1.0, top_k=2, top_p=0.55))
    assert [token for token in range(4) if processed[token] > -torch.inf] == [0]  # 0.4 / 0.7 = 0.57


def test_nucleus_larger_than_the_first_look_is_found():
    logits_V = torch.zeros(5000)
    logits_V[:3000] += 1e-3
    processed = process_logits(logits_V, SamplingParams(temperature=1.0, top_p=0.99))
    assert int((processed > -torch.inf).sum()) == 5000  # equal tokens stay together


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_one_token_has_the_distribution_of_the_softmax(temperature):
    """Chi-square with 7 degrees of freedom on 20000 fixed seeds; critical value at p = 1e-4 is 29.9."""
    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 0.25, 1.5])
    probabilities = torch.softmax(logits_V / temperature, 0)
    trials = 20000
    choices = [Choice(SamplingParams(temperature=temperature, seed=seed), 11) for seed in range(trials)]
    chosen = torch.tensor(choose(logits_V.expand(trials, 8), choices))
    observed = torch.bincount(chosen, minlength=8).double()
    expected = probabilities.double() * trials
    assert float(((observed - expected) ** 2 / expected).sum()) < 29.9


def test_three_tokens_have_the_joint_distribution_of_the_chain():
    """A Markov chain on 8 tokens, all 512 texts of length three; 511 degrees of freedom, critical at p = 1e-4: 637."""
    table_VV = torch.randn(8, 8, generator=torch.Generator().manual_seed(5)) * 1.2
    trials = 30000
    state = torch.zeros(trials, dtype=torch.int64)
    texts = torch.zeros(trials, dtype=torch.int64)
    for position in range(3):
        choices = [Choice(SamplingParams(temperature=1.0, seed=seed), 40 + position) for seed in range(trials)]
        state = torch.tensor(choose(table_VV[state], choices))
        texts = texts * 8 + state
    chances_VV = torch.softmax(table_VV, 1).double()
    expected = torch.tensor(
        [
            float(chances_VV[0, a] * chances_VV[a, b] * chances_VV[b, c]) * trials
            for a, b, c in itertools.product(range(8), repeat=3)
        ]
    )
    # Texts too rare for chi-square (fewer than five expected) are pooled.
    observed = torch.bincount(texts, minlength=512).double()
    common = expected >= 5
    statistic = float(((observed - expected) ** 2 / expected)[common].sum())
    rest = float(expected[~common].sum())
    if rest:
        statistic += (float(observed[~common].sum()) - rest) ** 2 / rest
    freedom = int(common.sum())
    critical = freedom + 3.8 * math.sqrt(2 * freedom) + 10  # above the 1e-4 quantile for every freedom here
    assert statistic < critical


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"top_k": 2**63}, r"top_k must be between 0 and 2147483647, not 9223372036854775808"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -1}, "seed"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be between 0.01 and 100"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty must be between -2 and 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"logit_bias": ((1, 101.0),)}, r"logit_bias\[0\]\[1\] must be between -100 and 100"),
        ({"logit_bias": ((1, 1.0),) * (2**12 + 1)}, "logit_bias must have at most 4096 entries, not 4097"),
        ({"banned_tokens": (1,) * (2**16 + 1)}, "banned_tokens must have at most 65536 entries"),
        ({"min_tokens": -1}, "min_tokens"),
    ],
)
def test_parameters_that_cannot_be_honoured_are_refused_by_name(changes, name):
    with pytest.raises(RequestError, match=name):
        check_sampling(SamplingParams(**changes))
