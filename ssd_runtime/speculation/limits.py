"""Which `SamplingParams` can be honoured. Knows no tensors, so that a command can ask before it starts ranks."""

from __future__ import annotations

from collections.abc import Sequence

from ssd_runtime.errors import RequestError
from ssd_runtime.speculation.types import SamplingParams

MOST_BIAS = 100.0  # as OpenAI's
MOST_REPETITION = 100.0  # and its inverse the least: with less or more, float32 logits might no longer be finite


def check_sampling(params: SamplingParams) -> None:
    """Raise RequestError, naming the parameter, unless every value is one the sampler honours."""
    if not 0.0 <= params.temperature <= 100.0:
        raise RequestError(f"temperature must be between 0 and 100, not {params.temperature}")
    if params.top_k < 0:
        raise RequestError(f"top_k must be 0 (off) or more, not {params.top_k}")
    if not 0.0 < params.top_p <= 1.0:
        raise RequestError(f"top_p must be above 0 and at most 1, not {params.top_p}")
    if not 0.0 <= params.min_p <= 1.0:
        raise RequestError(f"min_p must be between 0 and 1, not {params.min_p}")
    if not -(1 << 63) <= params.seed < 1 << 64:
        raise RequestError(f"seed must fit in 64 bits, not {params.seed}")


def check_processors(params: SamplingParams, vocab_size: int, end_tokens: Sequence[int] = ()) -> None:
    """Raise RequestError, naming the parameter, unless all of them can be honoured in a vocabulary of that size."""
    if not 1.0 / MOST_REPETITION <= params.repetition_penalty <= MOST_REPETITION:
        raise RequestError(
            f"repetition_penalty must be between {1.0 / MOST_REPETITION} and {MOST_REPETITION:g} (1 is off), "
            f"not {params.repetition_penalty}"
        )
    for name, penalty in (("presence", params.presence_penalty), ("frequency", params.frequency_penalty)):
        if not -2.0 <= penalty <= 2.0:
            raise RequestError(f"{name}_penalty must be between -2 and 2, not {penalty}")
    biased = [token for token, _ in params.logit_bias]
    for token, bias in params.logit_bias:
        if not -MOST_BIAS <= bias <= MOST_BIAS:
            raise RequestError(f"logit_bias of token {token} must be between -100 and 100, not {bias}")
    if len(set(biased)) < len(biased):
        twice = next(token for token in biased if biased.count(token) > 1)
        raise RequestError(f"logit_bias names token {twice} twice")
    if params.min_tokens < 0:
        raise RequestError(f"min_tokens must be 0 (off) or more, not {params.min_tokens}")
    named = {"logit_bias": biased, "allowed_tokens": params.allowed_tokens or (), "banned_tokens": params.banned_tokens}
    for name, tokens in named.items():
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise RequestError(f"{name} names token {token}, outside the vocabulary of {vocab_size} tokens")
    if not leaves_a_token(params, vocab_size, end_tokens):
        raise RequestError("allowed_tokens, banned_tokens and min_tokens together leave no token to choose from")


def leaves_a_token(params: SamplingParams, vocab_size: int, end_tokens: Sequence[int]) -> bool:
    """Whether something can be chosen at every position."""
    excluded = {*params.banned_tokens, *(end_tokens if params.min_tokens else ())}
    if params.allowed_tokens is not None:
        return any(token < vocab_size and token not in excluded for token in params.allowed_tokens)
    return sum(token < vocab_size for token in excluded) < vocab_size
