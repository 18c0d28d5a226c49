"""Numbers about a run: series of measurements and what is reported of them. Knows no clock and no process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


MOST_SAMPLES = 1024  # of one series


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
    def together(cls, parts: Sequence[Samples]) -> Samples:
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


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`, or None when there was nothing to divide by."""
    return part / whole if whole else None
