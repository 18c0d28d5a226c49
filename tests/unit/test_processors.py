"""Processors of the text so far: against their definition, against transformers, and what is refused."""

import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.errors import RequestError
from ssd_runtime.speculation.limits import check_processors
from ssd_runtime.speculation.sampling.processors import (
    History,
    LogitsProcessors,
    process_history,
    processors_of,
)
from ssd_runtime.speculation.sampling.ranking import Choice, process_rows
from ssd_runtime.speculation.types import SamplingParams

VOCAB = 12
TOKEN = st.integers(0, VOCAB - 1)
TEXT = st.lists(TOKEN, max_size=8).map(tuple)
PARAMS = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3]),
    presence_penalty=st.sampled_from([0.0, -0.5, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.3, 0.9]),
    logit_bias=st.dictionaries(TOKEN, st.floats(-100, 100, width=32), max_size=3).map(lambda d: tuple(d.items())),
    allowed_tokens=st.none() | st.sets(TOKEN, min_size=6).map(tuple),
    banned_tokens=st.sets(TOKEN, max_size=3).map(tuple),
    min_tokens=st.integers(0, 6),
)


def logits(rows: int, entropy: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(entropy)) * 3


def behind(processors: LogitsProcessors | None, speculated: tuple[int, ...] = ()) -> Choice:
    """The one row behind these tokens."""
    rows = range(len(speculated), len(speculated) + 1)
    return Choice(SamplingParams(), 0, rows, speculated, processors)


@settings(max_examples=300, deadline=None)
@given(params=PARAMS, prompt=TEXT, output=TEXT, speculated=TEXT, chunks=st.integers(1, 3), entropy=st.integers(0, 999))
def test_every_row_of_a_speculation_gets_the_definition(params, prompt, output, speculated, chunks, entropy):
    end = (3, 4)
    processors = processors_of(params, prompt, VOCAB, end)
    logits_RV = logits(len(speculated) + 1, entropy)
    if processors is None:
        assert all(
            torch.equal(process_history(row, params, History(prompt, output, end)), row.float()) for row in logits_RV
        )
        return
    for start in range(0, len(output), chunks):
        process_rows(logits_RV[:1], [behind(processors, speculated)])  # looking changes nothing
        processors.extend(output[start : start + chunks])
    every = Choice(params, 0, range(len(speculated) + 1), speculated, processors)
    found_RV = process_rows(logits_RV, [every])
    assert torch.equal(process_rows(logits_RV[-1:], [behind(processors, speculated)]), found_RV[-1:])
    for count, found_V in enumerate(found_RV):
        history = History(prompt, output + speculated[:count], end)
        assert torch.equal(found_V, process_history(logits_RV[count], params, history))


@settings(max_examples=50, deadline=None)
@given(penalty=st.sampled_from([0.5, 1.0, 1.1, 2.0]), prompt=TEXT, output=TEXT, entropy=st.integers(0, 999))
def test_the_repetition_penalty_is_that_of_transformers(penalty, prompt, output, entropy):
    if not prompt + output:
        return
    logits_RV = logits(1, entropy)
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt + output]), logits_RV.clone()
    )
    params = SamplingParams(repetition_penalty=penalty)
    assert torch.equal(process_history(logits_RV[0], params, History(prompt, output)), expected[0])


def test_presence_and_frequency_look_at_the_output_only():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    processed = process_history(torch.zeros(4), params, History((0, 0, 1), (1, 2, 2)))
    assert processed.tolist() == [0.0, -0.75, -1.0, 0.0]


def test_the_order_is_penalties_bias_exclusion():
    params = SamplingParams(repetition_penalty=2.0, logit_bias=((0, 1.0), (1, 50.0)), banned_tokens=(1,))
    processed = process_history(torch.tensor([4.0, 4.0, 4.0]), params, History((0, 1), ()))
    assert processed.tolist() == [3.0, -math.inf, 4.0]


def test_rows_without_processors_are_left_alone_and_cost_nothing():
    logits_RV = logits(3)
    assert process_rows(logits_RV, [behind(None)] * 3) is logits_RV
    before = logits_RV.clone()
    banned = processors_of(SamplingParams(banned_tokens=(5,)), (), VOCAB)
    mixed_RV = process_rows(logits_RV, [behind(None), behind(banned), behind(None)])
    assert torch.equal(logits_RV, before)
    assert torch.equal(mixed_RV[[0, 2]], before[[0, 2]])
    assert mixed_RV[1, 5] == -math.inf


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.7, top_k=3), SamplingParams(seed=4)])
def test_who_asks_for_nothing_gets_no_processors(params):
    assert processors_of(params, (1, 2), VOCAB, (3,)) is None
    assert processors_of(SamplingParams(min_tokens=3), (1, 2), VOCAB) is None  # nothing ends the sequence anyway


def test_a_shorter_vocabulary_leaves_aside_what_lies_beyond_it():
    """The draft's: the same processors, as far as they reach; without exclusions where these leave it nothing."""
    params = SamplingParams(
        repetition_penalty=1.5, logit_bias=((11, 5.0),), allowed_tokens=(10, 11), banned_tokens=(9,), min_tokens=1
    )
    processors = processors_of(params, (2, 11), 8, (10,))
    processors.extend((11, 3))
    found = process_rows(torch.ones(1, 8), [behind(processors, (11, 4))])[0]
    expected = torch.ones(8)
    expected[[2, 3, 4]] /= 1.5
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "logit_bias names token 1 twice"),
        ({"logit_bias": ((VOCAB, 1.0),)}, "logit_bias names token 12, outside the vocabulary of 12"),
        ({"allowed_tokens": (-1,)}, "allowed_tokens names token -1"),
        ({"banned_tokens": (99,)}, "banned_tokens names token 99"),
        ({"allowed_tokens": ()}, "leave no token"),
        ({"allowed_tokens": (1, 2), "banned_tokens": (2, 1)}, "leave no token"),
        ({"banned_tokens": tuple(range(VOCAB))}, "leave no token"),
        ({"allowed_tokens": (1, 3), "banned_tokens": (1,), "min_tokens": 1}, "leave no token"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(changes, message):
    with pytest.raises(RequestError, match=message):
        check_processors(SamplingParams(**changes), VOCAB, end_tokens=(3,))


def test_what_can_be_honoured_is_not_refused():
    check_processors(SamplingParams(allowed_tokens=(3,)), VOCAB, end_tokens=(3,))
    check_processors(SamplingParams(banned_tokens=tuple(range(1, VOCAB))), VOCAB)
