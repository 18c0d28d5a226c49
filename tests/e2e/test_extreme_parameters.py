"""Parameters and logits at their extremes: every mode, coupling and backend gives one answer or one refusal.

The models are tables, so that both backends compute on the same logits to the bit.
"""

from __future__ import annotations

import functools
import unittest.mock
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_ext import ops
from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.errors import RequestError
from ssd_runtime.speculation.sampling import ranking as sampling
from ssd_runtime.speculation.types import GREEDY_UP_TO, SamplingParams
from tests.engines import in_process, request
from tests.tabular import TabularModel

MODES = ("ar", "sd", "sd-colocated", "ssd")
VOCAB, END = 9, 4
ENGINE = EngineConfig(max_model_len=48, max_num_seqs=2, block_size=4, prefill_chunk=8)
TOKENS = st.sets(st.integers(0, VOCAB - 1), max_size=VOCAB).map(lambda found: tuple(sorted(found)))
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 5e-324, 1e-38, GREEDY_UP_TO, 1.1e-5, 1e-3, 1.0, 100.0]),
    top_k=st.sampled_from([0, 1, 3, 2**31]),
    top_p=st.sampled_from([1.0, 0.5, 1e-9, 5e-324]),
    min_p=st.sampled_from([0.0, 5e-324, 0.3, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.01, 100.0, 1e-38, 1e38]),
    presence_penalty=st.sampled_from([0.0, -2.0, 2.0]),
    frequency_penalty=st.sampled_from([0.0, -2.0, 2.0]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, 100.0]), max_size=VOCAB).map(
        lambda found: tuple(found.items())
    ),
    allowed_tokens=st.none() | TOKENS,
    banned_tokens=st.just(()) | TOKENS,
    min_tokens=st.sampled_from([0, 0, 5, 12]),
)


@dataclass(frozen=True)
class Answer:
    """What came of a request."""

    tokens: tuple[int, ...]
    reason: str | None
    failure: str | None


@functools.cache
def table(scale: float, spoilt: float) -> torch.Tensor:
    logits_VVV = scale * torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(3))
    if spoilt:
        logits_VVV[:, 2, 6] = spoilt
    return logits_VVV


def answer(mode: str, coupling: str, backend: str, params: SamplingParams, scale: float, spoilt: float) -> Answer | str:
    config = SpeculationConfig(lookahead=3, budget=4, coupling=coupling)  # type: ignore[arg-type]
    target, draft = TabularModel(table(scale, spoilt)), TabularModel(table(scale, 0.0).roll(1, 0))
    process = in_process(target, draft, ENGINE, config)  # type: ignore[arg-type]
    kernels = ops.backend() if backend == "compiled" else "plain"
    asked = request((1, 2, 3), mode, max_tokens=14, params=params, eos_token_ids=(END,))
    with unittest.mock.patch.object(sampling.ops, "backend", return_value=kernels):
        try:
            (sequence,) = process.run([asked])
        except RequestError as refusal:
            return str(refusal)
    process.assert_all_blocks_are_back()
    assert process.link.drafts.num_lost == 0
    return Answer(tuple(sequence.tokens[sequence.num_prompt :]), sequence.finish_reason, sequence.failure)


@settings(max_examples=40, deadline=None)
@given(
    params=PARAMS,
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e35, 1e38]),
    spoilt=st.sampled_from([0.0, 0.0, 0.0, torch.nan, torch.inf, -torch.inf]),
)
def test_every_mode_coupling_and_backend_gives_the_same_answer_or_the_same_refusal(
    params: SamplingParams, scale: float, spoilt: float
) -> None:
    expected = answer("ar", "shared-noise", "compiled", params, scale, spoilt)
    for coupling in ("shared-noise", "rejection"):
        for backend in ("compiled", "plain"):
            for mode in MODES:
                found = answer(mode, coupling, backend, params, scale, spoilt)
                if coupling == "shared-noise" or params.temperature == 0.0 or isinstance(expected, str):
                    assert found == expected
                assert isinstance(found, str) == isinstance(expected, str)
                if isinstance(found, Answer):
                    check_allowed(found, params)


def check_allowed(found: Answer, params: SamplingParams) -> None:
    """Nothing was emitted that the request excludes, and what did not end failed and says why."""
    assert not set(found.tokens) & set(params.banned_tokens)
    assert params.allowed_tokens is None or set(found.tokens) <= set(params.allowed_tokens)
    assert END not in found.tokens[: params.min_tokens]
    assert (found.reason == "abort") == (found.failure is not None)
    assert found.failure is None or "no token can be chosen at position" in found.failure
    assert found.failure or found.reason == ("stop" if END in found.tokens else "length")
