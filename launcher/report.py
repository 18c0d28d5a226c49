"""What is told of finished requests: rates and percentiles, as JSON values. Knows no engine and no terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from ssd_runtime.comm.messages import Chunk, Finished
from ssd_runtime.metrics import percentiles, ratio
from ssd_runtime.speculation.types import TokenLogprob

SERIES = ("round_ms", "verify_ms", "wait_ms", "other_ms", "draft_step_ms")


@dataclass(frozen=True)
class Output:
    """One output of a request; `logprobs` has one entry a token if they were asked for."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()

    def __add__(self, chunk: Chunk) -> Output:
        return Output(self.text + chunk.text, self.token_ids + chunk.token_ids, self.logprobs + chunk.logprobs)


@dataclass(frozen=True)
class Generation:
    """A finished request and its n outputs."""

    outputs: tuple[Output, ...]
    finished: Finished

    @property
    def text(self) -> str:
        """Of the first output."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the first output."""
        return self.outputs[0].token_ids


def summarise(finished: Sequence[Finished]) -> dict[str, Any]:
    """Rates over all of the requests together, percentiles over all of their rounds; None where nothing was measured.

    An output's first token comes with its prefill: `tokens` counts it, decoding speed and tokens a round do not.
    """
    statistics = [one.statistics for one in finished]
    tokens = sum(one.usage.completion_tokens for one in finished)
    decoded = sum(max(one.usage.completion_tokens - len(one.finish_reasons), 0) for one in finished)
    decode_seconds = sum(s.decode_seconds for s in statistics)
    rounds = sum(s.rounds for s in statistics)
    drafted = sum(s.num_draft_tokens for s in statistics)
    summary: dict[str, Any] = {
        "requests": len(finished),
        "tokens": tokens,
        "decode_seconds": decode_seconds,
        "tokens_per_second": ratio(decoded, decode_seconds),
        "rounds": rounds,
        "tokens_per_round": ratio(decoded, rounds),
        "acceptance": ratio(sum(s.num_accepted_tokens for s in statistics), drafted),
        "hit_rate": ratio(sum(s.hits for s in statistics), sum(s.lookups for s in statistics)),
        "accepted_per_position": _add_up(s.accepted_per_position for s in statistics),
        "draft_tokens": drafted,
        "prefill_seconds": sum(s.prefill_seconds for s in statistics),
    }
    for name in SERIES:
        summary[name] = dataclasses.asdict(percentiles(chain.from_iterable(getattr(s, name) for s in statistics)))
    return summary


def _add_up(rows: Iterable[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip_longest(*rows, fillvalue=0)]
