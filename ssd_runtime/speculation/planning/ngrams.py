"""N-grams: what followed the latest earlier occurrence of a text's end, and how often that came again.

Knows no ranks, no I/O.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Match:
    """What a text's own past proposes.

    Attributes:
        tokens: that followed; () without a match.
        suffix: length of the text's end that was there before; 0 without a match.
    """

    tokens: tuple[int, ...] = ()
    suffix: int = 0


def ngram_match_oracle(tokens: Sequence[int], count: int, longest: int = 4, shortest: int = 2) -> Match:
    """`NgramIndex.match` by definition: scan the text for the latest earlier occurrence of its own longest suffix."""
    for n in range(longest, shortest - 1, -1):
        suffix = tuple(tokens[-n:])
        for end in range(len(tokens) - 1, n - 1, -1):
            if len(suffix) == n and tuple(tokens[end - n : end]) == suffix:
                return Match(tuple(tokens[end : end + count]), n)
    return Match()


class NgramIndex:
    """Finds what followed the latest earlier occurrence of a sequence's longest suffix.

    Args:
        longest, shortest: lengths of suffix tried, the longest first.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def match(self, tokens: Sequence[int], count: int) -> Match:
        """Up to `count` tokens that followed. `tokens` only ever grows between calls."""
        # An n-gram is indexed once something follows it; the suffix itself must not match itself.
        for end in range(max(self._indexed, 1), len(tokens)):
            for n in self._sizes:
                if n <= end:
                    self._ends[tuple(tokens[end - n : end])] = end
        self._indexed = len(tokens)
        for n in self._sizes:
            followed = self._ends.get(tuple(tokens[-n:])) if n <= len(tokens) else None
            if followed is not None:
                return Match(tuple(tokens[followed : followed + count]), n)
        return Match()


class NgramRecord:
    """How often the tokens that matches proposed came, by length of suffix, with forgetting.

    A match need not be verified for that: the text that comes is the same either way. (Under rejection sampling a match
    is accepted with the probability with which its token is emitted.)

    Args:
        of_all: the record that stands for what was not seen here, and learns too.
        prior: the rate assumed before anything was seen; for a record without `of_all`. A little hopeful: where
            a text repeats itself there is more to gain than there is to lose where it does not.
        weight: how many tokens either of these counts for.
        memory: tokens after which an observation has lost half its weight.
    """

    def __init__(
        self, of_all: NgramRecord | None = None, prior: float = 0.6, weight: float = 8.0, memory: float = 64.0
    ) -> None:
        self._of_all, self._prior, self._weight = of_all, prior, weight
        self._keep = 0.5 ** (1.0 / memory)
        self._came: dict[int, float] = defaultdict(float)
        self._seen: dict[int, float] = defaultdict(float)
        self._expected: tuple[Match, int] | None = None

    def rate(self, suffix: int) -> float:
        """The chance that a token comes, if those before it did, of a match of a suffix of so many tokens."""
        prior = self._prior if self._of_all is None else self._of_all.rate(suffix)
        return (self._came[suffix] + self._weight * prior) / (self._seen[suffix] + self._weight)

    def expect(self, match: Match, place: int) -> None:
        """Have `learn` look what comes at this place of the text, unless it still expects another match."""
        if match.tokens and self._expected is None:
            self._expected = match, place

    def learn(self, tokens: Sequence[int]) -> None:
        """The text so far: learn whether the match came, once that is known."""
        if self._expected is None:
            return
        match, place = self._expected
        came = tokens[place : place + len(match.tokens)]
        pairs = zip(match.tokens, came, strict=False)
        agreed = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if agreed == len(match.tokens) or agreed < len(came):
            self._expected = None
            self.observe(match.suffix, agreed, failed=agreed < len(match.tokens))

    def observe(self, suffix: int, came: int, failed: bool) -> None:
        """Of a match of such a suffix so many tokens came, then another one than it said (`failed`) or its end."""
        for right in [True] * came + [False] * failed:
            self._came[suffix] = self._came[suffix] * self._keep + right
            self._seen[suffix] = self._seen[suffix] * self._keep + 1.0
        if self._of_all is not None:
            self._of_all.observe(suffix, came, failed)
