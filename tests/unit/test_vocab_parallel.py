"""Choosing from reports on slices of the vocabulary: the token of the whole logits, or an honest None."""

from __future__ import annotations

import contextlib
import itertools
import unittest.mock
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssd_runtime.speculation.sampling import ranking as sampling
from ssd_runtime.speculation.sampling import vocab_parallel
from ssd_runtime.speculation.sampling.processors import processors_of
from ssd_runtime.speculation.sampling.ranking import Choice, choose, count_rows
from ssd_runtime.speculation.sampling.vocab_parallel import decidable, decide, report
from ssd_runtime.speculation.types import SamplingParams

BACKENDS = ["plain", "compiled"]
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 3, 20, 64, 5000]),
    top_p=st.sampled_from([1.0, 1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.8, 1.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.5]),
    logit_bias=st.dictionaries(st.integers(0, 4), st.integers(-9, 9), max_size=2).map(lambda d: tuple(d.items())),
    allowed_tokens=st.none() | st.just((2, 3, 5, 6)),
    banned_tokens=st.sets(st.integers(0, 2), max_size=2).map(tuple),
    min_tokens=st.integers(0, 6),
)


@contextlib.contextmanager
def operators(backend: str):
    """Both paths of ranking.py; the compiled one where it is built."""
    if backend == "compiled":
        yield
        return
    with unittest.mock.patch.object(sampling.ops, "backend", return_value="plain"):
        yield


def spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return list(itertools.pairwise(ends))


def in_slices(logits_RV: Tensor, choices: list[Choice], sizes: Sequence[int]) -> list[int | None]:
    vocab_size = logits_RV.shape[1]
    reports = [
        report(logits_RV[:, start:stop], [choice.within(start, stop) for choice in choices], start, vocab_size)
        for start, stop in spans(sizes)
    ]
    return decide(torch.stack(reports), choices, vocab_size)


def choices_of(every: Sequence[SamplingParams], vocab_size: int) -> list[Choice]:
    """Each behind a text of its own, at rows of a speculation that need not begin with its first."""
    found = []
    for index, params in enumerate(every):
        speculated = tuple((index + step) % min(5, vocab_size) for step in range(4))
        processors = processors_of(params, (0, index % vocab_size), vocab_size, (1, 4))
        if processors is not None:
            processors.extend((index % vocab_size, 2, 2))
        found.append(Choice(params, 17 + 9 * index, range(index % 3, 2 + index % 3), speculated, processors))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=120, deadline=None)
@given(
    every=st.lists(PARAMS, min_size=1, max_size=3),
    sizes=st.sampled_from([(7,), (4, 3), (5, 5, 0), (40, 30), (33, 33, 31), (400, 1, 99), (200, 0, 200, 100)]),
    spread=st.sampled_from([0.0, 0.3, 2.0, 15.0]),
    grain=st.sampled_from([0.0, 0.5, 4.0]),
    entropy=st.integers(0, 2**32),
)
def test_slices_give_the_token_of_the_whole_logits_or_none(backend, every, sizes, spread, grain, entropy):
    """With ties within and between slices, slices of one token and of none."""
    vocab_size = sum(sizes)
    choices = [choice for choice in choices_of(every, vocab_size) if decidable(choice, vocab_size)]
    generator = torch.Generator().manual_seed(entropy)
    logits_RV = torch.randn(count_rows(choices), vocab_size, generator=generator) * spread
    if grain:
        logits_RV = (logits_RV / grain).round() * grain
    with operators(backend):
        found, expected = in_slices(logits_RV, choices, sizes), choose(logits_RV, choices)
    params = [choice.params for choice in choices for _ in choice.rows]
    for one, token, right in zip(params, found, expected, strict=True):
        assert token == right or (token is None and vocab_parallel.filters(one, vocab_size)), one


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_k=20),
        SamplingParams(temperature=0.8, top_k=50, top_p=0.9, min_p=0.02),
        SamplingParams(temperature=0.7, top_p=0.95),
        SamplingParams(temperature=1.0, min_p=0.05),
    ],
)
def test_what_is_usual_is_decided_from_the_reports(backend, params):
    """Logits as peaked as a language model's, rounded as bfloat16 rounds them: many ties."""
    generator = torch.Generator().manual_seed(3)
    rank_V = torch.randperm(5000, generator=generator).double() + 1
    logits_RV = (-1.5 * rank_V.log() + torch.randn(50, 5000, generator=generator)).bfloat16().float()
    choices = [Choice(params, 5, range(50))]
    with operators(backend):
        found, expected = in_slices(logits_RV, choices, (1300, 1300, 1300, 1100)), choose(logits_RV, choices)
    assert found.count(None) <= 5
    assert all(token in (None, right) for token, right in zip(found, expected, strict=True))


def test_a_nucleus_deeper_than_the_heads_is_left_to_the_whole_logits():
    params = SamplingParams(temperature=1.0, top_p=0.3)
    logits_RV = torch.linspace(0.0, 0.01, 4000).expand(40, -1)
    found = in_slices(logits_RV, [Choice(params, 0, range(40))], (2000, 2000))
    assert found.count(None) > 20


def test_tokens_that_no_head_shows_are_reckoned_with():
    """min_p keeps 400 of 4000 tokens. Where the best under noise is none of them, the best of the 400 may be unseen."""
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(1))
    logits_RV = torch.linspace(0.0, 10.0, 4000)[order].expand(60, -1)
    choices = [Choice(SamplingParams(temperature=1.0, min_p=0.37), 0, range(60))]
    found, expected = in_slices(logits_RV, choices, (1000, 3000)), choose(logits_RV, choices)
    assert all(token in (None, right) for token, right in zip(found, expected, strict=True))
    assert 5 < found.count(None) < 40


def test_ties_beyond_the_heads_count_in_the_mass_of_top_k():
    """Top-k of 2 keeps all 1000 tokens that tie for the second place, so the first alone is no nucleus."""
    logits_RV = torch.zeros(60, 1001)
    logits_RV[:, 700] = 2.0
    choices = [Choice(SamplingParams(temperature=1.0, top_k=2, top_p=0.5), 0, range(60))]
    found, expected = in_slices(logits_RV, choices, (600, 401)), choose(logits_RV, choices)
    assert found == expected
    assert len(set(expected)) > 30


def test_a_token_at_the_edge_of_a_nucleus_is_left_to_the_whole_logits():
    """Probabilities 1/2 and twice 1/4: 0.75 is reached exactly or not, as the sum is rounded."""
    logits_V = torch.log(torch.tensor([2.0, 1.0, 1.0 - 1e-7]))
    found = in_slices(logits_V.expand(60, -1), [Choice(SamplingParams(1.0, top_p=0.75), 0, range(60))], (1, 1, 1))
    assert {0, None} <= set(found)
    assert 2 not in found


def test_equal_logits_go_to_the_lowest_token_of_all_slices():
    logits_RV = torch.tensor([[1.0, 5.0, 0.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0, 7.0]])
    assert in_slices(logits_RV, [Choice(SamplingParams(), 3, range(2))], (1, 2, 2)) == [1, 4]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(1.0), SamplingParams(1.0, top_p=0.9)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_made_of_logits_that_leave_nothing(backend, params):
    for hopeless in (-torch.inf, torch.nan):
        with operators(backend):
            found = in_slices(torch.full((1, 6), hopeless), [Choice(params, 3)], (2, 4))
        assert found == [None]


def test_a_floor_below_any_head_is_not_looked_for():
    assert decidable(Choice(SamplingParams(1.0, top_k=64), 0), 1000)
    assert not decidable(Choice(SamplingParams(1.0, top_k=65), 0), 1000)
    assert decidable(Choice(SamplingParams(1.0, top_k=65), 0), 65)
    assert decidable(Choice(SamplingParams(0.0, top_k=65), 0), 1000)


def test_a_plain_row_travels_as_two_numbers():
    row = report(torch.zeros(3, 50), [Choice(SamplingParams(1.0), 0, range(3))], 0, 50)
    assert (row.dtype, row.shape) == (torch.float64, (6,))


def test_the_operators_noise_for_a_slice_is_that_of_its_tokens():
    """Equal logits leave nothing but the noise: every rank's best token is the best of its part."""
    choices = [sampling.Choice(SamplingParams(1.0, seed=seed), 7) for seed in (0, 5, 2**64 - 1)]
    whole_3V = torch.stack([sampling.gumbel_noise(one.key, torch.arange(1000)) for one in choices])
    for start, stop in ((0, 1000), (1, 1000), (640, 907), (999, 1000)):
        for backend in BACKENDS:
            with operators(backend):
                tokens, scores = sampling.best_of_columns(torch.zeros(3, stop - start), choices, start)
            assert tokens.tolist() == (whole_3V[:, start:stop].argmax(1) + start).tolist()
            torch.testing.assert_close(scores, whole_3V[:, start:stop].amax(1), rtol=1e-12, atol=0)
