"""The fan-outs of the paper: so many candidates at each position, whatever the text. Knows no trees.

`uniform` is a fixed shape; `geometric` is Theorem 12 of arXiv 2603.03251 with everything in it estimated online.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from ssd_runtime.speculation.drafting.fan_out import UNKNOWN, Fork, Verified
from ssd_runtime.speculation.planning.cost_model import AcceptanceEstimate

TEMPERATURE_CLASSES = (0.0, 0.4, 0.8)  # upper ends: greedy, .3, .7; what is above is the last class


def most_gainful(verified: Verified, gains: Sequence[Sequence[float]], budget: int) -> list[Fork]:
    """The best `budget` forks, later positions first among equals.

    Args:
        gains: at each position, what its first, second, ... candidate is worth, falling.
    """
    found: list[Fork] = []
    for k, ranking in enumerate(verified.rankings):
        tokens = [UNKNOWN] * budget if ranking is None else verified.candidates(k)
        found += [Fork(k, token, gain) for token, gain in zip(tokens, gains[k], strict=False)]
    found.sort(key=lambda fork: (-fork.gain, -fork.position))
    return found[:budget]


class UniformFanOut:
    """The same number at every position; what is over goes to the end."""

    def forks(self, verified: Verified, budget: int, allowed: int | None = None) -> list[Fork]:
        return most_gainful(verified, [[-float(rank) for rank in range(budget)]] * len(verified.rankings), budget)

    def observe(self, verified: Verified, num_accepted: int, bonus_token: int) -> None:
        pass


class GeometricFanOut:
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

    def forks(self, verified: Verified, budget: int, allowed: int | None = None) -> list[Fork]:
        acceptance, power_law = self.estimates(verified)
        a = min(max(acceptance.rate, 0.01), 0.99)
        scale, r = power_law.law
        falling = [scale * r * (j - 0.5) ** -(1.0 + r) for j in range(1, budget + 1)]
        last = len(verified.speculation)
        chances = [a**k * (1.0 - a if k < last else 1.0) for k in range(last + 1)]
        return most_gainful(verified, [[chance * gain for gain in falling] for chance in chances], budget)

    def observe(self, verified: Verified, num_accepted: int, bonus_token: int) -> None:
        acceptance, power_law = self.estimates(verified)
        acceptance.observe(num_accepted, len(verified.speculation))
        if verified.rankings[num_accepted] is not None:
            candidates = verified.candidates(num_accepted)
            rank = candidates.index(bonus_token) + 1 if bonus_token in candidates else None
            power_law.observe(rank, len(candidates))


class PowerLawEstimate:
    """The law c F^-r of missing a bonus token with F candidates (Definition 11 of arXiv 2603.03251), learned online.

    The miss rate is counted at fan-outs 1, 2, 4, 8 and 16; c and r are the straight line through the logarithms,
    each weighted by how surely it is known.

    Args:
        scale, exponent: c and r assumed before anything was seen. The defaults are Figure 3 of the paper at T = 0,
            primary speculation: miss rates .226 and .080 at F = 2 and 8.
        weight: how many outcomes the prior counts for at each fan-out; it is never forgotten.
        memory: outcomes after which an observation has lost half its weight.

    Attributes:
        law: (c, r), r kept between .1 and 4.
    """

    FAN_OUTS = (1, 2, 4, 8, 16)

    def __init__(self, scale: float = 0.38, exponent: float = 0.75, weight: float = 8.0, memory: float = 512.0) -> None:
        self._prior = [min(1.0, scale * fan_out**-exponent) for fan_out in self.FAN_OUTS]
        self._weight = weight
        self._keep = 0.5 ** (1.0 / memory)
        self._missed = [0.0] * len(self.FAN_OUTS)
        self._seen = [0.0] * len(self.FAN_OUTS)
        self.law = self._fit()

    def observe(self, rank: int | None, candidates: int) -> None:
        """The bonus token was candidate number `rank` (1 is the likeliest) of `candidates`, or none of them."""
        for index, fan_out in enumerate(self.FAN_OUTS):
            if fan_out <= candidates:  # beyond, a token that is not found would say nothing
                self._missed[index] = self._missed[index] * self._keep + (rank is None or rank > fan_out)
                self._seen[index] = self._seen[index] * self._keep + 1.0
        self.law = self._fit()

    def _fit(self) -> tuple[float, float]:
        points = []
        for fan_out, prior, missed, seen in zip(self.FAN_OUTS, self._prior, self._missed, self._seen, strict=True):
            counted = seen + self._weight
            rate = (missed + prior * self._weight) / counted
            # The variance of a logarithm of a rate is (1 - rate) / (rate x count).
            points.append((math.log(fan_out), math.log(rate), counted * rate / max(1.0 - rate, 0.01)))
        total = sum(weight for _, _, weight in points)
        mean_x = sum(x * weight for x, _, weight in points) / total
        mean_y = sum(y * weight for _, y, weight in points) / total
        spread = sum(weight * (x - mean_x) ** 2 for x, _, weight in points)
        slope = sum(weight * (x - mean_x) * (y - mean_y) for x, y, weight in points) / spread
        exponent = min(max(-slope, 0.1), 4.0)
        return min(1.0, math.exp(mean_y + exponent * mean_x)), exponent


def uniform_counts(budget: int, length: int) -> list[int]:
    """F_0..F_K for a speculation of `length` tokens, as even as whole numbers allow; what is over goes to the end."""
    each, over = divmod(budget, length + 1)
    return [each + (k > length - over) for k in range(length + 1)]
