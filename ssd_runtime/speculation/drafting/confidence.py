"""Fan-out by confidence: the most probable outcomes by the draft's own ranking, calibrated online. Knows no trees."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator

from ssd_runtime.speculation.drafting.estimates import AcceptanceEstimate
from ssd_runtime.speculation.drafting.fan_out import Fork, Verified
from ssd_runtime.speculation.drafting.sampled_confidence import SampledOutcomes
from ssd_runtime.speculation.sampling.ranking import Ranking


def least_chance(allowed: int) -> float:
    """What an outcome must have of a chance to be drafted for: 1 / B^2, but never more than 2 % is asked.

    A forward with fewer rows is a faster one, so an outcome has to be worth its row. How much that is, follows from how
    many are allowed: who allows many means the improbable ones too.

    Args:
        allowed: B of the sequence, by all its drafts together: they divide its outcomes, and no draft has more rows for
            it than with its own B alone. So D drafts of B / D prepare for what one of B does.
    """
    return min(0.02, max(1, allowed) ** -2.0)


class ConfidenceFanOut:
    """The most probable outcomes by the draft's own margins.

    P(reject at k): the margin between the draft's first and second choice says how likely the target is to make the
    same first choice; the chance is learned in classes of margin from what the target chose. P(t* | reject at k): among
    the other candidates the chance falls exponentially with the margin, over a scale that says how far the two models
    are apart; the likeliest of a few scales is learned from the tokens that the target chose instead. So a position
    where the draft is sure costs no fork, and one where many tokens are near each other gets many. The same noise on
    both sides keeps this as true at temperature 1 as at 0.

    Outcomes that hardly ever happen are not drafted for, even when the budget has room (`least_chance`).
    """

    EDGES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
    PRIOR = (0.55, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    SCALES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)  # logits
    FLOOR = 1e-4  # of the weight of a candidate, so that none is impossible

    def __init__(self) -> None:
        self._agrees = [AcceptanceEstimate(prior, weight=8.0, memory=512.0) for prior in self.PRIOR]
        self._likelihoods = [-abs(math.log(scale / 0.7)) for scale in self.SCALES]  # of what was seen, in logarithms
        self._keep = 0.5 ** (1.0 / 256.0)
        self._scale = 0.7
        self._known: dict[
            int, tuple[Ranking, list[float]]
        ] = {}  # shares at this scale; a ranking is asked in every step
        self._sampled = SampledOutcomes()

    def forks(self, verified: Verified, budget: int, allowed: int | None = None) -> list[Fork]:
        least = least_chance(budget if allowed is None else allowed)
        outcomes: list[Fork] = []
        reach = 1.0  # chance that the first k tokens are accepted
        for k, ranking in enumerate(verified.rankings):
            if ranking is None:  # an n-gram's token, or one not forwarded yet: nothing is known from here on
                break
            if ranking.sampled is None:
                accepted_chance = self._add_chosen(outcomes, verified, k, ranking, reach, least)
            else:
                accepted_chance = self._add_sampled(outcomes, verified, k, ranking, reach, least)
            reach *= accepted_chance
        outcomes.sort(key=lambda fork: -fork.gain)
        return outcomes[:budget]

    def _add_chosen(
        self, outcomes: list[Fork], verified: Verified, k: int, ranking: Ranking, reach: float, least: float
    ) -> float:
        """The outcomes at position k where the draft's first choice is its token; the chance that it is accepted."""
        accepted = verified.token(k)
        accepted_chance = least
        for rank, chance in enumerate(self.chances(ranking)):
            if ranking.tokens[rank] == accepted:
                accepted_chance = chance
            elif reach * chance >= least:
                outcomes.append(Fork(k, ranking.tokens[rank], reach * chance))
            elif rank:
                break  # later ranks are less likely still
        return accepted_chance

    def _add_sampled(
        self, outcomes: list[Fork], verified: Verified, k: int, ranking: Ranking, reach: float, least: float
    ) -> float:
        """The same where the draft's token was sampled. A token that was not (an n-gram's) has p for its chance."""
        token = verified.token(k)
        if token is not None and token == ranking.sampled:
            accepted_chance = self._sampled.accepted(ranking)
            candidates = self._sampled.instead(ranking, verified.temperature)
            reach *= 1.0 - accepted_chance
        else:
            candidates = self._sampled.bonus(ranking, verified.temperature)
            accepted_chance = dict(candidates).get(token, least) if token is not None else 0.0
        for candidate, chance in candidates:
            if reach * chance >= least and candidate != token:
                outcomes.append(Fork(k, candidate, reach * chance))
        return accepted_chance

    def chances(self, ranking: Ranking) -> Iterator[float]:
        """The chance that the target chooses the first, second, ... token of a ranking."""
        agree = self._class(ranking).rate
        yield agree
        for share in self._shares(ranking):
            yield (1.0 - agree) * share

    def _shares(self, ranking: Ranking) -> list[float]:
        """The chances of the second, third, ... token where it is not the first."""
        known = self._known.get(id(ranking))
        if known is None or known[0] is not ranking:
            if len(self._known) >= 2048:
                self._known.clear()
            others = self._others(ranking, self._scale)
            total = sum(others)
            known = self._known[id(ranking)] = ranking, [weight / total for weight in others]
        return known[1]

    def _others(self, ranking: Ranking, scale: float) -> list[float]:
        """How the second, third, ... tokens weigh against each other, falling."""
        others = ranking.margins[1:]
        return [
            math.exp((others[0] - margin) / scale) / math.sqrt(rank) + self.FLOOR
            for rank, margin in enumerate(others, start=1)
        ]

    def _class(self, ranking: Ranking) -> AcceptanceEstimate:
        margin = ranking.margins[1] if len(ranking.margins) > 1 else float("inf")
        return self._agrees[bisect_right(self.EDGES, margin)]

    def observe(self, verified: Verified, num_accepted: int, bonus_token: int) -> None:
        chosen = (*verified.speculation[:num_accepted], bonus_token)
        for k, (ranking, token) in enumerate(zip(verified.rankings, chosen, strict=False)):
            if ranking is None:
                break
            if ranking.sampled is not None:
                sampled = verified.token(k) == ranking.sampled
                accepted = k < num_accepted if sampled else None
                self._sampled.observe(ranking, verified.temperature, token, accepted=accepted)
                continue
            agreed = token == ranking.tokens[0]
            self._class(ranking).observe_one(agreed)
            if not agreed and token in ranking.tokens:
                self._learn_scale(ranking, ranking.tokens.index(token) - 1)

    def _learn_scale(self, ranking: Ranking, other: int) -> None:
        for index, scale in enumerate(self.SCALES):
            others = self._others(ranking, scale)
            likelihood = self._likelihoods[index] * self._keep + math.log(others[other] / sum(others))
            self._likelihoods[index] = likelihood
        best = self.SCALES[max(range(len(self.SCALES)), key=self._likelihoods.__getitem__)]
        if best != self._scale:
            self._scale = best
            self._known.clear()
