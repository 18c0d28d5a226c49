"""Verification under shared noise: accept while the draft's token equals the target's own.

Knows no tensors. Lossless because every emitted token is the target's own choice; a speculation only decides how many
of them one forward yields.
"""

from __future__ import annotations

from collections.abc import Sequence

from ssd_runtime.speculation.types import Outcome


def verify(chosen: Sequence[int], speculation: Sequence[int]) -> Outcome:
    """The outcome (k, t*) of verifying one speculation.

    Args:
        chosen: the target's own tokens after the bonus token and after each speculated one; len(speculation) + 1.
        speculation: the draft's tokens.
    """
    assert len(chosen) == len(speculation) + 1
    num_accepted = 0
    while num_accepted < len(speculation) and speculation[num_accepted] == chosen[num_accepted]:
        num_accepted += 1
    return Outcome(num_accepted, chosen[num_accepted])
