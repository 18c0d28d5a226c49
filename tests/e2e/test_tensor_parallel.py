"""A target spread over ranks emits the tokens of a target of one rank, in every mode."""

from __future__ import annotations

import random
from typing import Any

import pytest

from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.engine.sequence import Request
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
}


def requests() -> list[Request]:
    """More than there are places, every mode, several kinds of sampling, prompts of one chunk and of several."""
    asked = []
    for index in range(8):
        mode = ("ar", "sd", "ssd", "sd-colocated")[index % 4]
        prompt = tuple(random.Random(index).randrange(95) for _ in range(3 + 6 * index))
        params = SamplingParams(
            temperature=(0.0, 1.0, 0.7)[index % 3], seed=index, top_k=20 * (index % 2), top_p=1.0 - 0.1 * (index % 3)
        )
        asked.append(
            request(prompt, mode, lookahead=1 + index % 5, max_tokens=14, params=params, request_id=str(index))
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


@pytest.mark.parametrize(("size", "family"), [*((2, family) for family in FAMILIES), (4, "llama"), (4, "qwen3")])
def test_ranks_give_the_tokens_of_one_rank_in_every_mode(size: int, family: str) -> None:
    source = RandomWeights(tiny_architecture(**FAMILIES[family]), seed=1)
    vocab_size = source.architecture.vocab_size
    expected = outputs(decoder_from_weights(source, "fp32", CPU), vocab_size)
    assert {len(tokens) for tokens in expected} == {14}
    with parallel_decoder(source, size, BLOCK) as target:
        assert outputs(target, vocab_size) == expected
