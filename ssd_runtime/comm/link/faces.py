"""The data plane between target and draft as both see it: its two faces and its deadlines.

A link is built for one epoch and never repaired: when the peer dies, falls silent or talks nonsense, every call raises
PeerLost, and the caller builds the next one. Links between processes are built in setup.py and work in endpoint.py,
those inside one process are in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ssd_runtime.speculation.types import OutcomeFrame, TreeFrame


class TargetLink(Protocol):
    """The target's face. Every call raises PeerLost once the draft is gone and all it sent has been read."""

    def send_outcomes(self, frame: OutcomeFrame) -> None: ...
    def poll_trees(self) -> list[TreeFrame]: ...
    def wait_trees(self, timeout_s: float) -> list[TreeFrame]: ...
    def close(self) -> None: ...


class DraftLink(Protocol):
    """The draft's face. Of trees that could not be sent yet only the newest is kept; outcomes are never dropped."""

    def push_tree(self, frame: TreeFrame) -> None: ...
    def poll_outcomes(self) -> list[OutcomeFrame]: ...
    def wait_outcomes(self, timeout_s: float) -> list[OutcomeFrame]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class LinkTiming:
    """Seconds. Both sides must use the same heartbeat.

    Attributes:
        build: longest wait for the other side to come.
        heartbeat: a side with nothing to send says so this often.
        silence: longest wait for anything at all, several heartbeats.
        close: longest wait for the goodbye to leave.
    """

    build: float = 20.0
    heartbeat: float = 5.0
    silence: float = 15.0
    close: float = 1.0
