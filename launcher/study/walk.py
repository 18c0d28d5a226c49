"""Rounds over recorded text: what SSD would have foreseen, had the draft had the time. Knows no models.

Under shared noise a walk is what the runtime does: the draft's own tokens, the real `verify`, the real fan-out policy.
A miss is followed by the draft's just-in-time speculation, which is the same chain. Under coupling "rejection" the
draft is random; the text is walked over with all its chances at once, so the rates are expectations, not samples.

Rounds that would reach beyond the end of the text are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.study.coupling import Rejection, Variant
from launcher.study.recording import Record
from ssd_runtime.speculation.drafting.fan_out import FanOut, Verified, divide_budget
from ssd_runtime.speculation.verify import verify

FIRST = 1  # the prefill chooses the token at place 0


@dataclass(frozen=True)
class WalkedRound:
    """One verification.

    Attributes:
        num_accepted: k.
        rank: place of the bonus token among the candidates there, 0 for the first.
        hit: whether the policy had prepared for the outcome.
    """

    num_accepted: int
    rank: int
    hit: bool


def walk(record: Record, lookahead: int, policy: FanOut, budget: int) -> Iterator[WalkedRound]:
    """The rounds of one text under shared noise; the policy learns on the way."""
    start, after_hit = FIRST, False
    while start + lookahead < len(record.chosen):
        verified = _verified(record, start, lookahead, after_hit)
        outcome = verify(record.chosen[start : start + lookahead + 1], verified.speculation)
        k = outcome.num_accepted
        (forks,) = divide_budget([policy.forks(verified, budget)], budget)
        hit = any((fork.position, fork.token) == (k, outcome.bonus_token) for fork in forks)
        policy.observe(verified, k, outcome.bonus_token)
        yield WalkedRound(k, record.ranks[start + k] - (k < lookahead), hit)
        start, after_hit = start + k + 1, hit


def _verified(record: Record, start: int, lookahead: int, after_hit: bool) -> Verified:
    """The draft's chain from `start`: the text while it agrees, then its own continuation."""
    rankings = list(record.rankings[start : start + lookahead + 1])
    for k in range(lookahead):
        if rankings[k].tokens[0] != record.chosen[start + k]:
            rankings[k + 1 :] = record.beyond[start + k][: lookahead - k]
            break
    speculation = tuple(ranking.tokens[0] for ranking in rankings[:lookahead])
    return Verified(speculation, rankings, record.temperature, after_hit)


@dataclass(frozen=True)
class Rate:
    """A part of a whole, with the error that follows from the spread over texts: rounds of a text are not independent.

    Attributes:
        value, error: the rate and its standard error; None of nothing.
        whole: what it is a part of, for example rounds.
    """

    value: float | None
    error: float | None
    whole: float

    @classmethod
    def over(cls, texts: Sequence[tuple[float, float]]) -> Rate:
        """Of (part, whole) of each text."""
        part, whole = sum(p for p, _ in texts), sum(w for _, w in texts)
        if not whole:
            return cls(None, None, 0.0)
        rate = part / whole
        return cls(rate, math.sqrt(sum((p - rate * w) ** 2 for p, w in texts)) / whole, whole)


def miss_rates(walks: Sequence[Sequence[WalkedRound]], fan_out: int) -> tuple[Rate, Rate]:
    """Miss rates after a hit and after a miss, had there been `fan_out` candidates at every position.

    The rounds do not depend on the fan-out: a miss is followed by the same chain, only later.
    """
    counted: list[list[tuple[float, float]]] = [[], []]
    for rounds in walks:
        missed, seen, after_hit = [0, 0], [0, 0], False
        for one in rounds:
            hit = one.rank < fan_out
            seen[after_hit] += 1
            missed[after_hit] += not hit
            after_hit = hit
        for side in (0, 1):
            counted[side].append((missed[side], seen[side]))
    return Rate.over(counted[1]), Rate.over(counted[0])


@dataclass(frozen=True)
class Expected:
    """Expected rounds of one text and how many of them hit: first those after a miss, then those after a hit."""

    hits: tuple[float, float]
    rounds: tuple[float, float]

    def misses(self, after_hit: bool) -> tuple[float, float]:
        """(misses, rounds); sums of chances may be a rounding error apart where all are hits."""
        return max(0.0, self.rounds[after_hit] - self.hits[after_hit]), self.rounds[after_hit]


def expect(rejection: Rejection, variants: Sequence[Variant], counts: Sequence[int]) -> Expected:
    """What rounds under coupling "rejection" come to.

    Args:
        variants: how the draft samples its token at positions 0..K-1 of a speculation.
        counts: F_0..F_K, candidates at each position: the likeliest by the draft's logits, without its own token.
    """
    lookahead = len(counts) - 1
    ranks = rejection.rank_R.tolist()
    accepted = [variant.accepted_R.tolist() for variant in variants]
    above = [variant.above_R.tolist() for variant in variants]
    reached = [[0.0, 0.0] for _ in range(len(ranks) + lookahead + 1)]  # chance that a round starts here, by what was
    reached[FIRST][0] = 1.0
    hits, rounds = [0.0, 0.0], [0.0, 0.0]
    for start in range(FIRST, len(ranks) - lookahead):
        for before in (0, 1):
            chance = reached[start][before]
            rounds[before] += chance
            for k in range(lookahead + 1):
                place = start + k
                if k < lookahead:
                    ends = chance * (1.0 - accepted[k][place])
                    found = 1.0 if ranks[place] < counts[k] else above[k][place] if ranks[place] == counts[k] else 0.0
                else:
                    ends = chance
                    found = float(ranks[place] < counts[k])
                hits[before] += ends * found
                reached[place + 1][1] += ends * found
                reached[place + 1][0] += ends * (1.0 - found)
                chance -= ends
    return Expected((hits[0], hits[1]), (rounds[0], rounds[1]))
