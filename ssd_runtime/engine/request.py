"""A request as the engine takes it, and what it may not ask for. Knows no client and no text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ssd_runtime.config import Mode
from ssd_runtime.errors import RequestError
from ssd_runtime.speculation.limits import check_processors, check_sampling
from ssd_runtime.speculation.types import MOST_ALTERNATIVES, SamplingParams


@dataclass(frozen=True)
class Request:
    """What is asked for, checked and tokenized.

    Attributes:
        stop: stop strings; the text ends before the first of them.
        eos_token_ids: tokens that end the sequence; empty to go on regardless.
        logprobs: how many alternatives to tell with the log-probability of each token; None for no log-probabilities.
        index: which of the outputs of the request with this id.
    """

    request_id: str
    prompt_tokens: tuple[int, ...]
    params: SamplingParams
    mode: Mode
    lookahead: int
    max_tokens: int
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    index: int = 0

    @property
    def num_tokens(self) -> int:
        """Of the prompt, and those that the parameters name: what its memory grows with."""
        named = (self.params.allowed_tokens or (), self.params.banned_tokens, self.params.logit_bias)
        return len(self.prompt_tokens) + sum(map(len, named))


@dataclass(frozen=True)
class RequestLimits:
    """What one engine can serve.

    Attributes:
        vocab_size: of the target.
        max_length: `engine.max_model_len`.
        max_lookahead: `speculation.lookahead`.
        modes: those it has.
    """

    vocab_size: int
    max_length: int
    max_lookahead: int
    modes: Iterable[Mode]

    def check(self, request: Request) -> None:
        """Raise RequestError, naming what to change, for a request that could never be served as asked."""
        check_sampling(request.params)
        check_processors(request.params, self.vocab_size, request.eos_token_ids)
        if request.params.min_tokens > request.max_tokens:
            raise RequestError(f"min_tokens {request.params.min_tokens} is above max_tokens {request.max_tokens}")
        if request.logprobs is not None and not 0 <= request.logprobs <= MOST_ALTERNATIVES:
            raise RequestError(f"logprobs must be between 0 and {MOST_ALTERNATIVES}, not {request.logprobs}")
        length = len(request.prompt_tokens)
        if length == 0:
            raise RequestError("the prompt is empty: give at least one token")
        if length >= self.max_length:
            raise RequestError(
                f"the prompt has {length} tokens and engine.max_model_len is {self.max_length}: "
                "shorten the prompt or raise engine.max_model_len"
            )
        if not all(0 <= token < self.vocab_size for token in request.prompt_tokens):
            raise RequestError(f"the prompt has token ids outside the vocabulary of {self.vocab_size} tokens")
        if request.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, not {request.max_tokens}")
        if "" in request.stop:
            raise RequestError("a stop string is empty: every text would stop at once")
        if request.mode not in self.modes:
            raise RequestError(
                f"mode {request.mode!r} is not served by this engine, which has {', '.join(self.modes)}: "
                f"start the engine with speculation.mode = {request.mode}"
            )
        if not 0 <= request.lookahead <= self.max_lookahead:
            raise RequestError(
                f"lookahead must be between 0 and speculation.lookahead = {self.max_lookahead}, not {request.lookahead}"
            )
