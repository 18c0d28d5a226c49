"""Fan-out by confidence: the most probable outcomes by the draft's own margins, calibrated online. Knows no trees."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from ssd_runtime.speculation.estimates import AcceptanceEstimate
from ssd_runtime.speculation.fanout import Fork, Verified
from ssd_runtime.speculation.sampling import Ranking


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

    def forks(self, verified: Verified, budget: int) -> list[Fork]:
        outcomes: list[Fork] = []
        reach = 1.0  # chance that the first k tokens are accepted
        for k, ranking in enumerate(verified.rankings):
            if ranking is None:  # an n-gram's token, or one not forwarded yet: nothing is known from here on
                break
            accepted = verified.speculation[k] if k < len(verified.speculation) else None
            accepted_chance = self._least
            for rank, chance in enumerate(self.chances(ranking)):
                if ranking.tokens[rank] == accepted:
                    accepted_chance = chance
                elif reach * chance >= self._least:
                    outcomes.append(Fork(k, ranking.tokens[rank], reach * chance))
                else:
                    break  # later ranks are less likely still
            reach *= accepted_chance
        outcomes.sort(key=lambda fork: -fork.gain)
        return outcomes[:budget]

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

    def observe(self, verified: Verified, num_accepted: int, bonus_token: int) -> None:
        chosen = (*verified.speculation[:num_accepted], bonus_token)
        for ranking, token in zip(verified.rankings, chosen, strict=False):
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
