"""Recycled candidates: what followed a token, or a pair of tokens, earlier in the same sequence. Knows no tree.

A drafting step costs little more with a few extra rows, so the draft bets on its own next choice: it forwards the
likeliest successors of the token whose successor it is just computing. If the bet holds, one step drafts two tokens.
A table of adjacent tokens made of discarded candidates is the idea of Luo et al., "Turning Trash into Treasure:
Accelerating Inference of Large Language Models with Token Recycling" (arXiv 2408.08696); here it feeds the draft
instead of the target, so it never costs the target a row.
"""

from __future__ import annotations

from collections.abc import Sequence

KEPT = 4  # followers remembered of one key


class Recycler:
    """The followers seen in one sequence.

    Args:
        text: tokens to learn from at once: the prompt.
    """

    def __init__(self, text: Sequence[int] = ()) -> None:
        self._of_pair: dict[tuple[int, int], tuple[int, ...]] = {}
        self._of_token: dict[int, tuple[int, ...]] = {}
        self.learn_text(text)

    def learn_text(self, tokens: Sequence[int]) -> None:
        """Learn every follower in a text."""
        for index in range(1, len(tokens)):
            self.learn(tokens[index - 2] if index > 1 else None, tokens[index - 1], tokens[index : index + 1])

    def learn(self, previous: int | None, token: int, followers: Sequence[int]) -> None:
        """`followers` may follow `token`, best first; they come before what was known.

        Args:
            previous: the token before `token`; None at the beginning.
        """
        self._of_token[token] = _before(followers, self._of_token.get(token, ()))
        if previous is not None:
            self._of_pair[previous, token] = _before(followers, self._of_pair.get((previous, token), ()))

    def guess(self, previous: int | None, token: int, count: int) -> tuple[int, ...]:
        """Up to `count` likely followers: of the pair first, then of the token."""
        of_pair = self._of_pair.get((previous, token), ()) if previous is not None else ()
        return _before(of_pair, self._of_token.get(token, ()))[:count]


def _before(fresh: Sequence[int], known: Sequence[int]) -> tuple[int, ...]:
    """`fresh`, then what of `known` is not in it; no more than KEPT."""
    return tuple(dict.fromkeys((*fresh, *known)))[:KEPT]
