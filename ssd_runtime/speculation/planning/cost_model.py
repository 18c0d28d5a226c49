"""How fast both sides are and how often each source is right, measured online. Knows no clock and no policy.

All times are seconds. What a draft says of its steps is believed within bounds only, and forgotten with it: whatever
was observed, every number here is finite, and what is divided by is above zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from ssd_runtime.speculation.types import Outcome, Source, Speculation

LEAST_SECONDS, MOST_SECONDS = 1e-6, 3600.0  # of a step, a verification, a round
MOST_ROWS = 1 << 16  # of a forward


def believable(value: float, least: float, most: float) -> float:
    """The value, or the bound that it is beyond; NaN is the least."""
    return min(max(least, value), most)


class Smoothed:
    """A moving average that starts with its first value."""

    def __init__(self, keep: float = 0.8) -> None:
        self._keep = keep
        self.value: float | None = None

    def observe(self, value: float) -> None:
        self.value = value if self.value is None else self._keep * self.value + (1 - self._keep) * value


class Line:
    """A cost that grows with rows: the least-squares line through what was measured, with forgetting.

    While all measurements have about the same number of rows the slope is not known and taken as 0. Neither slope nor
    intercept is ever negative.

    Args:
        memory: measurements after which one has lost half its weight.
    """

    def __init__(self, memory: float = 64.0) -> None:
        self._keep = 0.5 ** (1.0 / memory)
        self._sums: tuple[float, ...] = (0.0,) * 5  # of 1, rows, seconds, rows^2, rows x seconds

    def observe(self, rows: float, seconds: float) -> None:
        fresh = (1.0, rows, seconds, rows * rows, rows * seconds)
        self._sums = tuple(self._keep * total + one for total, one in zip(self._sums, fresh, strict=True))

    @property
    def known(self) -> bool:
        return self._sums[0] > 0.0

    def at(self, rows: float) -> float:
        """Seconds for so many rows. Only when `known`."""
        x, y, xx, xy = (total / self._sums[0] for total in self._sums[1:])
        spread, slope = xx - x**2, 0.0
        if spread >= 1e-3 * max(1.0, x):
            slope = min(max(0.0, (xy - x * y) / spread), y / x)
        return max(LEAST_SECONDS, y + slope * (rows - x))


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


class CostModel:
    """The numbers of one engine.

    Attributes:
        step: a drafting step, by rows.
        verification: one verification, by rows.
        step_seconds, token_seconds, verify_seconds: moving averages; a token is one that came out of a round, so its
            time counts what was drafted in vain.
        steps_per_token: drafting steps over tokens of a sequence.
        acceptance: of the tokens of drafts.
    """

    def __init__(self) -> None:
        self.verification, self.verify_seconds = Line(), Smoothed()
        self.forget_drafts()

    def forget_drafts(self) -> None:
        """A draft has come or gone: what was learned of drafting is learned anew."""
        self.step, self.step_seconds, self.token_seconds = Line(), Smoothed(), Smoothed()
        self.steps_per_token = Smoothed(0.95)
        self.acceptance = AcceptanceEstimate()
        self._steps, self._drafting = 0, 0.0  # heard of since the last round, and their seconds

    def drafted(self, seconds: float, rows: int) -> None:
        """A drafting step was heard of."""
        seconds = believable(seconds, LEAST_SECONDS, MOST_SECONDS)
        self.step_seconds.observe(seconds)
        self.step.observe(believable(rows, 1, MOST_ROWS), seconds)
        self._steps += 1
        self._drafting += seconds

    def verified(
        self, speculations: Sequence[Speculation], outcomes: Sequence[Outcome], seconds: float, drafts: int = 1
    ) -> None:
        """A verification has ended, `seconds` after it began; so many drafts were drafting side by side."""
        seconds = believable(seconds, LEAST_SECONDS, MOST_SECONDS)
        self.verify_seconds.observe(seconds)
        self.verification.observe(sum(1 + len(speculation.tokens) for speculation in speculations), seconds)
        if self._steps:
            emitted = drafts * sum(outcome.num_accepted + 1 for outcome in outcomes) / len(outcomes)
            self.token_seconds.observe(self._drafting / emitted)
            self.steps_per_token.observe(self._steps / emitted)
        self._steps, self._drafting = 0, 0.0
        for speculation, outcome in zip(speculations, outcomes, strict=True):
            if speculation.source == Source.DRAFT:
                self.acceptance.observe(outcome.num_accepted, len(speculation.tokens))


def expected_tokens(length: float, acceptance: float) -> float:
    """Tokens that a verification of `length` draft tokens yields: 1 + a + ... + a^length, for fractions too."""
    if acceptance > 0.9999:
        return length + 1.0
    return float((1.0 - acceptance ** (length + 1.0)) / (1.0 - acceptance))
