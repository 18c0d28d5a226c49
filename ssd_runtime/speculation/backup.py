"""What speculates after a miss: an n-gram match, or the draft just in time; and how long it is worth waiting for.

Knows no ranks, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence

from ssd_runtime.speculation.pace import Pace, expected_tokens
from ssd_runtime.speculation.types import Source


def ngram_match_oracle(tokens: Sequence[int], count: int, longest: int = 4, shortest: int = 2) -> tuple[int, ...]:
    """`NgramIndex.match` by definition: scan the text for the latest earlier occurrence of its own longest suffix."""
    for n in range(longest, shortest - 1, -1):
        suffix = tuple(tokens[-n:])
        for end in range(len(tokens) - 1, n - 1, -1):
            if len(suffix) == n and tuple(tokens[end - n : end]) == suffix:
                return tuple(tokens[end : end + count])
    return ()


class NgramIndex:
    """Finds what followed the latest earlier occurrence of a sequence's longest suffix.

    Args:
        longest, shortest: lengths of suffix tried, the longest first.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def match(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """Up to `count` tokens that followed the match, or () without one. `tokens` only ever grows between calls."""
        # An n-gram is indexed once something follows it; the suffix itself must not match itself.
        for end in range(max(self._indexed, 1), len(tokens)):
            for n in self._sizes:
                if n <= end:
                    self._ends[tuple(tokens[end - n : end])] = end
        self._indexed = len(tokens)
        for n in self._sizes:
            followed = self._ends.get(tuple(tokens[-n:])) if n <= len(tokens) else None
            if followed is not None:
                return tuple(tokens[followed : followed + count])
        return ()


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
        pace: what was measured.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def enough(self, lengths: Sequence[int], most: Sequence[int]) -> bool:
        """Whether the branches at hand do, or have all the tokens they may have.

        Args:
            lengths: of the branch of each sequence that waits, as it is now.
            most: the longest speculation of each.
        """
        open_lengths = [length for length, limit in zip(lengths, most, strict=True) if length < limit]
        if not open_lengths:
            return True
        pace, acceptance = self._pace, self._pace.acceptance[Source.DRAFT].rate
        step, token, verify = pace.step_seconds.value, pace.token_seconds.value, pace.verify_seconds.value
        if step is None or token is None or verify is None:
            return False
        # Where drafting is the longer half, a round lasts from the outcome until the draft has got this far again.
        round_seconds = max(verify, step + min(open_lengths) * token)
        added = sum(acceptance ** (length + 1) for length in open_lengths)
        expected = sum(expected_tokens(length, acceptance) for length in lengths)
        return not waiting_pays(added, expected, token, round_seconds)

    def prefer_ngrams(self, matches: Sequence[int], most: Sequence[int]) -> list[bool]:
        """Backup `auto`: for each missed sequence, whether its n-gram is verified rather than the draft waited for.

        All that wait, wait together: for every number of drafted tokens, each sequence takes what promises more, and
        the number with the most tokens per second wins (Theorem 7 with T_b measured; with many sequences the draft's
        steps grow longer while n-grams stay free, which is Theorem 17's crossover).

        Args:
            matches: length of the n-gram match of each sequence, 0 without one.
            most: the longest speculation of each.
        """
        pace = self._pace
        verify, step = pace.verify_seconds.value, pace.step_seconds.value
        if verify is None or step is None:
            return [False] * len(matches)
        draft, ngram = (pace.acceptance[source].rate for source in (Source.DRAFT, Source.NGRAM))
        per_token = pace.token_seconds.value or step
        step = pace.step.at(len(matches)) if pace.step.known else step
        found = [expected_tokens(length, ngram) for length in matches]
        best_rate, chosen = sum(found) / verify, [True] * len(matches)  # nobody waits
        for drafted in range(1, max(most, default=0) + 1):
            just_in_time = [expected_tokens(min(drafted, limit), draft) for limit in most]
            tokens = sum(map(max, found, just_in_time))
            rate = tokens / (verify + step + (drafted - 1) * min(step, per_token))
            if rate > best_rate:
                best_rate = rate
                chosen = [own >= awaited for own, awaited in zip(found, just_in_time, strict=True)]
        return chosen
