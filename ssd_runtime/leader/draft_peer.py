"""A draft's rank as the leader reaches it: its control connection, messages counted, and the link."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssd_runtime.comm.control.messages import Message
from ssd_runtime.comm.link.faces import TargetLink
from ssd_runtime.errors import PeerLost
from ssd_runtime.speculation.types import OutcomeFrame, TreeFrame

if TYPE_CHECKING:
    from ssd_runtime.comm.control.sockets import ControlServer


class DraftPeer:
    """A draft that has been welcomed. All but `close_link` belong to the leader's thread.

    Args:
        server: the leader's control socket.
        identity: the draft's name on it.
        rank: the draft's own, for messages.
        link: the data plane to it.
    """

    def __init__(self, server: ControlServer, identity: bytes, rank: int, link: TargetLink) -> None:
        self._server = server
        self._identity = identity
        self._link = link
        self._replaced = False
        self.rank = rank
        self.control_seq = 0

    def send_control(self, message: Message) -> None:
        """Send a message that counts towards control_seq. Raises PeerLost if the draft is gone."""
        if not self._server.send(self._identity, message):
            raise self._lost(f"its control connection is gone (sending {type(message).__name__})")
        self.control_seq += 1

    def send_outcomes(self, frame: OutcomeFrame) -> None:
        self._link.send_outcomes(frame)

    def poll_trees(self) -> list[TreeFrame]:
        if self._replaced:
            raise self._lost("it came back and wants a new link")
        return self._link.poll_trees()

    def wait_trees(self, timeout_s: float) -> list[TreeFrame]:
        return self._link.wait_trees(timeout_s)

    def check_pulse(self) -> None:
        """Raise PeerLost if its control connection is gone: it left, or missed a few heartbeats."""
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
