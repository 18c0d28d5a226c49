"""Token identity with penalties, biases and exclusions: the text so far of a row includes the speculated tokens.

Beside the comparison with plain decoding stand wrong histories that it must catch.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_ext import ops
from cuda_ext.ops import Span
from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.engine.request import Request
from ssd_runtime.errors import RequestError
from ssd_runtime.model.batch import ForwardBatch
from ssd_runtime.speculation.sampling import processors
from ssd_runtime.speculation.sampling.processors import History, process_history
from ssd_runtime.speculation.sampling.ranking import Choice, choose
from ssd_runtime.speculation.types import SamplingParams, TokenLogprob
from tests.e2e.test_token_identity import MODES, VOCAB, alone, models, outputs, prompt
from tests.engines import in_process, random_steps, request

TOKEN = st.integers(0, VOCAB - 1)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 20]),
    top_p=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 2**32),
    repetition_penalty=st.sampled_from([1.0, 0.8, 1.5]),
    presence_penalty=st.sampled_from([0.0, -1.0, 2.0]),
    frequency_penalty=st.sampled_from([0.0, -0.5, 1.0]),
    logit_bias=st.dictionaries(TOKEN, st.integers(-9, 9), max_size=3).map(lambda d: tuple(d.items())),
    allowed_tokens=st.none() | st.sets(TOKEN, min_size=8, max_size=40).map(lambda s: tuple(sorted(s))),
    banned_tokens=st.sets(TOKEN, max_size=4).map(lambda s: tuple(sorted(s))),
    min_tokens=st.integers(0, 20),
)
MIXED = (
    SamplingParams(repetition_penalty=1.4),
    SamplingParams(temperature=0.8, seed=1, frequency_penalty=1.5, presence_penalty=0.5),
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=2, allowed_tokens=tuple(range(0, VOCAB, 3)), logit_bias=((3, 4.0),)),
    SamplingParams(temperature=0.0, banned_tokens=tuple(range(0, VOCAB, 2)), repetition_penalty=0.9),
)


def batch(
    mode: str, every: tuple[SamplingParams, ...] = MIXED, max_tokens: int = 40, **changes: object
) -> list[Request]:
    return [
        request(
            prompt(6 + 5 * i, i), mode, lookahead=5, max_tokens=max_tokens, params=params, request_id=str(i), **changes
        )
        for i, params in enumerate(every)
    ]


@functools.cache
def plain_text(asked: Request) -> tuple[int, ...]:
    """The tokens by definition: the whole text forwarded anew for each, the processors by counting it."""
    decoder = models()["target"]
    output: tuple[int, ...] = ()
    while len(output) < asked.max_tokens and not set(output[-1:]) & set(asked.eos_token_ids):
        text = asked.prompt_tokens + output
        count = len(text)
        positions = torch.arange(count)
        none = torch.empty(count, 0, dtype=torch.int64)
        sequence = torch.zeros(count, dtype=torch.int64)
        rows = (torch.tensor(text), positions, positions, sequence, positions[None], positions + 1, none)
        forward = ForwardBatch(*rows, (Span(count, count),), positions[-1:])
        logits_V = decoder.forward(forward, decoder.new_kv(count))[0]
        logits_V = process_history(logits_V, asked.params, History(asked.prompt_tokens, output, asked.eos_token_ids))
        output += (*choose(logits_V[None], [Choice(asked.params, count)]),)
    return output


@pytest.mark.parametrize("mode", ["ar", *MODES])
def test_all_of_them_in_one_batch_give_the_tokens_of_the_definition(mode):
    asked = batch(mode, max_tokens=25)
    assert outputs(asked, steps=random_steps(3)) == [plain_text(one) for one in batch("ar", max_tokens=25)]


@settings(max_examples=60, deadline=None)
@given(
    draft=st.sampled_from(["twin", "relative"]),
    backup=st.sampled_from(["draft", "ngram", "none"]),
    speed=st.integers(0, 2**16),
    many=st.lists(
        st.tuples(st.sampled_from(MODES), PARAMS, st.integers(0, 5), st.sets(TOKEN, max_size=3)), min_size=1, max_size=5
    ),
)
def test_whatever_is_asked_each_gets_the_tokens_of_plain_decoding(draft, backup, speed, many):
    asked = [
        request(
            prompt(4 + 9 * i, i),
            mode,
            lookahead=lookahead,
            params=params,
            request_id=str(i),
            eos_token_ids=tuple(sorted(ends - set(params.allowed_tokens or ()))),
        )
        for i, (mode, params, lookahead, ends) in enumerate(many)
    ]
    assert outputs(asked, draft, random_steps(speed), backup=backup) == [alone(one) for one in asked]


@pytest.mark.parametrize("mode", MODES)
def test_an_end_token_waits_for_min_tokens(mode):
    free = alone(request(prompt(12, 6), "ar", max_tokens=60))
    for least in (0, 1, 5, 17):
        params = SamplingParams(min_tokens=least)
        ends = (free[0], free[5])
        asked = request(prompt(12, 6), mode, lookahead=5, max_tokens=60, params=params, eos_token_ids=ends)
        (found,) = outputs([asked], "twin", 6)
        assert found == plain_text(asked)
        assert not set(ends) & set(found[:least])


def logprobs_of(asked: list[Request], draft: str, steps=3) -> list[list[TokenLogprob]]:
    engine = EngineConfig(max_model_len=160, max_num_seqs=4, block_size=8, prefill_chunk=11)
    process = in_process(models()["target"], models()[draft], engine, SpeculationConfig(lookahead=5, budget=6), steps)
    sequences = process.run(asked)
    found = []
    for one, sequence in zip(asked, sequences, strict=True):
        deltas = process.deltas[one.request_id]
        for delta in deltas:  # nothing is told of a token that was cut off
            assert [logprob.token for logprob in delta.logprobs] == list(delta.token_ids)
        found.append([logprob for delta in deltas for logprob in delta.logprobs])
        assert len(found[-1]) == sequence.num_output
    return found


@settings(max_examples=25, deadline=None)
@given(
    draft=st.sampled_from(["twin", "relative"]),
    speed=st.integers(0, 2**16),
    many=st.lists(
        st.tuples(st.sampled_from(MODES), PARAMS, st.sampled_from([0, 1, 5]), st.sets(TOKEN, max_size=3)),
        min_size=1,
        max_size=4,
    ),
)
def test_logprobs_are_those_of_plain_decoding(draft, speed, many):
    asked = [
        request(
            prompt(4 + 9 * i, i),
            mode,
            lookahead=5,
            params=replace(params, min_tokens=0),
            request_id=str(i),
            eos_token_ids=tuple(sorted(ends)),
            logprobs=count,
        )
        for i, (mode, params, count, ends) in enumerate(many)
    ]
    found = logprobs_of(asked, draft, random_steps(speed))
    for mine, one in zip(found, asked, strict=True):
        (plain,) = logprobs_of([replace(one, mode="ar", lookahead=0)], draft)
        assert [logprob.token for logprob in mine] == [logprob.token for logprob in plain]
        if ops.backend() == "compiled":
            assert mine == plain
        for logprob, other in zip(mine, plain, strict=True):
            assert logprob.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_logprobs_are_those_of_the_model_before_any_processor():
    free, biased = (
        request(prompt(9), params=params, logprobs=4, request_id=name)
        for name, params in (("free", SamplingParams()), ("biased", SamplingParams(logit_bias=((7, 100.0),))))
    )
    (free_logprobs,), (biased_logprobs,) = logprobs_of([free], "twin"), logprobs_of([biased], "twin")
    assert free_logprobs[0].token != 7 == biased_logprobs[0].token
    assert biased_logprobs[0].top == free_logprobs[0].top
    assert biased_logprobs[0].logprob < free_logprobs[0].logprob == free_logprobs[0].top[0][1]


def _forgets_the_speculated(process):
    return lambda self, logits_V, speculated, z_V: process(self, logits_V, (), z_V)


def _forgets_the_last_one(process):
    return lambda self, logits_V, speculated, z_V: process(self, logits_V, speculated[:-1], z_V)


def _counts_the_speculated_once(process):
    return lambda self, logits_V, speculated, z_V: process(self, logits_V, tuple(dict.fromkeys(speculated)), z_V)


@pytest.mark.parametrize("mutant", [_forgets_the_speculated, _forgets_the_last_one, _counts_the_speculated_once])
def test_a_wrong_history_is_caught(mutant, monkeypatch):
    """Texts that repeat themselves at once: rewarded for it, and drafted by a twin, so that runs are accepted."""
    every = tuple(
        SamplingParams(temperature=1.0, seed=seed, frequency_penalty=-0.6, presence_penalty=-0.5) for seed in range(4)
    )
    asked = batch("sd-colocated", every)
    expected = [alone(one) for one in asked]
    assert outputs(asked, "twin") == expected
    monkeypatch.setattr(processors.LogitsProcessors, "process", mutant(processors.LogitsProcessors.process))
    assert outputs(asked, "twin") != expected


def acceptance(asked: Request, draft: str = "twin") -> float:
    process = in_process(models()["target"], models()[draft], EngineConfig(), SpeculationConfig(lookahead=5), 9)
    (sequence,) = process.run([asked])
    return sequence.statistics().num_accepted_tokens / sequence.statistics().num_draft_tokens


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("params", MIXED)
def test_a_twin_draws_the_same_conclusions_along_every_path_of_its_tree(mode, params):
    assert acceptance(request(prompt(9), mode, lookahead=5, max_tokens=60, params=params)) == 1.0


def test_a_twin_keeps_from_the_end_tokens_as_long_as_the_target_does():
    free = alone(request(prompt(12, 6), "ar", max_tokens=60))
    params = SamplingParams(min_tokens=50)
    asked = request(prompt(12, 6), lookahead=5, max_tokens=50, params=params, eos_token_ids=free[:20])
    assert acceptance(asked) == 1.0


def test_a_token_that_may_not_be_chosen_never_is():
    draws = random.Random(4)
    for mode in MODES:
        allowed = tuple(draws.sample(range(VOCAB), 10))
        params = SamplingParams(temperature=2.0, seed=draws.getrandbits(32), allowed_tokens=allowed)
        params_banned = SamplingParams(temperature=2.0, seed=draws.getrandbits(32), banned_tokens=allowed)
        found, found_banned = outputs(batch(mode, (params, params_banned)))
        assert set(found) <= set(allowed)
        assert not set(found_banned) & set(allowed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": SamplingParams(banned_tokens=(VOCAB,))}, "banned_tokens names token 96"),
        ({"params": SamplingParams(allowed_tokens=(1,), min_tokens=2), "eos_token_ids": (1,)}, "leave no token"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20, not 21"),
        ({"logprobs": -1}, "logprobs must be between 0 and 20, not -1"),
        ({"params": SamplingParams(min_tokens=9), "max_tokens": 8}, "min_tokens 9 is above max_tokens 8"),
    ],
)
def test_the_engine_refuses_what_it_could_not_honour(changes, message):
    process = in_process(models()["target"], models()["twin"])
    with pytest.raises(RequestError, match=message):
        process.engine.add(request(prompt(5), **changes))
