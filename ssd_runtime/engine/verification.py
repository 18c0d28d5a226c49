"""What one forward of a verification has to yield, and the outcomes it decides. Knows no model and no schedule.

Most verifications want nothing of the logits but the tokens that are chosen from them, and a target that is spread over
ranks need not bring these logits together.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequences

from torch import Tensor

from ssd_runtime.config import Coupling
from ssd_runtime.engine.sequence import Sequence
from ssd_runtime.speculation.sampling.choice import Choice
from ssd_runtime.speculation.types import Outcome, Speculation
from ssd_runtime.speculation.verify import Claim, verify_by_tokens, verify_claims


def verified(
    coupling: Coupling,
    batch: Sequences[Sequence],
    speculations: Sequences[Speculation],
    forward: Callable[[], Tensor],
    choose: Callable[[Sequences[Choice]], list[int]],
) -> tuple[list[Outcome], Tensor | None]:
    """The outcome of each sequence, and the logits of all rows if anything but the target's own tokens was wanted.

    Args:
        forward, choose: run the same forward, and give its logits or only the tokens chosen at its rows.
    """
    claims = [
        _claim(coupling, sequence, speculation) for sequence, speculation in zip(batch, speculations, strict=True)
    ]
    logprobs = any(sequence.request.logprobs is not None for sequence in batch)
    if not logprobs and all(claim.is_settled_by_tokens(coupling) for claim in claims):
        return verify_by_tokens(choose([claim.choice for claim in claims]), claims), None
    logits_RV = forward()
    return verify_claims(coupling, logits_RV, claims), logits_RV


def _claim(coupling: Coupling, sequence: Sequence, speculation: Speculation) -> Claim:
    text = sequence.text_hash() if coupling == "rejection" else 0
    return Claim(sequence.request.params, len(sequence.tokens), speculation, text, sequence.processors)
