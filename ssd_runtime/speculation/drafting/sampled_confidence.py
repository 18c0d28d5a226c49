"""How likely outcomes are where the draft has sampled its tokens (coupling "rejection"). Knows no trees.

The target's own choice is then independent of the draft's noise, so three things are learned apart, online, from what
came out of verifications:

    accepted   the chance that a sampled token is accepted, E min(1, p/q): in classes of q of the token
    bonus      after a whole speculation the token is a draw from p: in classes of q of the likeliest token
    instead    after a rejection it is a draw from max(p - q, 0). Of that q says less: its fall over the candidates has
               a scale of its own, and often it is none of them

Of q this looks at the tokens of the speculation that is being verified, which have been offered already. It must not
look at what has been sampled behind an outcome: whether that is offered may not depend on it (ARCHITECTURE.md).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from ssd_runtime.speculation.planning.cost_model import AcceptanceEstimate
from ssd_runtime.speculation.sampling.ranking import Ranking


class SampledOutcomes:
    """Chances of the outcomes at one position of a speculation that was sampled."""

    EDGES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97)  # of the classes of q
    ACCEPTED = (0.5, 0.55, 0.65, 0.75, 0.85, 0.9, 0.95, 0.99)  # by class, before anything was seen
    LIKELIEST = (0.05, 0.1, 0.2, 0.35, 0.6, 0.8, 0.9, 0.97)

    def __init__(self) -> None:
        self._accepted = [AcceptanceEstimate(prior, weight=8.0, memory=512.0) for prior in self.ACCEPTED]
        self._likeliest = [AcceptanceEstimate(prior, weight=8.0, memory=512.0) for prior in self.LIKELIEST]
        self._bonus = BonusChances()
        self._instead = BonusChances()

    def chances(self, ranking: Ranking, temperature: float, drafted: int | None) -> list[tuple[int, float]]:
        """What may come out at a position once it is reached, and its chance: falling behind the first.

        Args:
            drafted: the token that is verified there; None for the place of the bonus. One that was not sampled (an
                n-gram's) is accepted with p, as a bonus is drawn.
        """
        if drafted is None or drafted != ranking.sampled:
            first = self._of_first(ranking, temperature).rate
            others = self._bonus.of(*_without(ranking, ranking.tokens[0]), temperature)
            return [(ranking.tokens[0], first), *((token, (1.0 - first) * chance) for token, chance in others)]
        accepted = self._of_drafted(ranking).rate
        others = self._instead.of(*_without(ranking, drafted), temperature)
        return [(drafted, accepted), *((token, (1.0 - accepted) * chance) for token, chance in others)]

    def observe(self, ranking: Ranking, temperature: float, token: int, *, accepted: bool | None) -> None:
        """What was emitted at a position.

        Args:
            accepted: whether it is the token that was sampled; None: nothing was verified there, it is the bonus.
        """
        if accepted is not None:
            self._of_drafted(ranking).observe_one(accepted)
        if accepted is False:
            self._instead.observe(*_without(ranking, ranking.draft_token), temperature, token)
        # Accepted or not, what is emitted is a draw from p.
        self._of_first(ranking, temperature).observe_one(token == ranking.tokens[0])
        if token != ranking.tokens[0]:
            self._bonus.observe(*_without(ranking, ranking.tokens[0]), temperature, token)

    def _of_drafted(self, ranking: Ranking) -> AcceptanceEstimate:
        """Of the sampled token, by its q."""
        assert ranking.proposal is not None
        q = ranking.proposal.weights[ranking.proposal.tokens.index(ranking.draft_token)]
        return self._accepted[bisect_right(self.EDGES, q)]

    def _of_first(self, ranking: Ranking, temperature: float) -> AcceptanceEstimate:
        """Of the likeliest token, by its q as far as the ranking goes; Saguaro's C does not change it."""
        return self._likeliest[bisect_right(self.EDGES, 1.0 / sum(_weights(ranking.margins, temperature)))]


class BonusChances:
    """How the chance of some tokens falls with the draft's logits: exp(-margin / (temperature scale)), and the chance
    that it is one of them at all."""

    SCALES = (0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 10.0)

    def __init__(self) -> None:
        self._scale = ScaleEstimate(self.SCALES, 1.0)
        self._known = AcceptanceEstimate(0.8, weight=4.0, memory=256.0)

    def of(self, tokens: Sequence[int], margins: Sequence[float], temperature: float) -> list[tuple[int, float]]:
        """The tokens and their chances, falling."""
        weights = _weights(margins, temperature * self._scale.value)
        total = sum(weights)
        return [(token, self._known.rate * weight / total) for token, weight in zip(tokens, weights, strict=True)]

    def observe(self, tokens: Sequence[int], margins: Sequence[float], temperature: float, token: int) -> None:
        """It was this one."""
        self._known.observe_one(token in tokens)
        if token in tokens and len(tokens) > 1:
            weights_S = [_weights(margins, temperature * scale) for scale in self.SCALES]
            self._scale.observe([weights[tokens.index(token)] / sum(weights) for weights in weights_S])


def _without(ranking: Ranking, token: int) -> tuple[list[int], list[float]]:
    """The other tokens of a ranking and their margins."""
    others = [pair for pair in zip(ranking.tokens, ranking.margins, strict=True) if pair[0] != token]
    return [token for token, _ in others], [margin for _, margin in others]


def _weights(margins: Sequence[float], scale: float) -> list[float]:
    return [math.exp((margins[0] - margin) / scale) for margin in margins]


class ScaleEstimate:
    """Which of a few scales makes what was seen the likeliest.

    Args:
        scales: to choose from.
        first: the one assumed before anything was seen; the prior of the others falls with their ratio to it.

    Attributes:
        value: the likeliest scale.
    """

    KEEP = 0.5 ** (1.0 / 256.0)  # after 256 observations one has lost half its weight

    def __init__(self, scales: Sequence[float], first: float) -> None:
        self.value = first
        self._scales = scales
        self._likelihoods = [-abs(math.log(scale / first)) for scale in scales]  # logarithms

    def observe(self, chances: Sequence[float]) -> None:
        """Something was seen that had this chance under each scale."""
        for index, chance in enumerate(chances):
            self._likelihoods[index] = self._likelihoods[index] * self.KEEP + math.log(max(chance, 1e-6))
        self.value = self._scales[max(range(len(self._scales)), key=self._likelihoods.__getitem__)]
