"""How long the target waits for a sign of a draft before it goes on without: learned, never much. Knows no links."""

from __future__ import annotations

FIRST_S = 0.03  # what is usual before anything was measured
SLACK_S = 0.06  # beyond the usual, in all the waits of one question: a draft that pauses for this long may have died


class Patience:
    """The usual silence of a draft that is being waited for, as an envelope: it rises fast and falls slowly.

    A draft that died, stopped or was cut off says nothing for ever, and which of these it is shows only later. So the
    target goes on after the usual silence and a little more. The little more is had once a question (`ask`), however
    many signs the answer comes in. A draft that answers late time and again raises what is usual; one long pause does
    not, and a sample counts as twice the bound at most, as retransmission timers back off (RFC 6298).
    """

    def __init__(self) -> None:
        self._usual = FIRST_S
        self._slack = SLACK_S
        self._late = False  # the last answer was

    @property
    def bound(self) -> float:
        """Seconds of silence after which the target goes on."""
        return self._usual + self._slack

    def ask(self) -> None:
        """A question is put, and the slack is whole again."""
        self._slack = SLACK_S

    def observe(self, silence: float) -> None:
        """The draft was waited for and said something after `silence` seconds."""
        self._slack = max(0.0, self._slack - max(0.0, silence - self._usual))
        self._late = False
        self._learn(silence)

    def observe_late(self, silence: float) -> None:
        """It was waited for no longer, and said something `silence` seconds after it was asked."""
        if self._late:
            self._learn(min(silence, 2 * (self._usual + SLACK_S)))
        self._late = True

    def _learn(self, silence: float) -> None:
        self._usual += (silence - self._usual) * (0.5 if silence > self._usual else 0.05)
