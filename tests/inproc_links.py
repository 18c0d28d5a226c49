"""The two faces of a link inside one process: for tests and for a draft in the target's process. No threads.

Frames pass by reference, in order. Pushed trees that were not read yet give way to the newest, as on a real link.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

from ssd_runtime.errors import PeerLost
from ssd_runtime.speculation.types import OutcomeFrame, TreeFrame

Frame = TypeVar("Frame")


class _Mailbox(Generic[Frame]):
    """One direction. `deque(maxlen=1)` is what makes the latest tree win."""

    def __init__(self, changed: threading.Condition, maxlen: int | None) -> None:
        self.frames: deque[Frame] = deque(maxlen=maxlen)
        self.changed = changed


class _Shared:
    """What both faces hold."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.outcomes: _Mailbox[OutcomeFrame] = _Mailbox(self.changed, None)
        self.trees: _Mailbox[TreeFrame] = _Mailbox(self.changed, 1)
        self.closed_by: str | None = None


class _Face:
    def __init__(self, shared: _Shared, role: str) -> None:
        self._shared, self._role = shared, role
        self._round = -1

    def close(self) -> None:
        """Say goodbye; the other side raises PeerLost once it has read what was sent before. May be repeated."""
        with self._shared.changed:
            self._shared.closed_by = self._shared.closed_by or self._role
            self._shared.changed.notify_all()

    def _send(self, mailbox: _Mailbox[Frame], frame: Frame, round: int) -> None:
        with self._shared.changed:
            self._round = round
            self._raise_if_closed()
            mailbox.frames.append(frame)
            self._shared.changed.notify_all()

    def _take(self, mailbox: _Mailbox[Frame], timeout_s: float) -> list[Frame]:
        with self._shared.changed:
            self._shared.changed.wait_for(lambda: mailbox.frames or self._shared.closed_by, timeout_s)
            frames = list(mailbox.frames)
            mailbox.frames.clear()
            if not frames:
                self._raise_if_closed()
            return frames

    def _raise_if_closed(self) -> None:
        if self._shared.closed_by is None:
            return
        peer = "draft" if self._role == "target" else "target"
        who = "it" if self._shared.closed_by == peer else "this side"
        raise PeerLost(peer, 1 if peer == "draft" else 0, self._round, f"{who} closed the link")


class InprocTargetLink(_Face):
    """The target's face."""

    def send_outcomes(self, frame: OutcomeFrame) -> None:
        self._send(self._shared.outcomes, frame, frame.round)

    def poll_trees(self) -> list[TreeFrame]:
        return self._take(self._shared.trees, 0)

    def wait_trees(self, timeout_s: float) -> list[TreeFrame]:
        return self._take(self._shared.trees, timeout_s)


class InprocDraftLink(_Face):
    """The draft's face."""

    def push_tree(self, frame: TreeFrame) -> None:
        self._send(self._shared.trees, frame, frame.round)

    def poll_outcomes(self) -> list[OutcomeFrame]:
        return self._take(self._shared.outcomes, 0)

    def wait_outcomes(self, timeout_s: float) -> list[OutcomeFrame]:
        return self._take(self._shared.outcomes, timeout_s)


def inproc_pair() -> tuple[InprocTargetLink, InprocDraftLink]:
    """Two faces of one link."""
    shared = _Shared()
    return InprocTargetLink(shared, "target"), InprocDraftLink(shared, "draft")
