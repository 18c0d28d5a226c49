"""Fan-out by confidence: the most probable outcomes by the draft's own ranking, calibrated online. Knows no trees."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator

from ssd_runtime.speculation.drafting.fan_out import Fork, Verified
from ssd_runtime.speculation.drafting.sampled_confidence import SampledOutcomes, ScaleEstimate
from ssd_runtime.speculation.planning.cost_model import AcceptanceEstimate
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

    EDGES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the classes of margin, in logits
    PRIOR = (0.55, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # P(same choice) of each class before anything was seen
    SCALES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)  # logits
    FLOOR = 1e-4  # of the weight of a candidate, so that none is impossible
    MOST_KNOWN = 2048

    def __init__(self) -> None:
        self._agrees = [AcceptanceEstimate(prior, weight=8.0, memory=512.0) for prior in self.PRIOR]
        self._scale = ScaleEstimate(self.SCALES, 0.7)
        # Chances at this scale, by the identity of a ranking, which is asked about in every drafting step.
        self._known: dict[int, tuple[Ranking, list[float]]] = {}
        self._sampled = SampledOutcomes()

    def forks(self, verified: Verified, budget: int, allowed: int | None = None) -> list[Fork]:
        least = least_chance(budget if allowed is None else allowed)
        outcomes: list[Fork] = []
        reach = 1.0  # chance that the first k tokens are accepted
        for k, ranking in enumerate(verified.rankings):
            if ranking is None:  # an n-gram's token, or one not forwarded yet: nothing is known from here on
                break
            token, accepted = verified.token(k), least
            for candidate, chance in self._emitted(verified, k, ranking):
                if candidate == token:
                    accepted = chance
                elif reach * chance >= least:
                    outcomes.append(Fork(k, candidate, reach * chance))
                elif candidate != ranking.tokens[0]:
                    break  # what comes later is less likely still
            reach *= accepted
        outcomes.sort(key=lambda fork: -fork.gain)
        return outcomes[:budget]

    def _emitted(self, verified: Verified, k: int, ranking: Ranking) -> Iterable[tuple[int, float]]:
        """What may come out at position k once it is reached and its chance, falling behind the likeliest token."""
        if ranking.sampled is None:
            return zip(ranking.tokens, self.chances(ranking), strict=False)
        return self._sampled.chances(ranking, verified.temperature, verified.token(k))

    def chances(self, ranking: Ranking) -> Iterator[float]:
        """The chance that the target chooses the first, second, ... token of a ranking."""
        agree = self._class(ranking).rate
        yield agree
        for chance in self._instead(ranking):
            yield (1.0 - agree) * chance

    def _instead(self, ranking: Ranking) -> list[float]:
        """The chances of the second, third, ... token where it is not the first."""
        known = self._known.get(id(ranking))
        if known is None or known[0] is not ranking:
            if len(self._known) >= self.MOST_KNOWN:
                self._known.clear()
            weights = self._weights(ranking, self._scale.value)
            total = sum(weights)
            known = self._known[id(ranking)] = ranking, [weight / total for weight in weights]
        return known[1]

    def _weights(self, ranking: Ranking, scale: float) -> list[float]:
        """How these tokens weigh against each other at a scale, falling."""
        others = ranking.margins[1:]
        return [
            math.exp((others[0] - margin) / scale) / math.sqrt(rank) + self.FLOOR
            for rank, margin in enumerate(others, start=1)
        ]

    def _class(self, ranking: Ranking) -> AcceptanceEstimate:
        margin = ranking.margins[1] if len(ranking.margins) > 1 else math.inf
        return self._agrees[bisect_right(self.EDGES, margin)]

    def observe(self, verified: Verified, num_accepted: int, bonus_token: int) -> None:
        emitted = (*verified.speculation[:num_accepted], bonus_token)
        for k, (ranking, token) in enumerate(zip(verified.rankings, emitted, strict=False)):
            if ranking is None:
                break
            if ranking.sampled is None:
                self._learn(ranking, token)
            else:
                accepted = k < num_accepted if verified.token(k) == ranking.sampled else None
                self._sampled.observe(ranking, verified.temperature, token, accepted=accepted)

    def _learn(self, ranking: Ranking, token: int) -> None:
        """The target has chosen this token."""
        agreed = token == ranking.tokens[0]
        self._class(ranking).observe_one(agreed)
        if not agreed and token in ranking.tokens:
            before, place = self._scale.value, ranking.tokens.index(token) - 1
            weights_S = [self._weights(ranking, scale) for scale in self.SCALES]
            self._scale.observe([weights[place] / sum(weights) for weights in weights_S])
            if self._scale.value != before:
                self._known.clear()
