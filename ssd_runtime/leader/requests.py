"""What a client asks of the engine: a `Generate` with text or messages, as requests of tokens. Knows no sockets."""

from __future__ import annotations

from dataclasses import replace

from ssd_runtime.comm.control.client_messages import Generate
from ssd_runtime.config import Config
from ssd_runtime.engine.request import Request
from ssd_runtime.engine.stop_strings import check_stop_strings
from ssd_runtime.errors import RequestError
from ssd_runtime.model.text.tokenizer import Tokenizer
from ssd_runtime.speculation.types import SamplingParams

MOST_DENSE = 16  # characters a token of a text that fills the model: four times what prose has
SEAM = 64  # a text that is cut somewhere may have more tokens before the cut than the whole has there


class RequestReader:
    """Reads messages of clients.

    Args:
        config: of the run, for what a request leaves open.
        tokenizer: of the target.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer

    def read(self, message: Generate) -> list[Request]:
        """One for each output; they have seeds of their own, so that output i can be had alone too.

        Raises:
            RequestError, ConfigError: what is wrong with it.
        """
        serve = self._config.serve
        check_stop_strings(message.stop, serve.max_stop_strings, serve.max_stop_bytes)
        speculation = self._config.speculation
        first = Request(
            request_id=message.request_id,
            prompt_tokens=tuple(self._prompt_tokens(message)),
            params=message.params,
            mode=message.mode or speculation.mode,
            lookahead=speculation.lookahead if message.lookahead is None else message.lookahead,
            max_tokens=message.max_tokens,
            stop=message.stop,
            eos_token_ids=() if message.ignore_eos else self._tokenizer.eos_token_ids,
            logprobs=message.logprobs,
        )
        return [replace(first, params=_with_seed_of(first.params, index), index=index) for index in range(message.n)]

    def _prompt_tokens(self, message: Generate) -> list[int]:
        given = [value for value in (message.prompt, message.messages, message.token_ids) if value is not None]
        if len(given) != 1:
            raise RequestError("give exactly one of prompt, messages and token_ids")
        if message.token_ids is not None:
            return list(message.token_ids)
        self._check_length(message)
        if message.prompt is not None:
            return self._encode(message.prompt, add_special=True) if message.prompt else []
        chat = self._tokenizer.chat([{"role": m.role, "content": m.content} for m in message.messages or ()])
        return self._encode(chat, add_special=False)

    def _check_length(self, message: Generate) -> None:
        """Refuse a text that cannot fit before it is tokenized, which of megabytes would hold up everybody."""
        length = len(message.prompt or "") + sum(len(m.role) + len(m.content) for m in message.messages or ())
        longest = self._config.engine.max_model_len
        if length > longest * min(MOST_DENSE, self._tokenizer.longest_token):
            raise RequestError(
                f"the prompt has {length} characters, more than engine.max_model_len = {longest} tokens can hold: "
                "shorten the prompt or raise engine.max_model_len"
            )

    def _encode(self, text: str, *, add_special: bool) -> list[int]:
        """Tokens of a text. Of one that does not fit, no more is tokenized than shows it."""
        longest = self._config.engine.max_model_len
        length = longest
        while length < len(text):
            count = len(self._tokenizer.encode(text[:length], add_special=False))
            if count > longest + longest // 8 + SEAM:
                raise RequestError(
                    f"the first {length} characters of the prompt have {count} tokens and engine.max_model_len is "
                    f"{longest}: shorten the prompt or raise engine.max_model_len"
                )
            length *= 4
        return self._tokenizer.encode(text, add_special=add_special)


def _with_seed_of(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of one output: seed + index modulo 2^64."""
    return replace(params, seed=(params.seed + index) % (1 << 64)) if index else params
