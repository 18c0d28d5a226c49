"""Speculative decoding on one device: the draft runs in the target's process. Knows no link."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from collections.abc import Sequence as Sequences
from typing import Protocol

from ssd_runtime.comm.messages_draft import Admit
from ssd_runtime.engine.sequence import Sequence
from ssd_runtime.engine.speculator import Proposals
from ssd_runtime.speculation.types import Outcome, OutcomeFrame, OutcomeRow, Source, Speculation, TreeFrame
from ssd_runtime.target.admission import admission


class ColocatedSpeculator:
    """Speculative decoding on one device: the draft runs in the target's process, between verifications.

    Args:
        load: makes the draft (draft/drafter.py), called when the first sequence comes: an engine with a draft rank
            holds a second copy of the draft only if it is asked for one.
    """

    def __init__(self, load: Callable[[], LocalDrafter]) -> None:
        self._load = load

    @functools.cached_property
    def _drafter(self) -> LocalDrafter:
        return self._load()

    def admit(self, sequences: Sequences[Sequence]) -> None:
        for sequence in sequences:
            self._drafter.admit(admission(sequence, "sd"))

    def finish(self, sequence: Sequence) -> None:
        self._drafter.finish(sequence.sequence_id)

    def observe(
        self, speculations: Sequences[Speculation], outcomes: Sequences[Outcome], verify_seconds: float
    ) -> None:
        pass

    def propose(self, batch: Sequences[Sequence], round: int) -> Proposals:
        start = time.monotonic()
        asked = [_outcome_row(sequence, Source.PENDING, 0) for sequence in batch]
        self._drafter.advance(OutcomeFrame(round, 0, tuple(asked)))
        steps: list[tuple[float, int]] = []
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
        return Proposals(tuple(speculations), (None,) * len(batch), time.monotonic() - start, tuple(steps))


class LocalDrafter(Protocol):
    """What a draft in this process offers; shapes and errors in draft/drafter.py."""

    def admit(self, request: Admit) -> None: ...

    def finish(self, sequence_id: int) -> None: ...

    def advance(self, frame: OutcomeFrame) -> bool: ...

    def grow(self) -> LocalStep | None: ...

    def tree(self) -> TreeFrame: ...


class LocalStep(Protocol):
    """One forward of the draft."""

    @property
    def start_ns(self) -> int: ...

    @property
    def end_ns(self) -> int: ...

    @property
    def rows(self) -> int: ...


def _outcome_row(sequence: Sequence, source: Source, length: int) -> OutcomeRow:
    assert sequence.outcome is not None
    return OutcomeRow(sequence.sequence_id, sequence.turn, sequence.outcome, source, length)
