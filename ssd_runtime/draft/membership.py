"""A draft's way to its target, and back to it: handshake, link, drafting; again when the link breaks. Owns no model.

A failure of the draft's own, of its model or its trees, is one more way to lose the link: it costs the target's speed
meanwhile, and neither process.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ssd_runtime.comm.control.draft_messages import Hello, LinkAddress, Welcome
from ssd_runtime.comm.control.messages import Refused, Shutdown
from ssd_runtime.comm.control.peer import ControlPeer
from ssd_runtime.comm.link.endpoint import DraftLink
from ssd_runtime.comm.protocol import ProtocolError
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.draft.loop import DraftLoop
from ssd_runtime.errors import ConfigError, PeerLost, SsdError
from ssd_runtime.model.device_memory import told
from ssd_runtime.trace import Tracer

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0  # between two tries; doubled each time
UNLINKED_S = 5.0  # a link that lasted less was no success: the pauses go on growing


class _DraftFailed(SsdError):
    """Drafting raised what it should not have."""


@dataclass(frozen=True)
class JoinTimeouts:
    """Seconds.

    Attributes:
        first: how long a draft that was never linked tries.
        again: how long one tries that has lost its target.
        control: how long a control message may lag behind the frame that counts on it.
    """

    first: float
    again: float
    control: float


class Membership:
    """Drafts for the target at an address, for as long as there is one.

    Args:
        address: of the leader's control socket.
        hello: what this draft says of itself.
        drafter: the model and its trees.
        open_link: builds this end of a link; blocks.
        timeouts: deadlines.
        on_linked: called when a link stands, with the number the target knows this draft by.
        tracer: where steps are recorded.
    """

    def __init__(
        self,
        address: str,
        hello: Hello,
        drafter: Drafter,
        open_link: Callable[[LinkAddress], DraftLink],
        timeouts: JoinTimeouts,
        on_linked: Callable[[int], None],
        tracer: Tracer,
    ) -> None:
        self._address = address
        self._hello = hello
        self._drafter = drafter
        self._open_link = open_link
        self._timeouts = timeouts
        self._on_linked = on_linked
        self._tracer = tracer
        self._leaving = threading.Event()
        self._loop: DraftLoop | None = None
        self._linked_at: float | None = None
        self._last_failure = ""

    def stop(self, reason: str) -> None:
        """Leave soon (from a signal handler)."""
        self._leaving.set()
        if self._loop is not None:
            self._loop.stop(reason)
        else:
            log.info("leaving: %s", reason)

    def run(self) -> None:
        """Until told to leave.

        Raises:
            ConfigError: the target refuses this draft.
            PeerLost: no target for as long as `timeouts` allows.
        """
        give_up = time.monotonic() + self._timeouts.first
        pause, never = FIRST_PAUSE_S, True
        while not self._leaving.is_set():
            self._linked_at = None
            try:
                self._draft(give_up)
                return
            except (PeerLost, ProtocolError, _DraftFailed) as lost:
                now = time.monotonic()
                if self._linked_at is not None:
                    never = False
                    give_up = now + self._timeouts.again
                    pause = FIRST_PAUSE_S if now - self._linked_at > UNLINKED_S else pause
                left = give_up - now
                if left <= pause:
                    timeouts = self._timeouts.first if never else self._timeouts.again
                    raise PeerLost("target", 0, -1, f"no target within {timeouts:g} s: {lost}") from None
                log.warning("%s; trying again for %.0f s", lost, left)
            self._drafter.reset()
            self._leaving.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _draft(self, give_up: float) -> None:
        """Join and draft until the end of the link. Returns when told to leave."""
        with contextlib.closing(ControlPeer.connect(self._address)) as control:
            welcome = self._ask(control, give_up)
            if welcome is None:
                return
            with contextlib.closing(self._open_link(welcome.link)) as link:
                self._linked_at = time.monotonic()
                self._on_linked(welcome.rank)
                log.info("linked to the target at %s (epoch %d)", self._address, welcome.link.epoch)
                self._loop = DraftLoop(self._drafter, control, link, self._tracer, self._timeouts.control)
                try:
                    if not self._leaving.is_set():
                        self._loop.run()
                except (PeerLost, ProtocolError):
                    raise
                except Exception as error:
                    raise self._failed(error) from error
                finally:
                    self._loop = None

    def _failed(self, error: Exception) -> _DraftFailed:
        """What is said of a failure: where it came from only once, if it comes again and again."""
        failure = told(error)
        if failure != self._last_failure:
            log.error("this draft failed", exc_info=error)
            self._last_failure = failure
        return _DraftFailed(f"this draft failed ({failure})")

    def _ask(self, control: ControlPeer, give_up: float) -> Welcome | None:
        """The answer that says where to build the link; None if told to leave."""
        control.send(self._hello)
        while not self._leaving.is_set():
            try:
                answer = control.wait_for(Welcome, Refused, Shutdown, timeout_s=min(1.0, give_up - time.monotonic()))
            except PeerLost:
                if time.monotonic() < give_up and control.alive():
                    continue
                if control.alive():
                    raise PeerLost("target", 0, -1, f"no target at {self._address} so far") from None
                raise
            if isinstance(answer, Welcome):
                return answer
            if isinstance(answer, Shutdown):
                log.info("leaving: %s", answer.reason)
                return None
            assert isinstance(answer, Refused)
            if not answer.again:
                raise ConfigError(f"the target refused this draft: {answer.reason}")
            raise PeerLost("target", 0, -1, f"it has no place for this draft: {answer.reason}")
        return None
