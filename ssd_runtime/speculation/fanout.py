"""Which outcomes of a verification to prepare for: how many bonus candidates at each position, and which.

Knows rankings, not models. `uniform` spreads the budget evenly; `geometric` is Theorem 12 of arXiv 2603.03251, fed by
an online acceptance estimate; `confidence` takes the most probable outcomes by the draft's own margins, calibrated
online.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

from ssd_runtime.speculation.sampling import Ranking

# Exponent r of the power law 1/F^r of missing at fan-out F (Definition 11): log(.226 / .080) / log(8 / 2), the slope
# between F = 2 and F = 8 in Figure 3 of the paper at T = 0, primary speculation.
POWER_LAW_EXPONENT = 0.75

Fork = tuple[int, int]  # position k, bonus candidate t*


class FanOut(Protocol):
    """A policy. `rankings[k]`: what the draft expects after k tokens of `speculation`; None: not known yet."""

    def forks(self, rankings: Sequence[Ranking | None], speculation: Sequence[int], budget: int) -> list[Fork]:
        """At most `budget` outcomes (k, t*) to draft for, without those that the speculation itself denies."""

    def observe(
        self, rankings: Sequence[Ranking | None], speculation: Sequence[int], num_accepted: int, bonus_token: int
    ) -> None:
        """Learn from the outcome of a verification."""


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


class CountedFanOut:
    """F_k candidates at position k, whatever the text: the policies of the paper.

    Args:
        counts: (budget, length, acceptance) -> [F_0..F_length].
    """

    def __init__(self, counts: CountPolicy) -> None:
        self._counts = counts
        self.acceptance = AcceptanceEstimate()

    def forks(self, rankings: Sequence[Ranking | None], speculation: Sequence[int], budget: int) -> list[Fork]:
        counts = self._counts(budget, len(speculation), self.acceptance.rate)
        found: list[Fork] = []
        for k, ranking in enumerate(rankings):
            if ranking is not None:
                candidates = [token for token, _ in candidates_at(k, ranking, speculation)]
                found += [(k, token) for token in candidates[: counts[k]]]
        return found

    def observe(
        self, rankings: Sequence[Ranking | None], speculation: Sequence[int], num_accepted: int, bonus_token: int
    ) -> None:
        self.acceptance.observe(num_accepted, len(speculation))


class CountPolicy(Protocol):
    """How a budget is spread over the positions 0..length."""

    def __call__(self, budget: int, length: int, acceptance: float) -> list[int]: ...


def candidates_at(k: int, ranking: Ranking, speculation: Sequence[int]) -> list[tuple[int, int]]:
    """Bonus candidates at position k as (token, rank), without the token that the speculation has there."""
    taken = speculation[k] if k < len(speculation) else None
    return [(token, rank) for rank, token in enumerate(ranking.tokens) if token != taken]


def uniform_counts(budget: int, length: int, acceptance: float) -> list[int]:
    """F_0..F_K for a speculation of `length` tokens, as even as whole numbers allow; what is over goes to the end."""
    positions = length + 1
    share, over = divmod(budget, positions)
    return [share + (k >= positions - over) for k in range(positions)]


def geometric_counts(budget: int, length: int, acceptance: float, exponent: float = POWER_LAW_EXPONENT) -> list[int]:
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


class ConfidenceFanOut:
    """The most probable outcomes by the draft's own margins.

    The margin between the draft's first and second choice says how likely the target is to make the same first
    choice: the chance is learned online, in classes of margin, from what the target chose. So a position where the
    draft is sure costs no fork, and one where two tokens are near each other gets its second. The same noise on both
    sides keeps this as true at temperature 1 as at 0.

    Args:
        least: outcomes less probable than this are not drafted for, even when the budget has room: a forward with fewer
            rows is a faster one.
    """

    EDGES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
    PRIOR = (0.55, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)

    def __init__(self, least: float = 0.02) -> None:
        self._least = least
        self._agrees = [AcceptanceEstimate(prior, weight=8.0, memory=512.0) for prior in self.PRIOR]
        self._ranks = [AcceptanceEstimate(prior, weight=16.0, memory=512.0) for prior in (0.6, 0.4)]

    def forks(self, rankings: Sequence[Ranking | None], speculation: Sequence[int], budget: int) -> list[Fork]:
        outcomes: list[tuple[float, Fork]] = []
        reach = 1.0  # chance that the first k tokens are accepted
        for k, ranking in enumerate(rankings):
            if ranking is None:  # an n-gram's token, or one not forwarded yet: nothing is known from here on
                break
            accepted = speculation[k] if k < len(speculation) else None
            accepted_chance = self._least
            for rank, chance in enumerate(self.chances(ranking)):
                if ranking.tokens[rank] == accepted:
                    accepted_chance = chance
                elif reach * chance >= self._least:
                    outcomes.append((reach * chance, (k, ranking.tokens[rank])))
                else:
                    break  # later ranks are less likely still
            reach *= accepted_chance
        outcomes.sort(key=lambda outcome: -outcome[0])
        return [fork for _, fork in outcomes[:budget]]

    def chances(self, ranking: Ranking) -> Iterator[float]:
        """The chance that the target chooses the first, second, ... token of a ranking."""
        agree = self._class(ranking).rate
        second, third = (estimate.rate for estimate in self._ranks)
        yield agree
        left = 1.0 - agree
        # What neither the second nor the third takes is thought to halve from rank to rank.
        for rank in range(1, len(ranking.tokens)):
            taken = left * (second if rank == 1 else third if rank == 2 else 0.5)
            left -= taken
            yield taken

    def _class(self, ranking: Ranking) -> AcceptanceEstimate:
        margin = ranking.margins[1] if len(ranking.margins) > 1 else float("inf")
        return self._agrees[bisect_right(self.EDGES, margin)]

    def observe(
        self, rankings: Sequence[Ranking | None], speculation: Sequence[int], num_accepted: int, bonus_token: int
    ) -> None:
        chosen = (*speculation[:num_accepted], bonus_token)
        for ranking, token in zip(rankings, chosen, strict=False):
            if ranking is None:
                break
            self._class(ranking).observe_one(token == ranking.tokens[0])
            if token == ranking.tokens[0]:
                continue
            for rank, estimate in enumerate(self._ranks, start=1):
                found = len(ranking.tokens) > rank and token == ranking.tokens[rank]
                estimate.observe_one(found)
                if found:
                    break


def fan_out_policy(name: Literal["uniform", "geometric", "confidence"]) -> FanOut:
    """A new policy of that name."""
    if name == "confidence":
        return ConfidenceFanOut()
    return CountedFanOut(uniform_counts if name == "uniform" else geometric_counts)
