"""Speculation by a draft rank, as the leader does it: SSD, and SD without pre-drafting.

Knows the protocol of a round and the speculation cache; knows no model of its own and no sockets.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Sequences
from typing import Literal, Protocol

from ssd_runtime.comm.messages import Admit, Finish, Message
from ssd_runtime.engine.sequence import Sequence
from ssd_runtime.engine.speculator import Proposals
from ssd_runtime.errors import PeerLost
from ssd_runtime.speculation.backup import worth_waiting
from ssd_runtime.speculation.cache import SpeculationCache
from ssd_runtime.speculation.estimates import AcceptanceEstimate
from ssd_runtime.speculation.types import Outcome, OutcomeFrame, OutcomeRow, Source, Speculation, TreeFrame

log = logging.getLogger(__name__)

Backup = Literal["draft", "ngram", "none"]


class DraftRank(Protocol):
    """The draft's rank as the leader reaches it: control messages, counted, and the link."""

    @property
    def control_seq(self) -> int: ...

    def send_control(self, message: Message) -> None: ...

    def send_outcomes(self, frame: OutcomeFrame) -> None: ...

    def poll_trees(self) -> list[TreeFrame]: ...

    def wait_trees(self, timeout_s: float) -> list[TreeFrame]: ...


class _Smoothed:
    """A moving average that starts with its first value."""

    def __init__(self, keep: float = 0.8) -> None:
        self._keep = keep
        self.value: float | None = None

    def observe(self, value: float) -> None:
        self.value = value if self.value is None else self._keep * self.value + (1 - self._keep) * value


class LinkSpeculator:
    """Speculations from a draft rank: local cache lookup, else the backup.

    Args:
        draft: the draft's rank.
        backup: what speculates after a miss (mode `sd` always asks the draft).
        vocab_size: of the target; a draft's token beyond it ends its branch.
        deadline: seconds after which a draft that was asked and did not answer counts as lost.

    Once the draft is lost the engine goes on without it: no token depends on it.
    """

    def __init__(self, draft: DraftRank, backup: Backup, vocab_size: int, deadline: float) -> None:
        self._draft = draft
        self._backup = backup
        self._vocab_size = vocab_size
        self._deadline = deadline
        self._cache = SpeculationCache()
        self._acceptance = AcceptanceEstimate()
        self._step_seconds = _Smoothed()
        self._token_seconds = _Smoothed()
        self._verify_seconds = _Smoothed()
        self._drafting_seconds = 0.0  # of all steps heard of since the last round
        self._steps: list[tuple[float, int]] = []
        self.lost: PeerLost | None = None

    # -- sequences -----------------------------------------------------------------------------------------------

    def admit(self, sequence: Sequence) -> None:
        request = sequence.request
        self._cache.admit(sequence.sequence_id)
        admit = Admit(
            sequence.sequence_id,
            request.prompt_tokens,
            request.params,
            request.mode,
            request.lookahead,
            sequence.max_tokens,
            end_tokens=request.eos_token_ids,
        )
        self._control(admit)

    def finish(self, sequence: Sequence) -> None:
        self._cache.finish(sequence.sequence_id)
        self._control(Finish(sequence.sequence_id))

    def _control(self, message: Message) -> None:
        """Tell the draft, and wake it with an empty frame: it may be waiting on the link."""

        def send() -> None:
            self._draft.send_control(message)
            self._draft.send_outcomes(OutcomeFrame(0, self._draft.control_seq, ()))

        self._with_draft(send)

    def _with_draft(self, act: Callable[[], None]) -> None:
        """Do something that needs the draft; if it is lost, say so once and go on without."""
        if self.lost is not None:
            return
        try:
            act()
        except PeerLost as lost:
            log.warning("%s; going on without a draft", lost)
            self.lost = lost

    def check(self) -> None:
        """Between requests: notice a draft that is gone."""
        self._with_draft(lambda: self._take_in(self._draft.poll_trees()))

    # -- rounds --------------------------------------------------------------------------------------------------

    def propose(self, batch: Sequences[Sequence], round: int) -> Proposals:
        self.check()
        found = [self._lookup(sequence) for sequence in batch]
        hits = [self._hit(sequence, tokens) for sequence, tokens in zip(batch, found, strict=True)]
        # A miss never holds up a hit: in SSD the batch waits only when nobody could go on at once.
        may_wait = self._backup == "draft" and True not in hits
        pending = [
            sequence
            for sequence, tokens in zip(batch, found, strict=True)
            if not tokens and sequence.most_speculated and (may_wait or sequence.request.mode == "sd")
        ]
        start = time.monotonic()
        if pending and self.lost is None:
            self._with_draft(lambda: self._wait_for(batch, pending, round))
            found = [self._lookup(sequence) for sequence in batch]
        waited = time.monotonic() - start if pending else 0.0
        speculations = [self._speculation(sequence, tokens) for sequence, tokens in zip(batch, found, strict=True)]
        rows = [self._row(sequence, speculation) for sequence, speculation in zip(batch, speculations, strict=True)]
        for sequence in batch:
            self._cache.advance(sequence.sequence_id, sequence.turn)
        self._with_draft(lambda: self._send(round, rows))
        steps, self._steps = self._steps, []
        self._drafting_seconds = sum(milliseconds for milliseconds, _ in steps) / 1e3
        return Proposals(tuple(speculations), tuple(hits), waited, tuple(steps))

    def observe(
        self,
        speculations: Sequences[Speculation],
        outcomes: Sequences[Outcome],
        verify_seconds: float,
    ) -> None:
        self._verify_seconds.observe(verify_seconds)
        if self._drafting_seconds:
            emitted = sum(outcome.num_accepted + 1 for outcome in outcomes) / len(outcomes)
            self._token_seconds.observe(self._drafting_seconds / emitted)
        for speculation, outcome in zip(speculations, outcomes, strict=True):
            self._acceptance.observe(outcome.num_accepted, len(speculation.tokens))

    def _lookup(self, sequence: Sequence) -> tuple[int, ...]:
        """As much of the branch for the sequence's last outcome as is there and may be used; () on a miss."""
        assert sequence.outcome is not None
        tokens = self._cache.lookup(sequence.sequence_id, sequence.turn - 1, sequence.outcome) or ()
        tokens = tokens[: sequence.most_speculated]
        usable = next((i for i, token in enumerate(tokens) if token >= self._vocab_size), len(tokens))
        return tokens[:usable]

    def _hit(self, sequence: Sequence, tokens: tuple[int, ...]) -> bool | None:
        """Whether the cache answered; None where it was not asked, as at the end of a sequence or in mode `sd`."""
        return None if sequence.request.mode == "sd" or not sequence.most_speculated else bool(tokens)

    def _wait_for(self, batch: Sequences[Sequence], pending: list[Sequence], round: int) -> None:
        """Tell the draft what is missed and wait for as much of each just-in-time branch as is worth waiting for."""
        self._send(round, [self._row(sequence, Speculation((), Source.PENDING)) for sequence in pending])
        give_up = time.monotonic() + self._deadline
        while any(not self._enough(sequence) for sequence in pending):
            remaining = give_up - time.monotonic()
            if remaining <= 0:
                raise PeerLost("draft", 1, round, f"no just-in-time branch within {self._deadline:g} s")
            self._take_in(self._draft.wait_trees(remaining))

    def _enough(self, sequence: Sequence) -> bool:
        length = len(self._lookup(sequence))
        if length >= sequence.most_speculated:
            return True
        step, token, verify = self._step_seconds.value, self._token_seconds.value, self._verify_seconds.value
        if sequence.request.mode == "sd" or step is None or token is None or verify is None:
            return False
        # Where drafting is the longer half, a round lasts from the outcome until the draft has got this far again.
        round_seconds = max(verify, step + length * token)
        return not worth_waiting(length, self._acceptance.rate, token, round_seconds)

    def _speculation(self, sequence: Sequence, tokens: tuple[int, ...]) -> Speculation:
        if tokens:
            return Speculation(tokens, Source.DRAFT)
        if self._backup == "ngram" or self.lost is not None:
            match = sequence.ngrams.match(sequence.tokens, sequence.most_speculated)
            if match:
                return Speculation(match, Source.NGRAM)
        return Speculation()

    def _row(self, sequence: Sequence, speculation: Speculation) -> OutcomeRow:
        assert sequence.outcome is not None
        told = speculation.tokens if speculation.source is Source.NGRAM else ()
        length = len(speculation.tokens)
        return OutcomeRow(sequence.sequence_id, sequence.turn, sequence.outcome, speculation.source, length, told)

    def _send(self, round: int, rows: list[OutcomeRow]) -> None:
        self._draft.send_outcomes(OutcomeFrame(round, self._draft.control_seq, tuple(rows)))

    def _take_in(self, trees: list[TreeFrame]) -> None:
        for tree in trees:
            self._cache.store(tree)
            if tree.step_us:
                self._step_seconds.observe(tree.step_us / 1e6)
                self._steps.append((tree.step_us / 1e3, tree.step_rows))
