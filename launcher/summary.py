"""What finished requests come to: rates and percentiles. Knows no engine and no terminal.

TTFT and TPOT are those of serving benchmarks: the time to the first token, which counts waiting and prefill, and the
time per token after it, (end to end - TTFT) / (n - 1) of n tokens, which holds where tokens come several at once too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest

from msgspec import Struct

from ssd_runtime.comm.control.client_messages import Finished, Series
from ssd_runtime.metrics import Percentiles, percentiles, ratio


class Summary(Struct, frozen=True, kw_only=True):
    """Rates over requests together, percentiles over all of their rounds; None where nothing was measured.

    Attributes:
        tokens: of all outputs. The first of an output comes with its prefill: speeds and tokens a round leave it out.
        accepted_per_position: entry i counts the rounds that accepted draft token i.
        tokens_per_second, decode_seconds: from the first token of a request to its last.
    """

    requests: int
    tokens: int
    decode_seconds: float
    tokens_per_second: float | None
    rounds: int
    tokens_per_round: float | None
    acceptance: float | None
    hit_rate: float | None
    accepted_per_position: tuple[int, ...]
    draft_tokens: int
    prefill_seconds: float
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    round_ms: Percentiles
    verify_ms: Percentiles
    wait_ms: Percentiles
    other_ms: Percentiles
    draft_step_ms: Percentiles


def summarise(finished: Sequence[Finished]) -> Summary:
    """Of several requests, which must have been asked for their samples, or of one."""
    statistics = [one.statistics for one in finished]
    decoded = sum(max(one.usage.completion_tokens - len(one.finish_reasons), 0) for one in finished)
    decode_seconds = sum(s.decode_seconds for s in statistics)
    rounds = sum(s.rounds for s in statistics)
    drafted = sum(s.num_draft_tokens for s in statistics)
    return Summary(
        requests=len(finished),
        tokens=sum(one.usage.completion_tokens for one in finished),
        decode_seconds=decode_seconds,
        tokens_per_second=ratio(decoded, decode_seconds),
        rounds=rounds,
        tokens_per_round=ratio(decoded, rounds),
        acceptance=ratio(sum(s.num_accepted_tokens for s in statistics), drafted),
        hit_rate=ratio(sum(s.hits for s in statistics), sum(s.lookups for s in statistics)),
        accepted_per_position=tuple(map(sum, zip_longest(*(s.accepted_per_position for s in statistics), fillvalue=0))),
        draft_tokens=drafted,
        prefill_seconds=sum(s.prefill_seconds for s in statistics),
        ttft_ms=percentiles(s.ttft_seconds * 1e3 for s in statistics),
        tpot_ms=percentiles(
            one.statistics.decode_seconds * 1e3 / (one.usage.completion_tokens - 1)
            for one in finished
            if one.usage.completion_tokens > 1
        ),
        round_ms=_together(s.round_ms for s in statistics),
        verify_ms=_together(s.verify_ms for s in statistics),
        wait_ms=_together(s.wait_ms for s in statistics),
        other_ms=_together(s.other_ms for s in statistics),
        draft_step_ms=_together(s.draft_step_ms for s in statistics),
    )


def _together(series: Iterable[Series]) -> Percentiles:
    """Percentiles of one request as it tells them; over several, from their samples, which they must have."""
    parts = list(series)
    if len(parts) == 1:
        return Percentiles(parts[0].p50, parts[0].p95)
    assert all(one.samples or not one.count for one in parts), "ask for samples where requests are summed up"
    return percentiles(chain.from_iterable(one.samples for one in parts))
