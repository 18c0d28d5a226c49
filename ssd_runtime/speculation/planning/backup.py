"""How long a wait for the draft is worth it after a miss.

Knows no ranks, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence

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
