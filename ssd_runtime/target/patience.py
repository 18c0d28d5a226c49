"""How long the target waits for a sign of a draft before it goes on without: learned, never much. Knows no links."""

from __future__ import annotations

FIRST_S = 0.04  # what is usual before anything was measured
SLACK_S = 0.06  # beyond the usual: a draft that pauses for this long may have died


class Patience:
    """The usual silence of a draft that is being waited for, as an envelope: it rises fast and falls slowly.

    A draft that died, stopped or was cut off says nothing for ever, and which of these it is shows only later. So the
    target goes on after the usual silence and a little more. A draft that answers late raises what is usual, but one
    long pause does not: a sample counts as twice the bound at most, as retransmission timers back off (RFC 6298).
    """

    def __init__(self) -> None:
        self._usual = FIRST_S

    @property
    def bound(self) -> float:
        """Seconds of silence after which the target goes on."""
        return self._usual + SLACK_S

    def observe(self, silence: float) -> None:
        """The draft was waited for and said something after `silence` seconds."""
        sample = min(silence, 2 * self.bound)
        self._usual += (sample - self._usual) * (0.5 if sample > self._usual else 0.05)
