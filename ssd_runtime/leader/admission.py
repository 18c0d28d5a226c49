"""What a draft is told of a sequence so that it can draft for it: from its beginning, or from wherever it is now."""

from __future__ import annotations

from ssd_runtime.comm.control.draft_messages import Admit
from ssd_runtime.config import Mode
from ssd_runtime.engine.sequence import Sequence


def admission(sequence: Sequence, mode: Mode) -> Admit:
    """The `Admit` of a sequence between two rounds."""
    request = sequence.request
    return Admit(
        sequence.sequence_id,
        request.prompt_tokens,
        request.params,
        mode,
        request.lookahead,
        sequence.max_tokens,
        end_tokens=request.eos_token_ids,
        output_tokens=tuple(sequence.tokens[sequence.num_prompt :]),
        turn=sequence.turn,
        outcome=sequence.outcome,
    )
