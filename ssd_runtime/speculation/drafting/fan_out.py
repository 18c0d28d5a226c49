"""Which outcomes of a verification to prepare for. Knows rankings, not models.

A policy names the outcomes (k, t*) it would draft for, each with the gain it expects of it; the budget goes to the most
gainful ones over all sequences of the batch. The policies: counts.py and confidence.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ssd_runtime.speculation.sampling.ranking import Ranking

UNKNOWN = -1  # a candidate at a position that is not ranked yet: its place is kept, nothing is drafted


class Fork(NamedTuple):
    """One outcome to draft for.

    Attributes:
        position: k, the draft tokens accepted.
        token: t*, the bonus candidate; UNKNOWN keeps the place of one.
        gain: what it is worth, comparable between the sequences of a policy. Above 0 it is a chance.
    """

    position: int
    token: int
    gain: float


@dataclass(frozen=True)
class Verified:
    """What is being verified now, as the draft sees it.

    Attributes:
        speculation: the draft tokens.
        rankings: what the draft expects after 0, 1, ... of them, one more than tokens; None: not known yet.
        temperature: of the request.
        after_hit: whether the speculation was there in time, drafted ahead.
    """

    speculation: Sequence[int]
    rankings: Sequence[Ranking | None]
    temperature: float = 0.0
    after_hit: bool = True

    def token(self, k: int) -> int | None:
        """The draft token at position k; None behind the last one, where the target chooses freely."""
        return self.speculation[k] if k < len(self.speculation) else None

    def candidates(self, k: int) -> list[int]:
        """Bonus candidates at position k, the likeliest first, without the token that the speculation has there."""
        ranking = self.rankings[k]
        assert ranking is not None
        if k == len(self.speculation):
            return list(ranking.tokens)
        return [token for token in ranking.tokens if token != self.speculation[k]]


class FanOut(Protocol):
    """A policy."""

    def forks(self, verified: Verified, budget: int, allowed: int | None = None) -> list[Fork]:
        """At most `budget` outcomes to draft for, the most gainful first; none that the speculation itself denies.

        Args:
            budget: what may be spent here, by all drafts of the sequence together; in a batch, that of all sequences.
            allowed: B of this sequence alone, by all its drafts together; `budget` if not given.
        """

    def observe(self, verified: Verified, num_accepted: int, bonus_token: int) -> None:
        """Learn from the outcome of the verification."""


def divide_budget(wanted: Sequence[Sequence[Fork]], budget: int) -> list[list[Fork]]:
    """The `budget` most gainful forks over all sequences; what is only a kept place is left out of the result.

    Args:
        wanted: the forks of each sequence, the most gainful first.
    """
    ordered = sorted(
        ((fork, owner) for owner, forks in enumerate(wanted) for fork in forks),
        key=lambda item: (-item[0].gain, -item[0].position),
    )
    divided: list[list[Fork]] = [[] for _ in wanted]
    for fork, owner in ordered[: max(0, budget)]:
        if fork.token != UNKNOWN:
            divided[owner].append(fork)
    return divided
