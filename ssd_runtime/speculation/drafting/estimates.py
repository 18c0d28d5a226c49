"""What fan-outs and plans learn online, with forgetting: how often drafts are right, how far two models are apart.

Knows no policy, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


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
