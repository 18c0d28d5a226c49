"""The draft in the target's process, as a speculator of the engine: it drafts between verifications. Knows no link."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from collections.abc import Sequence as Sequences

from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.engine.sequence import Sequence
from ssd_runtime.engine.speculator import Proposals, admission
from ssd_runtime.errors import DeviceFault
from ssd_runtime.speculation.types import Outcome, OutcomeFrame, OutcomeRow, Source, Speculation

log = logging.getLogger(__name__)


class ColocatedSpeculator:
    """Speculative decoding on one device.

    Args:
        drafter: the model and its trees.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter

    def admit(self, sequences: Sequences[Sequence]) -> None:
        with self._going_on_without():
            for sequence in sequences:
                self._drafter.admit(admission(sequence, "sd"))

    def finish(self, sequence: Sequence) -> None:
        with self._going_on_without():
            self._drafter.finish(sequence.sequence_id)

    @contextlib.contextmanager
    def _going_on_without(self) -> Iterator[None]:
        """No token depends on the draft: if it fails, it forgets its sequences, and these are decoded without it."""
        try:
            yield
        except DeviceFault:  # of the device, which the target is on too
            raise
        except Exception:
            log.exception("the draft failed; %d sequences go on without it", self._drafter.num_sequences)
            self._drafter.reset()

    def observe(
        self, speculations: Sequences[Speculation], outcomes: Sequences[Outcome], verify_seconds: float
    ) -> None:
        pass

    def propose(self, batch: Sequences[Sequence], round: int) -> Proposals:
        start = time.monotonic()
        steps: list[tuple[float, int]] = []
        speculations = [Speculation()] * len(batch)
        with self._going_on_without():
            speculations = self._speculate(batch, round, steps)
        return Proposals(tuple(speculations), (None,) * len(batch), time.monotonic() - start, tuple(steps))

    def _speculate(self, batch: Sequences[Sequence], round: int, steps: list[tuple[float, int]]) -> list[Speculation]:
        """What the draft proposes; its steps are added to `steps`."""
        asked = [_outcome_row(sequence, Source.PENDING, 0) for sequence in batch]
        self._drafter.advance(OutcomeFrame(round, 0, tuple(asked)))
        while (step := self._drafter.grow()) is not None:
            steps.append(((step.end_ns - step.start_ns) / 1e6, step.rows))
        drafted = {branch.sequence_id: branch for branch in self._drafter.tree().branches}
        speculations = []
        for sequence in batch:
            branch, most = drafted.get(sequence.sequence_id), sequence.most_speculated
            if branch is None or not most:
                speculations.append(Speculation())
            else:
                speculations.append(Speculation(branch.tokens[:most], Source.DRAFT, branch.proposals[:most]))
        verified = [
            _outcome_row(sequence, speculation.source, len(speculation.tokens))
            for sequence, speculation in zip(batch, speculations, strict=True)
        ]
        self._drafter.advance(OutcomeFrame(round, 0, tuple(verified)))
        return speculations


def _outcome_row(sequence: Sequence, source: Source, length: int) -> OutcomeRow:
    assert sequence.outcome is not None
    return OutcomeRow(sequence.sequence_id, sequence.turn, sequence.outcome, source, length)
