"""The drafts at work for the leader: told of sequences and outcomes, heard, waited for, lost and let in again.

Owns who is there and what each has been told. Knows the protocol of a link; does not know what is worth speculating.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from ssd_runtime.comm.messages import Finish, Message, Share
from ssd_runtime.engine.sequence import Sequence
from ssd_runtime.errors import PeerLost
from ssd_runtime.speculation.types import OutcomeFrame, OutcomeRow, Plan, Source, TreeFrame
from ssd_runtime.target.admission import admission
from ssd_runtime.target.patience import Patience

log = logging.getLogger(__name__)

TURN_S = 0.0005  # how long each of several drafts is waited for in turn
PULSE_S = 0.5  # between two looks at the control connections of the drafts


class DraftRank(Protocol):
    """A draft's rank as the leader reaches it: control messages, counted, and the link. Calls raise PeerLost."""

    @property
    def rank(self) -> int: ...

    @property
    def control_seq(self) -> int: ...

    def send_control(self, message: Message) -> None: ...

    def send_outcomes(self, frame: OutcomeFrame) -> None: ...

    def poll_trees(self) -> list[TreeFrame]: ...

    def wait_trees(self, timeout_s: float) -> list[TreeFrame]: ...

    def check_pulse(self) -> None:
        """Raise PeerLost if its control connection is gone."""


class Entrance(Protocol):
    """Where drafts come from and go to. Neither call waits."""

    def arrived(self) -> list[DraftRank]:
        """Drafts whose link was built since the last call."""

    def let_go(self, draft: DraftRank) -> None:
        """Close a draft that is lost."""


class _AtWork:
    """One draft and what the leader knows of its state.

    Attributes:
        asked: since when an answer is due; None while none is.
        silent_since: when it last said something since the last question was put, or that was put.
        suspect: it did not answer in time, or has sequences to catch up with; it is not waited for until it says
            something.
    """

    def __init__(self, draft: DraftRank, suspect: bool) -> None:
        self.draft = draft
        self.patience = Patience()
        self.asked: float | None = None
        self.silent_since = time.monotonic()
        self.suspect = suspect
        self.pulse_at = self.silent_since + PULSE_S

    def ask(self) -> None:
        """It is asked for a branch."""
        self.silent_since = time.monotonic()
        self.asked = self.silent_since if self.asked is None else self.asked
        self.patience.ask()

    def heard(self) -> None:
        """It said something."""
        self.asked, self.suspect, self.silent_since = None, False, time.monotonic()


class Drafts:
    """All drafts at work.

    Args:
        entrance: where they come in.
        deadline: seconds after which a draft that was asked and said nothing counts as lost.
    """

    def __init__(self, entrance: Entrance, deadline: float) -> None:
        self._entrance = entrance
        self._deadline = deadline
        self._at_work: list[_AtWork] = []
        self._sequences: dict[int, Sequence] = {}
        self._trees: list[TreeFrame] = []
        self._shared_by = 1  # drafts that were told their share
        self.num_lost = 0
        self.num_linked = 0

    @property
    def count(self) -> int:
        """How many are there."""
        return len(self._at_work)

    # -- sequences -----------------------------------------------------------------------------------------------

    def admit(self, sequence: Sequence) -> None:
        """A sequence begins."""
        self._sequences[sequence.sequence_id] = sequence
        self._each(lambda one: self._control(one, admission(sequence, sequence.request.mode)))

    def finish(self, sequence: Sequence) -> None:
        """A sequence is over."""
        del self._sequences[sequence.sequence_id]
        self._each(lambda one: self._control(one, Finish(sequence.sequence_id)))

    def _control(self, one: _AtWork, message: Message) -> None:
        """Tell a draft, and wake it with an empty frame: it may be waiting on the link."""
        one.draft.send_control(message)
        one.draft.send_outcomes(OutcomeFrame(0, one.draft.control_seq, ()))

    # -- coming and going ----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Between two rounds: let in who has come, notice who is gone, hear what was said."""
        for draft in self._entrance.arrived():
            self.num_linked += 1
            # What it is told of running sequences has to be computed first, in forwards that are its process's first.
            one = _AtWork(draft, suspect=bool(self._sequences))
            self._at_work.append(one)
            log.info("draft rank %d is linked; it takes over %d sequences", draft.rank, len(self._sequences))
            self._with(one, self._take_over)
        self._each(self._listen)
        if self._shared_by != self.count:
            self._share_out()

    def _share_out(self) -> None:
        """Divide the outcomes anew: whoever is left, or has come, drafts for its part of them."""
        self._shared_by = self.count
        for index, one in enumerate(list(self._at_work)):
            share = Share(index, self._shared_by)
            self._with(one, lambda one, share=share: self._control(one, share))  # type: ignore[misc]

    def _take_over(self, one: _AtWork) -> None:
        for sequence in self._sequences.values():
            self._control(one, admission(sequence, sequence.request.mode))

    def _listen(self, one: _AtWork) -> None:
        now = time.monotonic()
        trees = one.draft.poll_trees()
        if trees:
            if one.suspect and one.asked is not None:  # late: it was given up too early
                one.patience.observe_late(now - one.asked)
            one.heard()
            self._trees += trees
        elif one.asked is not None and now - one.asked > self._deadline:
            raise PeerLost("draft", one.draft.rank, -1, f"no answer within {self._deadline:g} s")
        if now > one.pulse_at:
            one.draft.check_pulse()
            one.pulse_at = now + PULSE_S

    def _each(self, act: Callable[[_AtWork], None]) -> None:
        for one in list(self._at_work):
            self._with(one, act)

    def _with(self, one: _AtWork, act: Callable[[_AtWork], None]) -> None:
        """Do something that needs a draft; if it is lost, go on without it: no token depends on it."""
        try:
            act(one)
        except PeerLost as lost:
            log.warning("%s; going on without it", lost)
            self.num_lost += 1
            self._at_work.remove(one)
            self._entrance.let_go(one.draft)

    # -- rounds --------------------------------------------------------------------------------------------------

    def take_trees(self) -> list[TreeFrame]:
        """What was heard since the last call."""
        trees, self._trees = self._trees, []
        return trees

    def tell(self, round: int, rows: Iterable[OutcomeRow], plan: Plan | None) -> None:
        """Send outcomes to every draft, and how much to draft if that is planned."""
        told = tuple(rows)
        asks = any(row.source is Source.PENDING for row in told)

        def send(one: _AtWork) -> None:
            one.draft.send_outcomes(OutcomeFrame(round, one.draft.control_seq, told, plan))
            if asks:
                one.ask()

        self._each(send)

    def wait(self) -> bool:
        """Wait for something to be said; False if it is of no use to wait any longer: who was asked is late or gone.

        The silence of each counts from the question (`tell`) or its own last word, whoever else spoke meanwhile.
        """
        while awaited := [one for one in self._at_work if not one.suspect]:
            # Of several the first to speak counts, so none is waited for alone for long.
            wait = functools.partial(self._wait_for, slice_s=None if len(awaited) == 1 else TURN_S)
            for one in awaited:
                before = len(self._trees)
                self._with(one, wait)
                if len(self._trees) > before:
                    return True
        return False

    def _wait_for(self, one: _AtWork, slice_s: float | None) -> None:
        left = one.silent_since + one.patience.bound - time.monotonic()
        trees = one.draft.wait_trees(max(0.0, left if slice_s is None else min(left, slice_s)))
        silence = time.monotonic() - one.silent_since
        if trees:
            one.patience.observe(silence)
            one.heard()
            self._trees += trees
        elif silence >= one.patience.bound:
            one.suspect = True
            log.debug("draft rank %d did not answer within %.3f s", one.draft.rank, silence)
