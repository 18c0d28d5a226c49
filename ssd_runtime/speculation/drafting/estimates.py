"""What is learned online, with forgetting: acceptance rates and the power law of missing. Knows no policy, no clock."""

from __future__ import annotations

import functools
import math


class AcceptanceEstimate:
    """The rate at which draft tokens are accepted, learned from outcomes with exponential forgetting.

    Args:
        prior: the rate assumed before anything was seen.
        weight: how many draft tokens the prior counts for.
        memory: draft tokens after which an observation has lost half its weight.
    """

    def __init__(self, prior: float = 0.8, weight: float = 8.0, memory: float = 256.0) -> None:
        self._accepted = prior * weight
        self._seen = weight
        self._keep = 0.5 ** (1.0 / memory)

    def observe(self, num_accepted: int, length: int) -> None:
        """Learn from one verification: `num_accepted` of `length` tokens; tokens after a rejection say nothing."""
        for accepted in [True] * num_accepted + [False] * (num_accepted < length):
            self.observe_one(accepted)

    def observe_one(self, accepted: bool) -> None:
        self._accepted = self._accepted * self._keep + accepted
        self._seen = self._seen * self._keep + 1.0

    @property
    def rate(self) -> float:
        return self._accepted / self._seen


class PowerLawEstimate:
    """The law c F^-r of missing a bonus token with F candidates (Definition 11 of arXiv 2603.03251), learned online.

    The miss rate is counted at fan-outs 1, 2, 4, 8 and 16; c and r are the straight line through the logarithms,
    each weighted by how surely it is known.

    Args:
        scale, exponent: c and r assumed before anything was seen. The defaults are Figure 3 of the paper at T = 0,
            primary speculation: miss rates .226 and .080 at F = 2 and 8.
        weight: how many outcomes the prior counts for at each fan-out; it is never forgotten.
        memory: outcomes after which an observation has lost half its weight.
    """

    FAN_OUTS = (1, 2, 4, 8, 16)

    def __init__(self, scale: float = 0.38, exponent: float = 0.75, weight: float = 8.0, memory: float = 512.0) -> None:
        self._prior = [min(1.0, scale * fan_out**-exponent) for fan_out in self.FAN_OUTS]
        self._weight = weight
        self._keep = 0.5 ** (1.0 / memory)
        self._missed = [0.0] * len(self.FAN_OUTS)
        self._seen = [0.0] * len(self.FAN_OUTS)

    def observe(self, rank: int | None, candidates: int) -> None:
        """The bonus token was candidate number `rank` (1 is the likeliest) of `candidates`, or none of them."""
        for index, fan_out in enumerate(self.FAN_OUTS):
            if fan_out <= candidates:  # beyond, a token that is not found would say nothing
                self._missed[index] = self._missed[index] * self._keep + (rank is None or rank > fan_out)
                self._seen[index] = self._seen[index] * self._keep + 1.0
        self.__dict__.pop("law", None)

    @functools.cached_property
    def law(self) -> tuple[float, float]:
        """(c, r), r kept between .1 and 4."""
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
