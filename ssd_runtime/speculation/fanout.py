"""How many bonus candidates to prepare at each position of a speculation. Knows no tokens.

Uniform spreads the budget evenly; geometric is Theorem 12 of arXiv 2603.03251, fed by an online acceptance estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

FanOut = Callable[[int, int, float], list[int]]

# Exponent r of the power law 1/F^r of missing at fan-out F (Definition 11): log(.226 / .080) / log(8 / 2), the slope
# between F = 2 and F = 8 in Figure 3 of the paper at T = 0, primary speculation.
POWER_LAW_EXPONENT = 0.75


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
            self._accepted = self._accepted * self._keep + accepted
            self._seen = self._seen * self._keep + 1.0

    @property
    def rate(self) -> float:
        return self._accepted / self._seen


def uniform_fan_out(budget: int, length: int, acceptance: float) -> list[int]:
    """F_0..F_K for a speculation of `length` tokens, as even as whole numbers allow; what is over goes to the end."""
    positions = length + 1
    share, over = divmod(budget, positions)
    return [share + (k >= positions - over) for k in range(positions)]


def geometric_fan_out(
    budget: int, length: int, acceptance: float, exponent: float = POWER_LAW_EXPONENT
) -> list[int]:
    """F_0..F_K by Theorem 12: F_k = F_0 a^{k/(1+r)} for k < K and F_K = F_0 a^{K/(1+r)} (1-a)^{-1/(1+r)}.

    Args:
        budget: B, the sum of the result.
        length: K, the speculation length.
        acceptance: a, kept inside (0, 1).
        exponent: r, the power-law exponent of the miss rate.
    """
    a = min(max(acceptance, 0.01), 0.99)
    weights = [a ** (k / (1.0 + exponent)) for k in range(length + 1)]
    weights[-1] *= (1.0 - a) ** (-1.0 / (1.0 + exponent))
    return _round_to_sum([budget * weight / sum(weights) for weight in weights], budget)


def _round_to_sum(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers near `shares` that sum to `total`: largest remainders first, later positions before earlier."""
    floors = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda k: (shares[k] - floors[k], k), reverse=True)
    for k in order[: total - sum(floors)]:
        floors[k] += 1
    return floors


def fan_out_policy(name: Literal["uniform", "geometric"]) -> FanOut:
    """The policy of that name: (budget, length, acceptance) -> [F_0..F_K]."""
    return {"uniform": uniform_fan_out, "geometric": geometric_fan_out}[name]
