"""Speculation by a draft rank, as the leader does it: SSD, and SD without pre-drafting.

Knows the protocol of a round and the speculation cache; knows no model of its own and no sockets.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Sequences
from typing import Literal

from ssd_runtime.engine.sequence import Sequence
from ssd_runtime.engine.speculator import Proposals
from ssd_runtime.leader.drafts import Drafts
from ssd_runtime.speculation.cache import SpeculationCache
from ssd_runtime.speculation.planning.cost_model import LEAST_SECONDS, CostModel, believable
from ssd_runtime.speculation.planning.planner import MeasuredRound, Planner, drafted_enough
from ssd_runtime.speculation.types import Outcome, OutcomeRow, Plan, Source, Speculation

Backup = Literal["draft", "ngram", "none"]
MOST_STEPS = 256  # told of one round
IDLE_SIGNS = 3  # of one draft that is waited for, in a row, none of which brings a token


class LinkSpeculator:
    """Speculations from draft ranks: local cache lookup, else the backup.

    Args:
        drafts: those at work. There may be none: the engine goes on without, and no token depends on it.
        backup: what speculates after a miss (mode `sd` always asks the draft).
        vocab_size: of the target; a draft's token beyond it ends its branch.
        costs: where the measurements go.
        planner: chooses K and B of mode `ssd` round by round.
    """

    def __init__(
        self,
        drafts: Drafts,
        backup: Backup,
        vocab_size: int,
        costs: CostModel,
        planner: Planner,
    ) -> None:
        self.drafts = drafts
        self._backup = backup
        self._vocab_size = vocab_size
        self._cache = SpeculationCache()
        self._costs = costs
        self._planner = planner
        self._plan: Plan | None = None  # of the round in hand
        self._proposed: Proposals | None = None
        self._propose_seconds = 0.0
        self._steps: deque[tuple[float, int]] = deque(maxlen=MOST_STEPS)
        self._changes = 0  # among the drafts, as of what was learned

    # -- sequences -----------------------------------------------------------------------------------------------

    def admit(self, sequences: Sequences[Sequence]) -> None:
        for sequence in sequences:
            self._cache.admit(sequence.sequence_id)
        self.drafts.admit(sequences)

    def finish(self, sequence: Sequence) -> None:
        self._cache.finish(sequence.sequence_id)
        self.drafts.finish(sequence)

    def check(self) -> None:
        """Between rounds and between requests: let in drafts that have come, notice those that are gone."""
        self.drafts.check()
        self._take_in()
        if self._changes != self.drafts.changes:  # what a draft has taught does not outlive its link
            self._changes = self.drafts.changes
            self._costs.forget_drafts()
            self._planner.forget()

    # -- rounds --------------------------------------------------------------------------------------------------

    def propose(self, batch: Sequences[Sequence], round: int) -> Proposals:
        start = time.monotonic()
        self.drafts.settle()
        self.check()
        self._plan = self._planner.plan(len(batch)) if batch[0].request.mode == "ssd" else None
        found = [self._lookup(sequence) for sequence in batch]
        hits = [self._hit(sequence, tokens) for sequence, tokens in zip(batch, found, strict=True)]
        waiting = time.monotonic()
        missed = [sequence for sequence, hit in zip(batch, hits, strict=True) if hit is False]
        pending = self._pending(batch, missed, may_wait=True not in hits)
        if pending:
            self._wait_for(pending, round)
            found = [self._lookup(sequence) for sequence in batch]
        waited = time.monotonic() - waiting if pending else 0.0
        speculations = [self._speculation(sequence, tokens) for sequence, tokens in zip(batch, found, strict=True)]
        rows = [self._row(sequence, speculation) for sequence, speculation in zip(batch, speculations, strict=True)]
        for sequence in batch:
            self._cache.advance(sequence.sequence_id, sequence.turn)
        self.drafts.tell(round, rows, self._plan)
        self._proposed = Proposals(tuple(speculations), tuple(hits), waited, tuple(self._steps))
        self._steps.clear()
        self._propose_seconds = time.monotonic() - start
        return self._proposed

    def _pending(self, batch: Sequences[Sequence], missed: list[Sequence], may_wait: bool) -> list[Sequence]:
        """Who waits for the draft. A miss never holds up a hit: in SSD only where nobody could go on at once."""
        if batch[0].request.mode == "sd":
            waiting = [sequence for sequence in batch if self._most(sequence)]
        else:
            waiting = missed if may_wait and self._backup == "draft" else []
        return [sequence for sequence in waiting if self.drafts.draft_for(sequence.sequence_id)]

    def observe(
        self,
        speculations: Sequences[Speculation],
        outcomes: Sequences[Outcome],
        verify_seconds: float,
    ) -> None:
        self._costs.verified(speculations, outcomes, verify_seconds, max(1, self.drafts.count))
        if self._plan is not None and self._proposed is not None:
            hits = self._proposed.hits
            tokens = sum(outcome.num_accepted + 1 for outcome in outcomes)
            seconds = self._propose_seconds + verify_seconds
            asked = sum(hit is not None for hit in hits)
            self._planner.observe(
                MeasuredRound(len(outcomes), tokens, seconds, sum(hit is True for hit in hits), asked)
            )

    def _most(self, sequence: Sequence) -> int:
        """The longest speculation that is asked for in this round: by n-grams, or of the draft just in time."""
        most = sequence.most_speculated
        return most if self._plan is None else min(most, self._plan.lookahead)

    def _lookup(self, sequence: Sequence) -> tuple[int, ...]:
        """As much of the branch for the sequence's last outcome as is there and may be used; () on a miss.

        A plan says what is drafted next and takes back nothing that has been: it may rest on times and numbers that
        depend on these very tokens, and whether a token is offered must not (noise.py).
        """
        tokens = self._branch(sequence)
        usable = next((i for i, token in enumerate(tokens) if not 0 <= token < self._vocab_size), len(tokens))
        return tokens[:usable]

    def _branch(self, sequence: Sequence) -> tuple[int, ...]:
        """The same, with whatever a draft of a larger table says behind a token that the target has not."""
        assert sequence.outcome is not None
        tokens = self._cache.lookup(sequence.sequence_id, sequence.turn - 1, sequence.outcome) or ()
        return tokens[: sequence.most_speculated]

    def _hit(self, sequence: Sequence, tokens: tuple[int, ...]) -> bool | None:
        """Whether the cache answered; None where it was not asked, as at the end of a sequence or in mode `sd`."""
        asked = bool(tokens) or self._most(sequence) > 0
        return None if sequence.request.mode == "sd" or not asked else bool(tokens)

    def _wait_for(self, pending: list[Sequence], round: int) -> None:
        """Tell the drafts what is missed and wait for as much of each just-in-time branch as is worth waiting for.

        Whoever speaks without drafting any of it is not waited for: it computes a prompt, or is no draft.
        """
        rows = [self._row(sequence, Speculation((), Source.PENDING)) for sequence in pending]
        self.drafts.tell(round, rows, self._plan)
        drafted, idle = 0, 0
        while lacking := self._lacking(pending):
            before, drafted = drafted, sum(len(self._branch(sequence)) for sequence in pending)
            idle = 0 if drafted > before else idle + 1
            if idle > IDLE_SIGNS * self.drafts.count or not self.drafts.wait(lacking):
                return
            self._take_in()

    def _lacking(self, pending: list[Sequence]) -> list[int]:
        """The sequences whose branches may still grow; none if it is not worth waiting for that."""
        answered = [sequence for sequence in pending if self.drafts.answer_for(sequence.sequence_id)]
        # By what has come, usable or not: waiting makes no branch usable.
        lengths, most = [len(self._branch(sequence)) for sequence in answered], [self._most(one) for one in answered]
        if pending[0].request.mode == "ssd" and drafted_enough(self._costs, lengths, most):
            return []
        return [
            sequence.sequence_id
            for sequence, length, limit in zip(answered, lengths, most, strict=True)
            if length < limit
        ]

    def _speculation(self, sequence: Sequence, tokens: tuple[int, ...]) -> Speculation:
        if tokens:
            assert sequence.outcome is not None
            proposals = self._cache.proposals(sequence.sequence_id, sequence.turn - 1, sequence.outcome)
            return Speculation(tokens, Source.DRAFT, proposals[: len(tokens)])
        if self._backup == "ngram" or not self.drafts.draft_for(sequence.sequence_id):
            match = sequence.ngrams.match(sequence.tokens, self._most(sequence))
            if match:
                return Speculation(match, Source.NGRAM)
        return Speculation()

    def _row(self, sequence: Sequence, speculation: Speculation) -> OutcomeRow:
        assert sequence.outcome is not None
        length, tokens = len(speculation.tokens), speculation.tokens
        return OutcomeRow(sequence.sequence_id, sequence.turn, sequence.outcome, speculation.source, length, tokens)

    def _take_in(self) -> None:
        for tree in self.drafts.take_trees():
            self._cache.store(tree)
            if tree.step_us:
                # Who takes longer than the deadline is lost.
                seconds = believable(tree.step_us / 1e6, LEAST_SECONDS, self.drafts.deadline)
                self._costs.drafted(seconds, tree.step_rows)
                self._steps.append((seconds * 1e3, tree.step_rows))
