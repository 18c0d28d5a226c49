"""The draft rank's loop: take in outcomes, grow the trees, push them while the target still computes."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from ssd_runtime.comm.control.draft_messages import Admit, Finish, Portion
from ssd_runtime.comm.control.messages import Message, Refused, Shutdown
from ssd_runtime.comm.link.endpoint import DraftLink
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.errors import PeerLost
from ssd_runtime.speculation.types import OutcomeFrame
from ssd_runtime.trace import Tracer

if TYPE_CHECKING:
    from ssd_runtime.comm.control.peer import ControlPeer

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.2  # between two looks at the control socket when the link is quiet; the target wakes us by a frame
FAREWELL_S = 1.0  # how long a Shutdown may lag behind the end of the link


class DraftLoop:
    """Drafts until told to leave.

    Args:
        drafter: the model and its trees.
        control: the connection to the leader.
        link: the data plane.
        tracer: where steps are recorded.
        deadline: seconds that a control message may lag behind the frame that counts on it.
    """

    def __init__(
        self, drafter: Drafter, control: ControlPeer, link: DraftLink, tracer: Tracer, deadline: float
    ) -> None:
        self._drafter = drafter
        self._control = control
        self._link = link
        self._tracer = tracer
        self._deadline = deadline
        self._control_seq = 0
        self._leaving = ""

    def stop(self, reason: str) -> None:
        """Leave at the next turn of the loop (from a signal handler)."""
        self._leaving = self._leaving or reason

    def run(self) -> None:
        """The rounds, seen from the draft.

        Raises:
            PeerLost: the target is gone without having said goodbye.
            ProtocolError: what it sent cannot be.
        """
        try:
            while not self._leaving:
                # Frames say which control messages they rest on, so between two steps a look at the link is enough.
                self._advance(self._link.receive())
                if not self._grow():
                    self._handle(self._control.poll(0.0))
                    self._advance(self._link.receive(IDLE_WAIT_S))
        except PeerLost as lost:
            self._farewell(lost)
        log.info("leaving: %s", self._leaving)

    def _grow(self) -> bool:
        step = self._drafter.grow()
        if step is None:
            return False
        self._link.send(self._drafter.tree())
        self._tracer.complete("draft step", step.start_ns, step.end_ns, arguments={"rows": step.rows})
        return True

    def _advance(self, frames: list[OutcomeFrame]) -> None:
        for frame in frames:
            start_ns = time.monotonic_ns()
            self._catch_up_with_control(frame)
            if self._drafter.advance(frame):
                self._link.send(self._drafter.tree())
            if frame.rows:
                self._tracer.complete("advance", start_ns, time.monotonic_ns(), arguments={"round": frame.round})

    def _catch_up_with_control(self, frame: OutcomeFrame) -> None:
        """The frame rests on control messages sent before it: handle them first."""
        give_up = time.monotonic() + self._deadline
        while self._control_seq < frame.control_seq and not self._leaving:
            left = give_up - time.monotonic()
            if left <= 0:
                missing = f"control message {frame.control_seq} within {self._deadline:g} s"
                raise PeerLost("target", 0, frame.round, f"awaited {missing}, have {self._control_seq}")
            self._handle(self._control.poll(left))

    def _handle(self, messages: list[Message]) -> None:
        for message in messages:
            if isinstance(message, Admit):
                self._control_seq += 1
                self._drafter.admit(message)
            elif isinstance(message, Finish):
                self._control_seq += 1
                self._drafter.finish(message.sequence_id)
            elif isinstance(message, Portion):
                self._control_seq += 1
                self._drafter.portion(message.sequence_id, message.index, message.count)
            elif isinstance(message, Shutdown):
                self.stop(message.reason)
            elif isinstance(message, Refused):
                raise PeerLost("target", 0, -1, f"it did not understand this draft: {message.reason}")
            else:
                log.warning("the target sent %s, which a draft does not expect", type(message).__name__)

    def _farewell(self, lost: PeerLost) -> None:
        """A link that ended is no loss if a Shutdown says so."""
        if self._leaving:
            return
        try:
            message = self._control.wait_for(Shutdown, timeout_s=FAREWELL_S)
        except PeerLost:
            raise lost from None
        assert isinstance(message, Shutdown)
        self.stop(message.reason)
