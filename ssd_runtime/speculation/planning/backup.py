"""What speculates after a miss: the draft just in time, an n-gram match or nothing; and how long a wait is worth it.

Knows no ranks, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssd_runtime.speculation.planning.cost_model import CostModel, expected_tokens
from ssd_runtime.speculation.types import Source

# A verification that could be spared also spares the draft: on one machine they share the memory's bandwidth. With
# equal expected speed the longer speculation was measurably the faster one, hence a tenth in favour of waiting.
PATIENCE = 1.1


def waiting_pays(added: float, expected: float, token_seconds: float, round_seconds: float) -> bool:
    """Whether one more just-in-time draft token raises the expected tokens per second of this round.

    A round with the speculations at hand yields `expected` tokens in `round_seconds`; one more token each for those
    that wait adds `added` for `token_seconds` more (the marginal form of Theorem 7 of arXiv 2603.03251; over a batch,
    everybody's tokens come later by that time).
    """
    return added * round_seconds * PATIENCE > expected * token_seconds


class JustInTime:
    """Who waits for the draft after a miss, and for how long.

    Args:
        costs: what was measured.
    """

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs

    def enough(self, lengths: Sequence[int], most: Sequence[int]) -> bool:
        """Whether the branches at hand do, or have all the tokens they may have.

        Args:
            lengths: of the branch of each sequence that waits, as it is now.
            most: the longest speculation of each.
        """
        open_lengths = [length for length, limit in zip(lengths, most, strict=True) if length < limit]
        if not open_lengths:
            return True
        costs, acceptance = self._costs, self._costs.acceptance[Source.DRAFT].rate
        step, token, verify = costs.step_seconds.value, costs.token_seconds.value, costs.verify_seconds.value
        if step is None or token is None or verify is None:
            return False
        # Where drafting is the longer half, a round lasts from the outcome until the draft has got this far again.
        round_seconds = max(verify, step + min(open_lengths) * token)
        added = sum(acceptance ** (length + 1) for length in open_lengths)
        expected = sum(expected_tokens(length, acceptance) for length in lengths)
        return not waiting_pays(added, expected, token, round_seconds)


@dataclass(frozen=True)
class Missed:
    """A sequence after a miss.

    Attributes:
        ngram, ngram_rate: length of its n-gram match, 0 without one; the chance that each of its tokens is right.
        draft: the most tokens that can be waited for; 0 where nobody may wait or could answer.
    """

    ngram: int
    ngram_rate: float
    draft: int


@dataclass(frozen=True)
class BackupChoice:
    """What becomes of a sequence after a miss.

    Attributes:
        waits: whether the draft is waited for.
        ngram: how many tokens of its match are verified where no draft has answered; 0 for none.
    """

    waits: bool
    ngram: int


class AutoBackup:
    """The backup `auto`: draft, n-gram or none, for each missed sequence.

    Time has a price: the tokens a second that this engine has had from its rounds, hits and all. A choice is worth the
    tokens it promises less the price of the seconds it takes, of waiting and of the verification's further rows (the
    best long-run average is where every choice is the best at the price of that average; Charnov's marginal value
    theorem). That a miss's own round is slow is no reason to make it slower: what comes after it is fast.

    Args:
        costs: what was measured.
    """

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs

    def choose(self, missed: Sequence[Missed], sequences: int) -> list[BackupChoice]:
        """Of all sequences that missed, in a batch of so many.

        All that wait, wait together: for every number of drafted tokens each takes what is worth more, and the number
        with the greatest sum less the price of the wait is chosen.
        """
        costs = self._costs
        if not costs.verification.known or not costs.step.known or costs.rate is None:
            return [BackupChoice(False, one.ngram) for one in missed]
        second = sequences * costs.rate
        row = second * costs.verification.slope
        acceptance = costs.acceptance[Source.DRAFT].rate
        ngrams = [_worth(one.ngram, one.ngram_rate, row) for one in missed]
        best, chosen = sum(worth for worth, _ in ngrams), [False] * len(missed)
        step = costs.step.at(len(missed))
        further = step * min(1.0, costs.steps_per_token.value or 1.0)
        for drafted in range(1, max((one.draft for one in missed), default=0) + 1):
            waits = costs.unfinished_seconds + step + (drafted - 1) * further
            drafts = [_worth(min(drafted, one.draft), acceptance, row)[0] for one in missed]
            total = sum(max(own[0], draft) for own, draft in zip(ngrams, drafts, strict=True)) - second * waits
            if total > best:
                best, chosen = total, [draft > own[0] for own, draft in zip(ngrams, drafts, strict=True)]
        return [BackupChoice(waits, length) for waits, (_, length) in zip(chosen, ngrams, strict=True)]


def _worth(length: int, rate: float, row: float) -> tuple[float, int]:
    """What up to `length` speculated tokens promise less the price of their rows, and how many of them pay."""
    best, tokens = (0.0, 0), 0.0
    for count in range(1, length + 1):
        tokens += rate**count
        best = max(best, (tokens - count * row, count), key=lambda one: one[0])
    return best
