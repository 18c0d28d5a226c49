"""How long the target waits for a sign of a draft before it goes on without: learned, never much. Knows no links."""

from __future__ import annotations

from collections import deque
from statistics import median

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
