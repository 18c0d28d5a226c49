"""Fan-outs that count: so many candidates at each position, whatever the text. Knows no trees.

`uniform` is a fixed shape; `geometric` is Theorem 12 of arXiv 2603.03251 with everything in it estimated online.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Protocol

from ssd_runtime.speculation.drafting.estimates import AcceptanceEstimate, PowerLawEstimate
from ssd_runtime.speculation.drafting.fan_out import UNKNOWN, Fork, Verified

TEMPERATURE_CLASSES = (0.0, 0.4, 0.8)  # upper ends: greedy, .3, .7; what is above is the last class


class CountedFanOut:
    """The policies of the paper.

    Args:
        gains: what the first, second, ... candidate at each position is worth.
    """

    def __init__(self, gains: Gains) -> None:
        self._gains = gains

    def forks(self, verified: Verified, budget: int, allowed: int | None = None) -> list[Fork]:
        found: list[Fork] = []
        length = len(verified.speculation)
        for k, ranking in enumerate(verified.rankings):
            tokens = [UNKNOWN] * budget if ranking is None else verified.candidates(k)[:budget]
            gains = self._gains.at(k, length, len(tokens), verified)
            found += [Fork(k, token, gain) for token, gain in zip(tokens, gains, strict=False)]
        found.sort(key=lambda fork: (-fork.gain, -fork.position))
        return found[:budget]

    def observe(self, verified: Verified, num_accepted: int, bonus_token: int) -> None:
        self._gains.observe(verified, num_accepted, bonus_token)


class Gains(Protocol):
    """The worth of candidates by position and rank."""

    def at(self, k: int, length: int, count: int, verified: Verified) -> list[float]:
        """Of up to `count` candidates at position k of a speculation of `length` tokens, falling."""

    def observe(self, verified: Verified, num_accepted: int, bonus_token: int) -> None: ...


class UniformGains:
    """The same number at every position; what is over goes to the end."""

    def at(self, k: int, length: int, count: int, verified: Verified) -> list[float]:
        return [-float(rank) for rank in range(count)]

    def observe(self, verified: Verified, num_accepted: int, bonus_token: int) -> None:
        pass


class GeometricGains:
    """Theorem 12: acceptance a, and the power law c F^-r of missing, estimated online for each class of requests.

    A class is a range of temperatures, after a hit or after a miss: Figure 3 of the paper shows four different laws.
    The candidate that raises the fan-out from j - 1 to j is worth the derivative of the miss rate at j - 1/2, times the
    chance of the position, so the most gainful ones under one budget are Theorem 12's F_k to the nearest whole number,
    and over several sequences its solution for all of them together.
    """

    def __init__(self) -> None:
        self._classes: dict[tuple[int, bool], tuple[AcceptanceEstimate, PowerLawEstimate]] = {}

    def estimates(self, verified: Verified) -> tuple[AcceptanceEstimate, PowerLawEstimate]:
        """Acceptance and power law of the class of a speculation."""
        key = (bisect_left(TEMPERATURE_CLASSES, verified.temperature), verified.after_hit)
        if key not in self._classes:
            self._classes[key] = (AcceptanceEstimate(), PowerLawEstimate())
        return self._classes[key]

    def at(self, k: int, length: int, count: int, verified: Verified) -> list[float]:
        acceptance, power_law = self.estimates(verified)
        a = min(max(acceptance.rate, 0.01), 0.99)
        scale, r = power_law.law
        weight = a**k * (1.0 - a if k < length else 1.0) * scale * r
        return [weight * (j - 0.5) ** -(1.0 + r) for j in range(1, count + 1)]

    def observe(self, verified: Verified, num_accepted: int, bonus_token: int) -> None:
        acceptance, power_law = self.estimates(verified)
        acceptance.observe(num_accepted, len(verified.speculation))
        if verified.rankings[num_accepted] is not None:
            candidates = verified.candidates(num_accepted)
            rank = candidates.index(bonus_token) + 1 if bonus_token in candidates else None
            power_law.observe(rank, len(candidates))


def uniform_counts(budget: int, length: int) -> list[int]:
    """F_0..F_K for a speculation of `length` tokens, as even as whole numbers allow; what is over goes to the end."""
    positions = length + 1
    share, over = divmod(budget, positions)
    return [share + (k >= positions - over) for k in range(positions)]


def geometric_shares(budget: float, length: int, acceptance: float, exponent: float) -> list[float]:
    """F_0..F_K by Theorem 12: F_k = F_0 a^{k/(1+r)} for k < K and F_K = F_0 a^{K/(1+r)} (1-a)^{-1/(1+r)}.

    Args:
        budget: B, the sum of the result.
        length: K, the speculation length.
        acceptance: a, inside (0, 1).
        exponent: r, the power-law exponent of the miss rate.
    """
    weights = [acceptance ** (k / (1.0 + exponent)) for k in range(length + 1)]
    weights[-1] *= (1.0 - acceptance) ** (-1.0 / (1.0 + exponent))
    return [budget * weight / sum(weights) for weight in weights]
