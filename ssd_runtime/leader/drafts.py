"""The drafts at work for the leader: told of their sequences and outcomes, heard, waited for, lost and let in again.

Owns who is there, who drafts for which sequence and what each has been told. Knows the protocol of a link; does not
know what is worth speculating, nor what is a fair division (assignment.py).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

from ssd_runtime.comm.control.draft_messages import Portion
from ssd_runtime.comm.control.messages import Message
from ssd_runtime.engine.sequence import Sequence
from ssd_runtime.engine.speculator import admission
from ssd_runtime.errors import PeerLost
from ssd_runtime.leader.assignment import assign
from ssd_runtime.leader.draft_peer import DraftPeer
from ssd_runtime.speculation.types import OutcomeFrame, OutcomeRow, Plan, Source, TreeFrame

if TYPE_CHECKING:
    from ssd_runtime.leader.acceptor import DraftAcceptor

log = logging.getLogger(__name__)

TURN_S = 0.0005  # how long each of several drafts is waited for in turn


class Drafts:
    """All drafts at work, and the sequences divided among them.

    A draft that gets a sequence in mid-stream first has to catch up with it. Meanwhile those that had it go on as
    before, if they are there.

    Args:
        acceptor: where they come from and go to.
        deadline: seconds after which a draft that was asked and said nothing counts as lost.
    """

    def __init__(self, acceptor: DraftAcceptor, deadline: float) -> None:
        self._acceptor = acceptor
        self.deadline = deadline
        self._peers: list[DraftPeer] = []
        self._sequences: dict[int, Sequence] = {}
        self._assignment: dict[int, tuple[DraftPeer, ...]] = {}
        self._settled = True  # everybody was told what follows from who is there
        self._trees: list[TreeFrame] = []
        self.num_lost = 0
        self.num_linked = 0

    @property
    def count(self) -> int:
        """How many are there."""
        return len(self._peers)

    @property
    def changes(self) -> int:
        """How often one has come or gone."""
        return self.num_linked + self.num_lost

    def draft_for(self, sequence_id: int) -> bool:
        """Whether a draft is at work on the sequence."""
        return any(one.drafts_for(sequence_id) for one in self._peers)

    def answer_for(self, sequence_id: int) -> bool:
        """Whether a draft is at work on the sequence that can be waited for."""
        return any(one.drafts_for(sequence_id) for one in self._peers if not one.suspect)

    # -- sequences -----------------------------------------------------------------------------------------------

    def admit(self, sequences: Iterable[Sequence]) -> None:
        """Sequences begin."""
        self._sequences |= {sequence.sequence_id: sequence for sequence in sequences}
        self._settled = False
        self.settle()

    def finish(self, sequence: Sequence) -> None:
        """A sequence is over. What that means for the others waits until `settle`: another may begin in its place."""
        self._sequences.pop(sequence.sequence_id, None)  # absent if it failed while it was admitted
        self._settled = False
        self._each(lambda one: one.tell(one.forget([sequence.sequence_id])))

    def settle(self) -> None:
        """Before a round: let in who has come, and divide the sequences anew if anybody has come or gone."""
        self._let_in()
        while not self._settled:
            self._settled = True
            self._deal_out()

    def _deal_out(self) -> None:
        self._assignment = assign(tuple(self._sequences), self._peers, self._assignment)
        wanted = self._wanted()
        self._each(lambda one: self._inform(one, wanted[one]))

    def _wanted(self) -> dict[DraftPeer, dict[int, Portion]]:
        """What each draft should have been told."""
        wanted: dict[DraftPeer, dict[int, Portion]] = {one: {} for one in self._peers}
        for sequence_id, assigned in self._assignment.items():
            ready = [one for one in assigned if self._is_ready(one, sequence_id)]
            former = [] if ready else [one for one in self._peers if one.drafts_for(sequence_id)]
            for sharing in (assigned, former, ready):  # the last word counts: who is ready divides it with nobody else
                for index, one in enumerate(sharing):
                    wanted[one][sequence_id] = Portion(sequence_id, index, len(sharing))
        return wanted

    def _is_ready(self, one: DraftPeer, sequence_id: int) -> bool:
        return one.drafts_for(sequence_id) or (sequence_id not in one.portions and not self._runs(sequence_id))

    def _runs(self, sequence_id: int) -> bool:
        """Whether whoever is told of the sequence now has to catch up with it before it drafts."""
        return self._sequences[sequence_id].turn >= 0

    def _inform(self, one: DraftPeer, wanted: dict[int, Portion]) -> None:
        """Tell a draft what is new to it."""
        messages: list[Message] = [*one.forget([known for known in one.portions if known not in wanted])]
        taken_over = 0
        for sequence_id, portion in wanted.items():
            told, sequence = one.portions.get(sequence_id), self._sequences[sequence_id]
            if told is None:
                told = Portion(sequence_id, 0, 1)
                messages.append(admission(sequence, sequence.request.mode))
                if self._runs(sequence_id):
                    taken_over += 1
                    one.catching_up[sequence_id] = sequence.turn
            if portion != told:
                messages.append(portion)
            one.portions[sequence_id] = portion
        if taken_over:
            log.info("draft rank %d takes over %d sequences", one.rank, taken_over)
        one.tell(messages)

    # -- coming and going ----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Between two rounds: let in who has come, notice who is gone, hear what was said."""
        self._let_in()
        self._each(self._listen)

    def _let_in(self) -> None:
        if not self._acceptor.has_news:
            return
        for one in self._acceptor.arrived():
            self.num_linked += 1
            # What it is told of running sequences has to be computed first, in forwards that are its process's first.
            one.suspect = bool(self._sequences)
            self._peers.append(one)
            self._settled = False
            log.info("draft rank %d is linked", one.rank)

    def _listen(self, one: DraftPeer) -> None:
        now = time.monotonic()
        trees = one.poll_trees()
        if trees:
            if one.suspect and one.asked is not None:  # late: it was given up too early
                one.reply_timeout.observe_late(now - one.asked)
            self._hear(one, trees)
        elif one.asked is not None and now - one.asked > self.deadline:
            raise PeerLost("draft", one.rank, -1, f"no answer within {self.deadline:g} s")
        one.check_pulse(now)

    def _hear(self, one: DraftPeer, trees: list[TreeFrame]) -> None:
        one.heard()
        self._trees += trees
        if not one.catching_up:
            return
        for branch in (branch for tree in trees for branch in tree.branches):
            since = one.catching_up.get(branch.sequence_id)
            if since is not None and branch.turn >= since - 1:
                del one.catching_up[branch.sequence_id]
                self._settled = False

    def _each(self, act: Callable[[DraftPeer], None]) -> None:
        for one in list(self._peers):
            self._with(one, act)

    def _with(self, one: DraftPeer, act: Callable[[DraftPeer], None]) -> None:
        """Do something that needs a draft; if it is lost, go on without it: no token depends on it."""
        try:
            act(one)
        except PeerLost as lost:
            log.warning("%s; going on without it", lost)
            self.num_lost += 1
            self._peers.remove(one)
            self._settled = False
            self._acceptor.let_go(one)

    # -- rounds --------------------------------------------------------------------------------------------------

    def take_trees(self) -> list[TreeFrame]:
        """What was heard since the last call."""
        trees, self._trees = self._trees, []
        return trees

    def tell(self, round: int, rows: Iterable[OutcomeRow], plan: Plan | None) -> None:
        """Send each draft the outcomes of its sequences, and how much to draft if that is planned.

        Args:
            plan: as if there were one draft. Each has the budget that one would have, for fewer sequences.
        """
        told = tuple(rows)

        def send(one: DraftPeer) -> None:
            own = tuple(row for row in told if row.sequence_id in one.portions)
            if own:
                one.send_outcomes(OutcomeFrame(round, one.control_seq, own, self._part(one, plan)))
            if any(row.source is Source.PENDING for row in own):
                one.ask()

        self._each(send)

    def _part(self, one: DraftPeer, plan: Plan | None) -> Plan | None:
        """The plan for one draft: B outcomes of each sequence there is, spent on its own."""
        own, all_there_are = self._predrafted(one.portions), self._predrafted(self._sequences)
        return plan if plan is None or not own else Plan(plan.lookahead, plan.budget * all_there_are // own)

    def _predrafted(self, sequence_ids: Iterable[int]) -> int:
        """How many of these are drafted for ahead of time."""
        return sum(self._sequences[sequence_id].request.mode == "ssd" for sequence_id in sequence_ids)

    def wait(self, sequence_ids: Collection[int]) -> bool:
        """Wait for something to be said by a draft of one of these sequences, which were asked about.

        The silence of each counts from the question, or from its own last word.

        Returns:
            False if it is of no use to wait any longer: who was asked is late or gone.
        """
        while awaited := [one for one in self._peers if not one.suspect and any(map(one.drafts_for, sequence_ids))]:
            # Of several the first to speak counts, so none is waited for alone for long.
            wait = functools.partial(self._wait_for, slice_s=None if len(awaited) == 1 else TURN_S)
            for one in awaited:
                before = len(self._trees)
                self._with(one, wait)
                if len(self._trees) > before:
                    return True
        return False

    def _wait_for(self, one: DraftPeer, slice_s: float | None) -> None:
        left = one.silent_since + one.reply_timeout.bound - time.monotonic()
        trees = one.wait_trees(max(0.0, left if slice_s is None else min(left, slice_s)))
        silence = time.monotonic() - one.silent_since
        if trees:
            one.reply_timeout.observe(silence)
            self._hear(one, trees)
        elif silence >= one.reply_timeout.bound:
            one.suspect = True
            log.debug("draft rank %d did not answer within %.3f s", one.rank, silence)
