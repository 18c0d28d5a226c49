"""Logits processors that look at the text so far or at single tokens. Knows no models and no ranks.

In order, on float32 logits z, before everything in ranking.py (temperature, top-k, top-p, min-p):

1. repetition penalty r, for every token of prompt or output: z / r where z > 0, else z * r (Keskar et al., "CTRL",
   arXiv 1909.05858, as in Transformers and vLLM);
2. frequency penalty f: z - f * c, with c the times the token occurs in the output (OpenAI, vLLM: never the prompt);
3. presence penalty p: z - p for every token of the output;
4. logit bias: z + bias;
5. allowed tokens: all others are excluded; then banned tokens, and the end tokens below `min_tokens`.

The text so far, at a row whose logits decide position i, is prompt and output before i, *and the speculated tokens
before i*: each row of a verification, each node of a draft's tree, has a text of its own. A row is kept only if those
tokens were accepted, so this is the text that plain decoding would have had there.

`process_history` is the definition, by counting the whole text. `LogitsProcessors` counts as tokens come and touches
only the tokens concerned. Requests that ask for nothing of this have none (`processors_of`) and pay nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ssd_runtime.speculation.limits import leaves_a_token
from ssd_runtime.speculation.types import SamplingParams


@dataclass(frozen=True)
class History:
    """The text before one position.

    Attributes:
        prompt, output: its tokens; speculated tokens count as output.
        end_tokens: those that end the sequence.
    """

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    end_tokens: tuple[int, ...] = ()


def process_history(logits_V: Tensor, params: SamplingParams, history: History) -> Tensor:
    """Logits after the processors of this file, float32 [V], by definition: one token after the other."""
    z_V = logits_V.float().clone()
    for token in {*history.prompt, *history.output}:
        z = z_V[token]
        z_V[token] = z / params.repetition_penalty if z > 0 else z * params.repetition_penalty
    for token in set(history.output):
        z_V[token] -= torch.tensor(float(history.output.count(token))) * params.frequency_penalty
        z_V[token] -= params.presence_penalty
    for token, bias in params.logit_bias:
        z_V[token] += bias
    for token in range(len(z_V)):
        if params.allowed_tokens is not None and token not in params.allowed_tokens:
            z_V[token] = -torch.inf
    for token in (*params.banned_tokens, *(history.end_tokens if len(history.output) < params.min_tokens else ())):
        z_V[token] = -torch.inf
    return z_V


@dataclass
class Tally:
    """What the processors of one sequence rest on, as integers and floats: whoever has them can apply the processors.

    Attributes:
        counts: of every token of the text, how often it is in the output; empty if nothing is penalised.
        num_output: tokens of the output.
        bias: token to what is added to its logit.
        allowed, banned, end_tokens: as in SamplingParams; the end tokens are banned below `min_tokens`.
    """

    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    counts: dict[int, int] = field(default_factory=dict)
    num_output: int = 0
    bias: dict[int, float] = field(default_factory=dict)
    allowed: tuple[int, ...] | None = None
    banned: tuple[int, ...] = ()
    end_tokens: tuple[int, ...] = ()
    min_tokens: int = 0

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)

    def within(self, start: int, stop: int) -> Tally:
        """For the tokens start <= token < stop alone, which are counted from 0."""

        def inside(tokens: tuple[int, ...]) -> tuple[int, ...]:
            if start == 0 and max(tokens, default=0) < stop:
                return tokens  # tens of thousands may be named, of each output of a request
            return tuple(token - start for token in tokens if start <= token < stop)

        return replace(
            self,
            counts={token - start: count for token, count in self.counts.items() if start <= token < stop},
            bias={token - start: bias for token, bias in self.bias.items() if start <= token < stop},
            allowed=None if self.allowed is None else inside(self.allowed),
            banned=inside(self.banned),
            end_tokens=inside(self.end_tokens),
        )


class LogitsProcessors:
    """The processors of one sequence and its text so far, counted.

    Args:
        tally: what they rest on, for tokens of this vocabulary; `extend` counts on in it.
        vocab_size: width of the logits. Tokens beyond it cannot be chosen here and are left aside.
    """

    def __init__(self, tally: Tally, vocab_size: int) -> None:
        self.tally = tally
        self._vocab_size = vocab_size
        self._excluded: dict[bool, Tensor] = {}
        self._text: tuple[Tensor, Tensor] | None = None

    def within(self, start: int, stop: int) -> LogitsProcessors:
        """The same for a slice of the vocabulary, with tokens counted from its start; it does not follow `extend`."""
        return LogitsProcessors(self.tally.within(start, stop), stop - start)

    def extend(self, tokens: Sequence[int]) -> None:
        """The output grew by these tokens."""
        self.tally.num_output += len(tokens)
        if self.tally.penalises:
            for token in tokens:
                if token < self._vocab_size:
                    self.tally.counts[token] = self.tally.counts.get(token, 0) + 1
            self._text = None

    def process(self, logits_V: Tensor, speculated: Sequence[int], z_V: Tensor) -> None:
        """Process the row behind `speculated`, tokens that follow the text so far.

        Args:
            logits_V: of the model, left as they are.
            z_V: float32 copy of them, which becomes the result.
        """
        device, tally = z_V.device, self.tally
        if tally.penalises:
            self._penalise(logits_V, z_V, self._counted(device))
            if speculated:
                self._penalise(logits_V, z_V, self._counted_with(speculated, device))
        if tally.bias:
            tokens_U, bias_U = _tensors(list(tally.bias), list(tally.bias.values()), device)
            z_V[tokens_U] += bias_U
        too_early = bool(tally.end_tokens) and tally.num_output + len(speculated) < tally.min_tokens
        if tally.allowed is not None or tally.banned or too_early:
            z_V.masked_fill_(self._excluded_tokens(too_early, device), -torch.inf)

    def _excluded_tokens(self, too_early: bool, device: torch.device) -> Tensor:
        """Which tokens may not be chosen, the end tokens among them or not; made once."""
        if too_early not in self._excluded:
            tally = self.tally
            excluded_V = torch.full((self._vocab_size,), tally.allowed is not None)
            excluded_V[list(tally.allowed or ())] = False
            excluded_V[[*tally.banned, *(tally.end_tokens if too_early else ())]] = True
            self._excluded[too_early] = excluded_V.to(device)
        return self._excluded[too_early]

    def _counted(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Every token of the text so far and its count in the output; made anew only after `extend`."""
        if self._text is None:
            tokens, counts = list(self.tally.counts), list(self.tally.counts.values())
            self._text = _tensors(tokens, counts, device)
        return self._text

    def _counted_with(self, speculated: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """The speculated tokens alone, and their counts in the output that ends with them."""
        counts = self.tally.counts
        tokens = [token for token in dict.fromkeys(speculated) if 0 <= token < self._vocab_size]
        return _tensors(tokens, [counts.get(token, 0) + speculated.count(token) for token in tokens], device)

    def _penalise(self, logits_V: Tensor, z_V: Tensor, counted: tuple[Tensor, Tensor]) -> None:
        """Write the penalised logits of the counted tokens, from the unpenalised ones."""
        tokens_U, counts_U = counted
        z_U = logits_V[tokens_U].float()
        penalty = self.tally.repetition_penalty
        z_U = torch.where(z_U > 0, z_U / penalty, z_U * penalty)
        z_U = z_U - counts_U * self.tally.frequency_penalty
        z_V[tokens_U] = z_U - (counts_U > 0) * self.tally.presence_penalty


def _tensors(tokens: list[int], values: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(tokens, dtype=torch.int64, device=device),
        torch.tensor(values, dtype=torch.float32, device=device),
    )


def processors_of(
    params: SamplingParams, prompt: Sequence[int], vocab_size: int, end_tokens: Sequence[int] = ()
) -> LogitsProcessors | None:
    """The processors of a sequence, None if it asks for none.

    Args:
        prompt: its tokens.
        vocab_size: width of the logits. A draft's vocabulary may be the shorter one: tokens beyond it are left aside,
            and if 5. leaves nothing of it, it drafts without 5.
        end_tokens: those that end the sequence.
    """
    tally = Tally(
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
        bias=dict(params.logit_bias),
        min_tokens=params.min_tokens,
    )
    edits = params.logit_bias or params.banned_tokens or (params.min_tokens and end_tokens)
    if not tally.penalises and not edits and params.allowed_tokens is None:
        return None
    if tally.penalises:
        tally.counts = dict.fromkeys(prompt, 0)
    if leaves_a_token(params, vocab_size, end_tokens):
        tally.allowed, tally.banned, tally.end_tokens = params.allowed_tokens, params.banned_tokens, tuple(end_tokens)
    return LogitsProcessors(tally.within(0, vocab_size), vocab_size)
