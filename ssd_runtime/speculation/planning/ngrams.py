"""N-grams: what followed the latest earlier occurrence of a text's end. Knows no ranks, no I/O."""

from __future__ import annotations

from collections.abc import Sequence


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
        """Up to `count` tokens that followed; () without a match. `tokens` only ever grows between calls."""
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
