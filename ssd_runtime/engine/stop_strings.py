"""Where a text that comes in pieces meets a stop string, in time linear in the text. Knows no tokens and no requests.

Each stop string is followed by the automaton of Knuth, Morris and Pratt (SIAM J. Comput. 6(2), 1977), built no further
than the text has matched it: a stop string that never begins to match costs nothing, however long.
"""

from __future__ import annotations

from collections.abc import Sequence

from ssd_runtime.errors import RequestError


def check_stop_strings(stop: Sequence[str], most: int, most_bytes: int) -> None:
    """Raise RequestError for more than `most` stop strings or one of more than `most_bytes` of UTF-8."""
    if len(stop) > most:
        raise RequestError(
            f"{len(stop)} stop strings are given and serve.max_stop_strings is {most}: give fewer, or raise the limit"
        )
    if any(len(one) > most_bytes or len(one.encode("utf-8", "surrogatepass")) > most_bytes for one in stop):
        raise RequestError(
            f"a stop string is longer than serve.max_stop_bytes = {most_bytes}: give a shorter one, or raise the limit"
        )


class StopStrings:
    """Lets text through up to the first stop string; holds back what may become one.

    Args:
        stop: the stop strings, none of them empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._patterns = [_Pattern(one) for one in stop]
        self._held = ""  # what the longest match so far may become

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string was met: what begins first in what was held, cuts."""
        starts = [start for pattern in self._patterns if (start := pattern.push(text)) is not None]
        held, whole = len(self._held), self._held + text
        if starts:
            self.flush()
            return whole[: held + min(starts)], True
        cut = len(whole) - max((pattern.matched for pattern in self._patterns), default=0)
        self._held = whole[cut:]
        return whole[:cut], False

    def flush(self) -> str:
        """The text held back, at the end."""
        held, self._held = self._held, ""
        for pattern in self._patterns:
            pattern.matched = 0
        return held


class _Pattern:
    """One stop string against the text so far.

    Attributes:
        matched: so many characters of the text's end are its beginning.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._shorter = [0, 0]  # of its first m characters, so many of the end are its beginning too, and fewer than m

    def push(self, text: str) -> int | None:
        """Where in `text` it begins for the first time, below 0 for before; None if it does not end in there."""
        for end, letter in enumerate(text, 1):
            self.matched = matched = self._longer(self.matched, letter)
            if matched == len(self.stop):
                return end - matched
            if matched == len(self._shorter):
                self._shorter.append(self._longer(self._shorter[-1], letter))
        return None

    def _longer(self, matched: int, letter: str) -> int:
        """What is matched after one more character."""
        while self.stop[matched] != letter:
            if not matched:
                return 0
            matched = self._shorter[matched]
        return matched + 1
