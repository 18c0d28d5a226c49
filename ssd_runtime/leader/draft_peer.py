"""One draft as the leader knows it: how it is reached, what it was told, how long it is waited for.

Knows no other drafts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from ssd_runtime.comm.control.draft_messages import Finish, Portion
from ssd_runtime.comm.control.messages import Message
from ssd_runtime.comm.link.endpoint import TargetLink
from ssd_runtime.errors import PeerLost
from ssd_runtime.speculation.types import OutcomeFrame, TreeFrame

if TYPE_CHECKING:
    from ssd_runtime.comm.control.server import ControlServer

PULSE_S = 0.5  # between two looks at the control connection of a draft

FIRST_S = 0.03  # what is usual before anything was measured
SLACK_S = 0.06  # beyond the usual, in all the waits of one question: a draft that pauses for this long may have died
MOST_S = 1.0  # all the waits of one question; what is late counts for no more
WINDOW = 9  # answers remembered; odd


class ReplyTimeout:
    """The usual silence of a draft that is being waited for: the median over the last answers of the longest in each.

    A draft that died, stopped or was cut off says nothing for ever, and which of these it is shows only later. So the
    target goes on after the usual silence and a little more. The little more is had once a question (`ask`), however
    many signs the answer comes in. Just under half of the answers remembered may be as late as they like without
    changing what is usual, so neither a long pause nor a short burst of load makes the target wait longer; a draft
    that is really slow is known after five late answers.
    """

    def __init__(self) -> None:
        self._silences = deque([FIRST_S] * WINDOW, WINDOW)
        self._usual = FIRST_S
        self._slack = SLACK_S
        self._left = MOST_S  # for the whole of the present answer
        self._longest = 0.0  # silence of the present answer

    @property
    def bound(self) -> float:
        """Seconds of silence after which the target goes on."""
        return min(self._usual + self._slack, self._left)

    def ask(self) -> None:
        """A question is put: what is known of the last answer is learned, and the slack is whole again."""
        if self._longest:
            self._learn(self._longest)
        self._slack = SLACK_S
        self._left = MOST_S

    def observe(self, silence: float) -> None:
        """The draft was waited for and said something after `silence` seconds."""
        self._slack = max(0.0, self._slack - max(0.0, silence - self._usual))
        self._left = max(0.0, self._left - silence)
        self._longest = max(self._longest, silence)

    def observe_late(self, silence: float) -> None:
        """It was waited for no longer, and said something `silence` seconds after it was asked."""
        self._learn(min(silence, MOST_S))

    def _learn(self, silence: float) -> None:
        self._longest = 0.0
        self._silences.append(silence)
        self._usual = median(self._silences)


class DraftPeer:
    """A draft that has been welcomed. All but `close_link` belong to the leader's thread; calls raise PeerLost.

    Args:
        server: the leader's control socket.
        identity: the draft's name on it.
        rank: the draft's own, for messages.
        link: the data plane to it.

    Attributes:
        control_seq: how many control messages it was sent.
        portions: its part of the outcomes of each sequence it was told of.
        catching_up: of these, the sequences that it was told of in mid-stream and has not named so far, and the turn
            they were at.
        asked: since when an answer is due; None while none is.
        silent_since: when it spoke last, or was asked if that is later.
        suspect: it did not answer in time, or has sequences to catch up with; it is not waited for until it says
            something.
    """

    def __init__(self, server: ControlServer, identity: bytes, rank: int, link: TargetLink) -> None:
        self._server = server
        self._identity = identity
        self._link = link
        self._replaced = False
        self.rank = rank
        self.control_seq = 0
        self.portions: dict[int, Portion] = {}
        self.catching_up: dict[int, int] = {}
        self.reply_timeout = ReplyTimeout()
        self.asked: float | None = None
        self.silent_since = time.monotonic()
        self.suspect = False
        self._pulse_at = self.silent_since + PULSE_S

    # -- what it says and is told ----------------------------------------------------------------------------------

    def send_control(self, message: Message) -> None:
        """Send a message that counts towards control_seq."""
        if not self._server.send(self._identity, message):
            raise self._lost(f"its control connection is gone (sending {type(message).__name__})")
        self.control_seq += 1

    def tell(self, messages: Sequence[Message]) -> None:
        """Send control messages, and wake it with an empty frame: it may be waiting on the link."""
        for message in messages:
            self.send_control(message)
        if messages:
            self.send_outcomes(OutcomeFrame(0, self.control_seq, ()))

    def send_outcomes(self, frame: OutcomeFrame) -> None:
        self._link.send(frame)

    def poll_trees(self) -> list[TreeFrame]:
        if self._replaced:
            raise self._lost("it came back and wants a new link")
        return self._link.receive()

    def wait_trees(self, timeout_s: float) -> list[TreeFrame]:
        return self._link.receive(timeout_s)

    def check_pulse(self, now: float) -> None:
        """Now and then, look whether its control connection is there, or it left, or missed a few heartbeats."""
        if now > self._pulse_at:
            self._pulse_at = now + PULSE_S
            if not self._server.alive(self._identity):
                raise self._lost("its control connection is gone")

    def replace(self) -> None:
        """The process behind it has come again: this link is over."""
        self._replaced = True

    def close_link(self) -> None:
        """Close the link; beside a dead peer that takes up to a second."""
        self._link.close()

    def _lost(self, reason: str) -> PeerLost:
        return PeerLost("draft", self.rank, -1, reason)

    # -- its state -------------------------------------------------------------------------------------------------

    def drafts_for(self, sequence_id: int) -> bool:
        """Whether it has the sequence and has caught up with it."""
        return sequence_id in self.portions and sequence_id not in self.catching_up

    def forget(self, sequence_ids: Iterable[int]) -> list[Finish]:
        """These are no longer its sequences; returns what tells it so."""
        own = [sequence_id for sequence_id in sequence_ids if self.portions.pop(sequence_id, None) is not None]
        for sequence_id in own:
            self.catching_up.pop(sequence_id, None)
        return [Finish(sequence_id) for sequence_id in own]

    def ask(self) -> None:
        """It is asked for a branch."""
        self.silent_since = time.monotonic()
        self.asked = self.silent_since if self.asked is None else self.asked
        self.reply_timeout.ask()

    def heard(self) -> None:
        """It said something."""
        self.asked, self.suspect, self.silent_since = None, False, time.monotonic()
