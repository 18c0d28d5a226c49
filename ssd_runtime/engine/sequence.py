"""One request while it is decoded: its tokens, its place in the KV pool, what was streamed, what was measured.

Knows no model and no link. `commit` is where EOS, stop strings and the length limit cut an accepted run exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, Protocol

from ssd_runtime.comm.control.client_messages import MOST_SAMPLES, RequestStatistics, Series
from ssd_runtime.engine.request import Request
from ssd_runtime.engine.stop_strings import StopStrings
from ssd_runtime.kv.sharing import Prompt
from ssd_runtime.kv.table import BlockTable
from ssd_runtime.metrics import percentiles, ratio
from ssd_runtime.speculation.noise import EMPTY_TEXT, extend_text
from ssd_runtime.speculation.planning.ngrams import NgramIndex
from ssd_runtime.speculation.sampling.processors import LogitsProcessors, processors_of
from ssd_runtime.speculation.types import NO_TOKEN, Outcome, Speculation, TokenLogprob

FinishReason = Literal["stop", "length", "abort"]


class TextStream(Protocol):
    """Turns tokens into text as they come (model/text/tokenizer.py: Detokenizer)."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class NoText:
    """For models without a tokenizer: tokens only."""

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


@dataclass(frozen=True)
class Delta:
    """What one round added to what the user has."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...] = ()


class Samples:
    """A series that may become long, in bounded memory: its size, mean and maximum, and values for percentiles.

    Attributes:
        count: how many there were.
        most: the largest; None of nothing.
        kept: every first, second, fourth... of them, evenly spaced, so that at most `MOST_SAMPLES` are kept.
    """

    def __init__(self) -> None:
        self.count = 0
        self.most: float | None = None
        self.kept: list[float] = []
        self._sum = 0.0
        self._stride = 1

    def append(self, value: float) -> None:
        if self.count % self._stride == 0:
            self.kept.append(value)
        self.count += 1
        self._sum += value
        self.most = value if self.most is None else max(self.most, value)
        self._thin()

    @property
    def mean(self) -> float | None:
        return ratio(self._sum, self.count)

    @classmethod
    def together(cls, parts: Tokens[Samples]) -> Samples:
        """All of several series as one; each value kept stands for as many."""
        found = cls()
        found._stride = max((part._stride for part in parts), default=1)
        for part in parts:
            found.kept += part.kept[:: found._stride // part._stride]
        found.count = sum(part.count for part in parts)
        found._sum = sum(part._sum for part in parts)
        found.most = max((part.most for part in parts if part.most is not None), default=None)
        found._thin()
        return found

    def _thin(self) -> None:
        while len(self.kept) > MOST_SAMPLES:
            self.kept, self._stride = self.kept[::2], 2 * self._stride


class Measurements:
    """Counters and timings of one sequence; `statistics_of` makes a `RequestStatistics` of them."""

    def __init__(self) -> None:
        self.arrived = time.monotonic()
        self.first_token = 0.0
        self.last_token = 0.0
        self.prefill_seconds = 0.0
        self.rounds = 0
        self.drafted = 0
        self.accepted = 0
        self.accepted_per_position: list[int] = []
        self.hits = 0
        self.misses = 0
        self.round_ms = Samples()
        self.verify_ms = Samples()
        self.wait_ms = Samples()
        self.other_ms = Samples()
        self.draft_step_ms = Samples()

    def count_round(self, drafted: int, accepted: int) -> None:
        """One verification, of which `accepted` tokens reached the user."""
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        missing = accepted - len(self.accepted_per_position)
        self.accepted_per_position += [0] * missing
        for k in range(accepted):
            self.accepted_per_position[k] += 1


class Sequence:
    """A request being decoded.

    While it waits it is little more than its request, whose prompt all outputs share: what grows with the prompt comes
    with `begin`.

    Attributes:
        sequence_id: unique for the life of the engine.
        tokens: prompt and output, once it has begun. The last one has no KV row yet: it is the first row of the next
            forward.
        turn: verifications so far; -1 until the prefill has chosen the first token.
        outcome: of the last verification (of the prefill: no draft token, the first token).
        failure: why it failed, if it did; it has ended with the tokens that came before.
        processors: what the sampling parameters ask for beyond sampling; None if nothing.
        prompt: what of its rows other sequences may hold too, in multiples of `share_unit`.
    """

    def __init__(
        self,
        sequence_id: int,
        request: Request,
        table: BlockTable,
        text: TextStream,
        max_length: int,
        share_unit: int | None = None,
    ) -> None:
        self.sequence_id = sequence_id
        self.request = request
        self.table = table
        self.prompt = Prompt(request.prompt_tokens, table, share_unit)
        self.processors: LogitsProcessors | None = None
        self.tokens: list[int] = []
        self.max_tokens = min(request.max_tokens, max_length - len(request.prompt_tokens))
        self.turn = -1
        self.outcome: Outcome | None = None
        self.finish_reason: FinishReason | None = None
        self.failure: str | None = None
        self.measured = Measurements()
        self.ngrams = NgramIndex()
        self._text = text
        self._stop = StopStrings(request.stop) if request.stop else None
        self._hashed = (0, EMPTY_TEXT)  # how many tokens, their hash

    def begin(self, vocab_size: int) -> None:
        """It is admitted.

        Args:
            vocab_size: width of the logits.
        """
        request = self.request
        self.tokens = list(request.prompt_tokens)
        self.processors = processors_of(request.params, request.prompt_tokens, vocab_size, request.eos_token_ids)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_tokens)

    @property
    def num_output(self) -> int:
        return max(0, len(self.tokens) - self.num_prompt)

    @property
    def prefilled(self) -> bool:
        return self.turn >= 0

    @property
    def most_speculated(self) -> int:
        """The longest speculation worth verifying: no longer than what may still be emitted besides the bonus token."""
        return max(0, min(self.request.lookahead, self.max_tokens - self.num_output - 1))

    def text_hash(self) -> int:
        """Hash of all tokens (speculation/noise.py); what was hashed before is not hashed again."""
        count, text = self._hashed
        self._hashed = (len(self.tokens), extend_text(text, self.tokens[count:]))
        return self._hashed[1]

    def commit(self, outcome: Outcome, speculation: Speculation) -> Delta:
        """Append what a verification decided, token by token, and stop exactly where the request says.

        Where there should be a token and is none, the sequence fails: behind the same text in every mode.
        """
        run = (*speculation.tokens[: outcome.num_accepted], outcome.bonus_token)
        emitted: list[int] = []
        text = ""
        for token in run:
            if token == NO_TOKEN:
                self.fail(
                    f"no token can be chosen at position {len(self.tokens)}: "
                    "the model's logits there are NaN or infinite, or leave nothing"
                )
                break
            emitted.append(token)
            piece, reason = self._emit(token)
            text += piece
            if reason:
                self.finish_reason = reason
                break
        if self.processors is not None:
            self.processors.extend(emitted)
        now = time.monotonic()
        if self.turn < 0:
            self.measured.first_token = now
        else:
            self.measured.count_round(len(speculation.tokens), min(len(emitted), outcome.num_accepted))
        self.measured.last_token = now
        self.turn += 1
        self.outcome = outcome
        return Delta(text, tuple(emitted), self.finish_reason)

    def fail(self, reason: str) -> None:
        """It ends here, and `reason` is told to whoever asked."""
        self.failure, self.finish_reason = reason, "abort"

    def _emit(self, token: int) -> tuple[str, FinishReason | None]:
        self.tokens.append(token)
        if token in self.request.eos_token_ids:
            return self._last_text(), "stop"
        certain, stopped = self._certain(self._text.push(token))
        if stopped:
            return certain, "stop"
        if self.num_output >= self.max_tokens:
            return certain + self._last_text(), "length"
        return certain, None

    def _last_text(self) -> str:
        """What the detokenizer and the stop strings still hold back, at the end."""
        certain, stopped = self._certain(self._text.flush())
        return certain if stopped or self._stop is None else certain + self._stop.flush()

    def _certain(self, text: str) -> tuple[str, bool]:
        """What of a text no stop string can take back any more, and whether one has come."""
        return (text, False) if self._stop is None else self._stop.push(text)

    def statistics(self) -> RequestStatistics:
        return statistics_of([self])


def statistics_of(outputs: Tokens[Sequence], *, samples: bool = False) -> RequestStatistics:
    """What the outputs of one request cost together. They are decoded side by side: their times are not added.

    Args:
        samples: tell the measurements behind each `Series` too.
    """
    measured = [output.measured for output in outputs]

    def series(of: Callable[[Measurements], Samples]) -> Series:
        together = Samples.together([of(one) for one in measured])
        middle = percentiles(together.kept)
        kept = tuple(together.kept) if samples else ()
        return Series(together.count, together.mean, middle.p50, middle.p95, together.most, kept)

    return RequestStatistics(
        mode=outputs[0].request.mode,
        rounds=sum(one.rounds for one in measured),
        num_tokens=sum(output.num_output for output in outputs),
        num_draft_tokens=sum(one.drafted for one in measured),
        num_accepted_tokens=sum(one.accepted for one in measured),
        accepted_per_position=tuple(map(sum, zip_longest(*(m.accepted_per_position for m in measured), fillvalue=0))),
        lookups=sum(one.hits + one.misses for one in measured),
        hits=sum(one.hits for one in measured),
        prefill_seconds=sum(one.prefill_seconds for one in measured),
        decode_seconds=max(max(0.0, one.last_token - one.first_token) for one in measured),
        ttft_seconds=min(max(0.0, one.first_token - one.arrived) for one in measured),
        round_ms=series(lambda one: one.round_ms),
        verify_ms=series(lambda one: one.verify_ms),
        wait_ms=series(lambda one: one.wait_ms),
        other_ms=series(lambda one: one.other_ms),
        draft_step_ms=series(lambda one: one.draft_step_ms),
    )
