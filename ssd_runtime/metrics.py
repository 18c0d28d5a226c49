"""Numbers about a run: series of measurements and what is reported of them. Knows no clock and no process."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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
