"""Numbers about a run: what is measured for one request, and what is reported of many. Knows no clock and no process."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RequestStatistics:
    """What the engine measured while it decoded one request; `+` joins those of several.

    Attributes:
        requests: how many are joined here.
        tokens: output tokens the user got; nothing that was cut off is counted.
        rounds: verifications (forwards of the target after the prefill).
        drafted: draft tokens verified.
        accepted: draft tokens the target accepted.
        accepted_per_position: [i] is in how many rounds draft token i was accepted.
        hits: rounds whose speculation came out of the speculation cache.
        misses: rounds in which the cache was asked in vain.
        prefill_seconds: from admission to the first token.
        decode_seconds: from the first token to the last.
        round_ms: of each round that was a hit (without a cache: of each round), from the start of its verification to
            the start of the next.
        verify_ms: of each round, the target's forward and the verification.
        wait_ms: of each round, waiting for the draft.
        other_ms: of each round, everything else.
        draft_step_ms: of each forward of the draft.
        draft_step_width: of each forward of the draft, its rows.
    """

    requests: int = 1
    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_per_position: tuple[int, ...] = ()
    hits: int = 0
    misses: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    round_ms: tuple[float, ...] = ()
    verify_ms: tuple[float, ...] = ()
    wait_ms: tuple[float, ...] = ()
    other_ms: tuple[float, ...] = ()
    draft_step_ms: tuple[float, ...] = ()
    draft_step_width: tuple[int, ...] = ()

    @property
    def decoded(self) -> int:
        """Tokens that rounds brought: a request's first comes with its prefill."""
        return max(self.tokens - self.requests, 0)

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed, prefill apart."""
        return ratio(self.decoded, self.decode_seconds)

    @property
    def tokens_per_round(self) -> float | None:
        return ratio(self.decoded, self.rounds)

    @property
    def acceptance(self) -> float | None:
        """Accepted draft tokens per drafted one."""
        return ratio(self.accepted, self.drafted)

    @property
    def hit_rate(self) -> float | None:
        return ratio(self.hits, self.hits + self.misses)

    def __add__(self, other: RequestStatistics) -> RequestStatistics:
        joined: dict[str, Any] = {
            f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)
        }
        longer, shorter = sorted((self.accepted_per_position, other.accepted_per_position), key=len, reverse=True)
        padded = shorter + (0,) * (len(longer) - len(shorter))
        joined["accepted_per_position"] = tuple(a + b for a, b in zip(longer, padded, strict=True))
        return RequestStatistics(**joined)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RequestStatistics:
        """The inverse of `to_dict`, also after lists have taken the place of tuples."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class Percentiles:
    """The middle and the tail of a series; both None when the series is empty."""

    p50: float | None
    p95: float | None


def percentile(values: Sequence[float], fraction: float) -> float | None:
    """The value below which `fraction` (0..1) of `values` lie, linear between neighbours; None of nothing."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be between 0 and 1, not {fraction}")
    if not values:
        return None
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def percentiles(values: Iterable[float]) -> Percentiles:
    """p50 and p95 of a series."""
    series = list(values)
    return Percentiles(percentile(series, 0.50), percentile(series, 0.95))


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`, or None when there was nothing to divide by."""
    return part / whole if whole else None
