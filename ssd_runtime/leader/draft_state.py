"""One draft at work, and what the leader knows of its state. Knows no other drafts."""

from __future__ import annotations

import time
from typing import Protocol

from ssd_runtime.comm.control.draft_messages import Portion
from ssd_runtime.comm.control.messages import Message
from ssd_runtime.leader.reply_timeout import ReplyTimeout
from ssd_runtime.speculation.types import OutcomeFrame, TreeFrame

PULSE_S = 0.5  # between two looks at the control connection of a draft


class DraftConnection(Protocol):
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


class DraftState:
    """One draft and what the leader knows of its state.

    Attributes:
        portions: its part of the outcomes of each sequence it was told of.
        catching_up: of these, the sequences that it was told of in mid-stream and has not named so far, and the turn
            they were at.
        asked: since when an answer is due; None while none is.
        silent_since: when it spoke last, or was asked if that is later.
        suspect: it did not answer in time, or has sequences to catch up with; it is not waited for until it says
            something.
    """

    def __init__(self, draft: DraftConnection, suspect: bool) -> None:
        self.draft = draft
        self.portions: dict[int, Portion] = {}
        self.catching_up: dict[int, int] = {}
        self.reply_timeout = ReplyTimeout()
        self.asked: float | None = None
        self.silent_since = time.monotonic()
        self.suspect = suspect
        self.pulse_at = self.silent_since + PULSE_S

    def drafts_for(self, sequence_id: int) -> bool:
        """Whether it has the sequence and has caught up with it."""
        return sequence_id in self.portions and sequence_id not in self.catching_up

    def ask(self) -> None:
        """It is asked for a branch."""
        self.silent_since = time.monotonic()
        self.asked = self.silent_since if self.asked is None else self.asked
        self.reply_timeout.ask()

    def heard(self) -> None:
        """It said something."""
        self.asked, self.suspect, self.silent_since = None, False, time.monotonic()

    def look_after(self, now: float) -> None:
        """Now and then, look whether its control connection is there; raises PeerLost if not."""
        if now > self.pulse_at:
            self.draft.check_pulse()
            self.pulse_at = now + PULSE_S
