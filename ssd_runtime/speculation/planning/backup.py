"""What speculates after a miss: the draft, as long as a wait pays, or an n-gram match. Knows no ranks, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

from ssd_runtime.speculation.planning.cost_model import CostModel, expected_tokens

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


def drafted_enough(costs: CostModel, lengths: Sequence[int], most: Sequence[int]) -> bool:
    """Whether the branches that are waited for do as they are, or have all the tokens they may have.

    Args:
        lengths: of the branch of each sequence that waits, as it is now.
        most: the longest speculation of each.
    """
    open_lengths = [length for length, limit in zip(lengths, most, strict=True) if length < limit]
    if not open_lengths:
        return True
    step, token, verify = costs.step_seconds.value, costs.token_seconds.value, costs.verify_seconds.value
    if step is None or token is None or verify is None:
        return False
    # Where drafting is the longer half, a round lasts from the outcome until the draft has got this far again.
    round_seconds = max(verify, step + min(open_lengths) * token)
    acceptance = costs.acceptance.rate
    added = sum(acceptance ** (length + 1) for length in open_lengths)
    expected = sum(expected_tokens(length, acceptance) for length in lengths)
    return not waiting_pays(added, expected, token, round_seconds)


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
