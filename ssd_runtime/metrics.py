"""Numbers about a run: series of measurements and what is reported of them. Knows no clock and no process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import quantiles


@dataclass(frozen=True)
class Percentiles:
    """The middle and the tail of a series; both None when the series is empty."""

    p50: float | None
    p95: float | None


def percentiles(values: Iterable[float]) -> Percentiles:
    """p50 and p95 of a series, linear between neighbours."""
    series = list(values)
    if len(series) < 2:
        return Percentiles(*series, *series) if series else Percentiles(None, None)
    twentieths = quantiles(series, n=20, method="inclusive")
    return Percentiles(twentieths[9], twentieths[18])


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`, or None when there was nothing to divide by."""
    return part / whole if whole else None
