"""Target and draft with tables of different lengths: one tokenizer, more or less padding behind its tokens."""

from __future__ import annotations

import functools
import unittest.mock

import pytest

from cuda_ext import ops
from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.engine.request import Request
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.speculation.sampling import ranking as sampling
from ssd_runtime.speculation.types import SamplingParams, Source
from tests.engines import InProcess, in_process, request
from tests.tiny_models import tiny_decoder

LARGE, SMALL = 96, 80
ENGINE = EngineConfig(max_model_len=96, max_num_seqs=5, block_size=4, prefill_chunk=8)
PADDING = tuple(range(SMALL - 4, LARGE))


@functools.cache
def decoder(vocab_size: int) -> Decoder:
    return tiny_decoder(0, vocab_size=vocab_size)


def engine(target: int, draft: int, coupling: str) -> InProcess:
    config = SpeculationConfig(lookahead=3, budget=6, recycle=2, coupling=coupling)  # type: ignore[arg-type]
    return in_process(decoder(target), decoder(draft), ENGINE, config)


def batch(mode: str, vocab_size: int) -> list[Request]:
    """Mostly of tokens that only the larger table has, where the target's is that one."""
    allowed = tuple(token for token in PADDING if token < vocab_size)
    prompt = (1, 2, vocab_size - 1, 3, vocab_size - 2, 4, 5, 6, 7, vocab_size - 1)
    return [
        request(prompt[index:], mode, max_tokens=40, params=params, request_id=str(index))
        for index, params in enumerate(
            (
                SamplingParams(allowed_tokens=allowed),
                SamplingParams(allowed_tokens=allowed, repetition_penalty=1.3, frequency_penalty=0.5),
                SamplingParams(logit_bias=((vocab_size - 1, 5.0),), banned_tokens=(3,)),
                SamplingParams(),
                SamplingParams(presence_penalty=2.0),
            )
        )
    ]


@pytest.mark.parametrize(("coupling", "backend"), [("shared-noise", "compiled"), ("rejection", "plain")])
@pytest.mark.parametrize("mode", ["sd", "sd-colocated", "ssd"])
@pytest.mark.parametrize(("target", "draft"), [(LARGE, SMALL), (SMALL, LARGE)])
def test_the_tokens_are_those_of_plain_decoding_and_no_draft_is_lost(
    target: int, draft: int, mode: str, coupling: str, backend: str
) -> None:
    kernels = ops.backend() if backend == "compiled" else "plain"
    with unittest.mock.patch.object(sampling.ops, "backend", return_value=kernels):
        process = engine(target, draft, coupling)
        found = process.run(batch(mode, target))
        plain = engine(target, draft, coupling).run(batch("ar", target))
    assert [sequence.tokens for sequence in found] == [sequence.tokens for sequence in plain]
    assert [sequence.failure for sequence in found] == [None] * 5
    assert process.link.drafts.num_lost == 0
    process.assert_all_blocks_are_back()
    emitted = {token for sequence in found for token in sequence.tokens[sequence.num_prompt :]}
    assert target == SMALL or emitted & set(range(SMALL, LARGE)), "tokens that the draft has not"


def test_a_draft_with_the_longer_table_still_speculates_what_the_target_has() -> None:
    process = engine(SMALL, LARGE, "shared-noise")
    process.run([request((1, 2, 3), "ssd", max_tokens=60, params=SamplingParams(temperature=1.0, seed=2))])
    rows = [row for frame in process.draft.frames for row in frame.rows if row.source is Source.DRAFT]
    assert rows
    assert all(token < SMALL for row in rows for token in row.tokens)
