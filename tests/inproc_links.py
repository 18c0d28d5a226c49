"""Both ends of a link inside one process, with the calls of an `Endpoint`. No threads.

Frames pass by reference, in order. Pushed trees that were not read yet give way to the newest, as on a real link.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, Generic, TypeVar

from ssd_runtime.errors import PeerLost
from ssd_runtime.speculation.types import OutcomeFrame, TreeFrame

Sent = TypeVar("Sent", OutcomeFrame, TreeFrame)
Got = TypeVar("Got", OutcomeFrame, TreeFrame)


class _Shared:
    """What both ends hold: frames by who reads them. `maxlen=1` is what makes the latest tree win."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.unread: dict[str, deque[Any]] = {"draft": deque(), "target": deque(maxlen=1)}
        self.closed_by: str | None = None


class InprocLink(Generic[Sent, Got]):
    """One end."""

    def __init__(self, shared: _Shared, role: str, peer: str) -> None:
        self._shared, self._role, self._peer = shared, role, peer
        self._round = -1

    def send(self, frame: Sent) -> None:
        with self._shared.changed:
            self._round = frame.round
            self._raise_if_closed()
            self._shared.unread[self._peer].append(frame)
            self._shared.changed.notify_all()

    def receive(self, timeout_s: float = 0.0) -> list[Got]:
        unread = self._shared.unread[self._role]
        with self._shared.changed:
            self._shared.changed.wait_for(lambda: unread or self._shared.closed_by, timeout_s)
            frames = list(unread)
            unread.clear()
            if not frames:
                self._raise_if_closed()
            return frames

    def close(self) -> None:
        """Say goodbye; the other side raises PeerLost once it has read what was sent before. May be repeated."""
        with self._shared.changed:
            self._shared.closed_by = self._shared.closed_by or self._role
            self._shared.changed.notify_all()

    def _raise_if_closed(self) -> None:
        if self._shared.closed_by is None:
            return
        who = "it" if self._shared.closed_by == self._peer else "this side"
        raise PeerLost(self._peer, int(self._peer == "draft"), self._round, f"{who} closed the link")


InprocTargetLink = InprocLink[OutcomeFrame, TreeFrame]
InprocDraftLink = InprocLink[TreeFrame, OutcomeFrame]


def inproc_pair() -> tuple[InprocTargetLink, InprocDraftLink]:
    """The ends of one link."""
    shared = _Shared()
    return InprocLink(shared, "target", "draft"), InprocLink(shared, "draft", "target")
