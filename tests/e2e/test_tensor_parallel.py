"""A target spread over ranks emits the tokens of a target of one rank, in every mode."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.engine.request import Request
from ssd_runtime.leader.replay import FrameKind, LeadingDecoder
from ssd_runtime.model.batch import Model
from ssd_runtime.model.load import decoder_from_weights
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import in_process, random_steps, request
from tests.target_ranks import parallel_decoder
from tests.tiny_models import CPU, RandomWeights, tiny_architecture, tiny_decoder

BLOCK = 8
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied-padded-vocabulary": {"tie_word_embeddings": True, "vocab_size": 95},
    "qwen2": {"family": "qwen2", "qkv_bias": True},
    "qwen3": {"family": "qwen3", "qk_norm": True, "head_dim": 16},
    "three-heads": {"num_heads": 6, "num_kv_heads": 3, "vocab_size": 95},
}
SIZES = [
    (2, "llama"),
    (2, "tied-padded-vocabulary"),
    (2, "qwen2"),
    (2, "qwen3"),
    (3, "three-heads"),
    (4, "llama"),
    (4, "qwen3"),
]
PROCESSORS: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.4, "presence_penalty": -0.3},
    {"banned_tokens": tuple(range(0, 95, 3)), "logit_bias": ((94, 2.5), (1, -1.0))},
    {"allowed_tokens": tuple(range(1, 95, 2)), "min_tokens": 9},
    {},
)


def requests() -> list[Request]:
    """More than there are places, every mode, several kinds of sampling, prompts of one chunk and of several.

    One wants to know log-probabilities, for which whole logits are gathered while it is in the batch.
    """
    asked = []
    for index in range(8):
        mode = ("ar", "sd", "ssd", "sd-colocated")[index % 4]
        prompt = tuple(random.Random(index).randrange(95) for _ in range(3 + 6 * index))
        params = SamplingParams(
            temperature=(0.0, 1.0, 0.7)[index % 3],
            seed=index,
            top_k=20 * (index % 2),
            top_p=1.0 - 0.1 * (index % 3),
            **PROCESSORS[index % 5],
        )
        asked.append(
            request(
                prompt,
                mode,
                lookahead=1 + index % 5,
                max_tokens=14,
                params=params,
                request_id=str(index),
                eos_token_ids=(3, 7) if params.min_tokens else (),
                logprobs=2 if index == 5 else None,
            )
        )
    return asked


def outputs(target: Model, vocab_size: int) -> list[tuple[int, ...]]:
    engine = EngineConfig(max_model_len=80, max_num_seqs=4, block_size=BLOCK, prefill_chunk=19)
    draft = tiny_decoder(seed=1, vocab_size=vocab_size)
    process = in_process(target, draft, engine, SpeculationConfig(lookahead=5, budget=6), random_steps(4))  # type: ignore[arg-type]
    sequences = process.run(requests())
    process.assert_all_blocks_are_back()
    assert process.link.drafts.num_lost == 0
    return [tuple(sequence.tokens[sequence.num_prompt :]) for sequence in sequences]


@contextlib.contextmanager
def counted_frames(target: LeadingDecoder) -> Iterator[Counter[FrameKind]]:
    """What the followers are told, by kind."""
    frames, send = Counter[FrameKind](), target._send

    def sending(kind: FrameKind, payload: Tensor) -> None:
        frames[kind] += 1
        send(kind, payload)

    with mock.patch.object(target, "_send", sending):
        yield frames


@pytest.mark.parametrize(("size", "family"), SIZES)
def test_ranks_give_the_tokens_of_one_rank_in_every_mode(size: int, family: str) -> None:
    source = RandomWeights(tiny_architecture(**FAMILIES[family]), seed=1)
    vocab_size = source.architecture.vocab_size
    expected = outputs(decoder_from_weights(source, "fp32", CPU), vocab_size)
    assert {len(tokens) for index, tokens in enumerate(expected) if index != 3} == {14}
    assert 9 <= len(expected[3]) <= 14  # it may end
    with parallel_decoder(source, size, BLOCK) as target, counted_frames(target) as frames:
        assert outputs(target, vocab_size) == expected
    assert frames[FrameKind.CHOOSE] > frames[FrameKind.FORWARD] > 0
    assert frames[FrameKind.WHOLE_ROWS] < frames[FrameKind.CHOOSE] / 4
