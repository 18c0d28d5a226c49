"""The draft's rank as the leader reaches it: handshake, counted control messages, and the link."""

from __future__ import annotations

import time
from collections.abc import Callable

from ssd_runtime.comm.control import ControlServer
from ssd_runtime.comm.handshake import check_hello
from ssd_runtime.comm.link import LinkHost, LinkTiming, TargetLink, open_target_link
from ssd_runtime.comm.messages import Hello, LinkAddress, Message, Refused, Shutdown, Welcome
from ssd_runtime.comm.protocol import FrameShape, VocabularyDigest
from ssd_runtime.errors import ConfigError, PeerLost
from ssd_runtime.speculation.types import OutcomeFrame, TreeFrame

POLL_S = 0.2

OpenLink = Callable[[LinkAddress, LinkTiming], TargetLink]


class DraftPeer:
    """A draft that has been welcomed.

    Args:
        server: the leader's control socket.
        identity: the draft's name on it.
        link: the data plane to it.
    """

    def __init__(self, server: ControlServer, identity: bytes, link: TargetLink) -> None:
        self._server = server
        self.identity = identity
        self._link = link
        self.control_seq = 0

    def send_control(self, message: Message) -> None:
        """Send a message that counts towards control_seq. Raises PeerLost if the draft is gone."""
        if not self._server.send(self.identity, message):
            raise PeerLost("draft", 1, -1, f"its control connection is gone (sending {type(message).__name__})")
        self.control_seq += 1

    def send_outcomes(self, frame: OutcomeFrame) -> None:
        self._link.send_outcomes(frame)

    def poll_trees(self) -> list[TreeFrame]:
        return self._link.poll_trees()

    def wait_trees(self, timeout_s: float) -> list[TreeFrame]:
        return self._link.wait_trees(timeout_s)

    def close(self, reason: str) -> None:
        """Tell the draft to leave and close the link."""
        self._server.send(self.identity, Shutdown(reason))
        self._link.close()


def welcome_draft(
    server: ControlServer,
    host: LinkHost,
    shape: FrameShape,
    *,
    config_digest: str,
    vocabulary: VocabularyDigest,
    timing: LinkTiming,
    deadline_s: float,
    stopping: Callable[[], bool],
    open_link: OpenLink = open_target_link,
) -> DraftPeer | None:
    """Wait for a draft, check that it fits, build the link to it.

    Args:
        stopping: asked between polls; True ends the wait with None.

    Raises:
        ConfigError: no draft came within `deadline_s`, or it does not fit (the draft is told so, too).
        PeerLost: it came and went.
    """
    deadline = time.monotonic() + deadline_s
    while (left := deadline - time.monotonic()) > 0:
        if stopping():
            return None
        for identity, message in server.poll(min(left, POLL_S)):
            if not isinstance(message, Hello):
                server.send(identity, Refused("the engine is still loading"))
                continue
            reason = check_hello(message, config_digest, vocabulary)
            if reason is not None:
                server.send(identity, Refused(reason))
                raise ConfigError(f"the draft (rank {message.rank}) does not fit: {reason}")
            address = host.next_address(shape)
            if not server.send(identity, Welcome(address)):
                raise PeerLost("draft", message.rank, -1, "it left during the handshake")
            return DraftPeer(server, identity, open_link(address, timing))
    raise ConfigError(
        f"no draft came within {deadline_s:g} s: start one draft rank beside the target (two ranks in all), or choose "
        "speculation.mode ar or sd-colocated"
    )
