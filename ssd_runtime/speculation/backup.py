"""What speculates after a miss without the draft: an n-gram match; and how long the draft is worth waiting for.

Knows no ranks, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence


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


def worth_waiting(length: int, acceptance: float, token_seconds: float, round_seconds: float) -> bool:
    """Whether one more just-in-time draft token pays: does it raise the expected tokens per second of this round?

    A round with the speculation at hand yields E = 1 + a + ... + a^length tokens in `round_seconds`; the next token
    adds a^(length + 1) for `token_seconds` more (the marginal form of Theorem 7 of arXiv 2603.03251).

    Args:
        length: draft tokens there already.
        acceptance: a, the chance that a draft token is accepted.
        token_seconds: what the next draft token takes.
        round_seconds: what a round of this length takes: the verification, or the drafting where that is longer.
    """
    expected = sum(acceptance**k for k in range(length + 1))
    return acceptance ** (length + 1) * round_seconds * PATIENCE > expected * token_seconds
