"""Where speculations come from, as the engine sees it; and the speculator of plain decoding, which has none."""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from typing import Protocol

from ssd_runtime.comm.control.draft_messages import Admit
from ssd_runtime.config import Mode
from ssd_runtime.engine.sequence import Sequence
from ssd_runtime.speculation.types import Outcome, Speculation


@dataclass(frozen=True)
class Proposals:
    """What is verified next, one entry a sequence of the batch.

    Attributes:
        hits: True from the speculation cache, False after a miss, None where no cache was asked.
        wait_seconds: how long the target waited for drafting.
        draft_steps: (milliseconds, rows) of each drafting step heard of since the last round.
    """

    speculations: tuple[Speculation, ...]
    hits: tuple[bool | None, ...]
    wait_seconds: float = 0.0
    draft_steps: tuple[tuple[float, int], ...] = ()


def admission(sequence: Sequence, mode: Mode) -> Admit:
    """What a draft is told of a sequence so that it can draft for it, from its beginning or from wherever it is now."""
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


class Speculator(Protocol):
    """One way to speculate."""

    def admit(self, sequences: Sequences[Sequence]) -> None:
        """Sequences begin; their prompts are about to be computed."""

    def propose(self, batch: Sequences[Sequence], round: int) -> Proposals:
        """Speculations for the verification that starts when this returns."""

    def observe(
        self, speculations: Sequences[Speculation], outcomes: Sequences[Outcome], verify_seconds: float
    ) -> None:
        """What became of the last proposals."""

    def finish(self, sequence: Sequence) -> None:
        """A sequence is over."""


class NoSpeculation:
    """Autoregressive decoding: the same path with empty speculations."""

    def admit(self, sequences: Sequences[Sequence]) -> None:
        pass

    def propose(self, batch: Sequences[Sequence], round: int) -> Proposals:
        return Proposals((Speculation(),) * len(batch), (None,) * len(batch))

    def observe(
        self, speculations: Sequences[Speculation], outcomes: Sequences[Outcome], verify_seconds: float
    ) -> None:
        pass

    def finish(self, sequence: Sequence) -> None:
        pass
