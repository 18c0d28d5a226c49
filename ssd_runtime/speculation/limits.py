"""Which `SamplingParams` can be honoured. Knows no tensors, so that a command can ask before it starts ranks.

Numbers alone are checked by the bounds in their annotations (types.py); here is what a vocabulary makes of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ssd_runtime.errors import RequestError
from ssd_runtime.speculation.types import MOST_SEED, SamplingParams
from ssd_runtime.typed import Unfit, shown, typed


def check_sampling(params: SamplingParams) -> None:
    """Raise RequestError, naming the parameter, unless all numbers and the lengths of all lists are in their bounds."""
    try:
        typed(vars(params), SamplingParams)
    except Unfit as unfit:
        raise RequestError(str(unfit)) from None
    if params.seed > MOST_SEED:
        raise RequestError(f"seed must be at most {MOST_SEED}, not {shown(params.seed)}")


def check_processors(params: SamplingParams, vocab_size: int, end_tokens: Sequence[int] = ()) -> None:
    """Raise RequestError, naming the parameter, unless all of them can be honoured in a vocabulary of that size."""
    biased = [token for token, _ in params.logit_bias]
    named = {"logit_bias": biased, "allowed_tokens": params.allowed_tokens or (), "banned_tokens": params.banned_tokens}
    for name, tokens in named.items():
        if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
            outside = next(token for token in tokens if not 0 <= token < vocab_size)
            raise RequestError(f"{name} names token {outside}, outside the vocabulary of {vocab_size} tokens")
    if len(set(biased)) < len(biased):
        twice = next(token for token, times in Counter(biased).items() if times > 1)
        raise RequestError(f"logit_bias names token {twice} twice")
    if not leaves_a_token(params, vocab_size, end_tokens):
        raise RequestError("allowed_tokens, banned_tokens and min_tokens together leave no token to choose from")


def leaves_a_token(params: SamplingParams, vocab_size: int, end_tokens: Sequence[int]) -> bool:
    """Whether something can be chosen at every position."""
    excluded = {*params.banned_tokens, *(end_tokens if params.min_tokens else ())}
    if params.allowed_tokens is not None:
        return any(token < vocab_size and token not in excluded for token in params.allowed_tokens)
    return sum(token < vocab_size for token in excluded) < vocab_size
