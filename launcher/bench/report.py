"""What is told of finished requests: rates and percentiles, as JSON values. Knows no engine and no terminal.

TTFT and TPOT are those of serving benchmarks: the time to the first token, which counts waiting and prefill, and the
time per token after it, (end to end - TTFT) / (n - 1) of n tokens, which holds where tokens come several at once too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from ssd_runtime.comm.control.client_messages import Chunk, Finished, Series
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


@dataclass(frozen=True)
class Batch:
    """Requests that ran at once, in one repetition of the benchmark."""

    repeat: int
    generations: Sequence[Generation]

    @property
    def decoded(self) -> int:
        """Tokens after the first of each request."""
        return sum(max(one.finished.usage.completion_tokens - 1, 0) for one in self.generations)

    @property
    def decode_seconds(self) -> float:
        """From the first token to the last of one request; of several, from their arrival to the last token of all,
        less the prefills, which the engine computes between the rounds of the others."""
        statistics = [one.finished.statistics for one in self.generations]
        if len(statistics) == 1:
            return statistics[0].decode_seconds
        end = max(one.ttft_seconds + one.decode_seconds for one in statistics)
        return max(end - sum(one.prefill_seconds for one in statistics), 0.0)


def summarise_batches(batches: Sequence[Batch], devices: int) -> dict[str, Any]:
    """`summarise`, with speeds of the engine as a whole where requests ran at once.

    Args:
        batches: of one run.
        devices: cores or GPUs that the run used.
    """
    finished = [one.finished for batch in batches for one in batch.generations]
    found = summarise(finished)
    found["tokens_per_second_per_sequence"] = found["tokens_per_second"]
    found["decode_seconds"] = sum(batch.decode_seconds for batch in batches)
    found["tokens_per_second"] = _speed(batches)
    found["devices"] = devices
    found["tokens_per_second_per_device"] = ratio(found["tokens_per_second"] or 0.0, devices)
    repeats = sorted({batch.repeat for batch in batches})
    found["tokens_per_second_by_repeat"] = [_speed([b for b in batches if b.repeat == repeat]) for repeat in repeats]
    return found


def _speed(batches: Sequence[Batch]) -> float | None:
    return ratio(sum(batch.decoded for batch in batches), sum(batch.decode_seconds for batch in batches))


def rank_runs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `best`, among those of their mode, drafts and batch, and `speedup`, over AR in their batch."""
    best: dict[tuple[str, int | None, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["mode"], row.get("drafts"), row["batch"])
        if key not in best or (row["tokens_per_second"] or 0.0) > (best[key]["tokens_per_second"] or 0.0):
            best[key] = row
    for row in rows:
        plain = best.get(("ar", None, row["batch"]), {}).get("tokens_per_second")
        row["best"] = row is best[row["mode"], row.get("drafts"), row["batch"]]
        row["speedup"] = row["tokens_per_second"] / plain if plain and row["tokens_per_second"] else None
    return rows


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
    summary["ttft_ms"] = _percentiles(s.ttft_seconds * 1e3 for s in statistics)
    summary["tpot_ms"] = _percentiles(
        s.decode_seconds * 1e3 / (one.usage.completion_tokens - 1)
        for one, s in zip(finished, statistics, strict=True)
        if one.usage.completion_tokens > 1
    )
    for name in SERIES:
        summary[name] = _together([getattr(s, name) for s in statistics])
    return summary


def _together(series: Sequence[Series]) -> dict[str, float | None]:
    """Percentiles of one request as it tells them; over several, from their samples, which they must have."""
    if len(series) == 1:
        return {"p50": series[0].p50, "p95": series[0].p95}
    assert all(one.samples or not one.count for one in series), "ask for samples where requests are summed up"
    return _percentiles(chain.from_iterable(one.samples for one in series))


def _percentiles(values: Iterable[float]) -> dict[str, float | None]:
    return dataclasses.asdict(percentiles(values))


def _add_up(rows: Iterable[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip_longest(*rows, fillvalue=0)]
