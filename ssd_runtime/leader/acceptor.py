"""Where drafts come in, at the start or in the middle of work. Messages are the leader's thread's; links are built and
closed in threads of their own, since both take seconds when things go wrong. Knows no sequences.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ssd_runtime.comm.control.draft_messages import Hello, LinkAddress, Welcome
from ssd_runtime.comm.control.messages import Refused, Shutdown
from ssd_runtime.comm.control.server import ControlServer
from ssd_runtime.comm.link.endpoint import LinkTiming, TargetLink
from ssd_runtime.comm.link.setup import LinkHost
from ssd_runtime.comm.protocol import PROTOCOL_VERSION, FrameShape, VocabularyDigest
from ssd_runtime.errors import ConfigError, PeerLost
from ssd_runtime.leader.draft_peer import DraftPeer

log = logging.getLogger(__name__)

POLL_S = 0.02
PULSE_S = 0.5  # between two looks whether the connection of one draft is there, however many knock
SPARE_BUILDS = 2  # beyond one a place: for drafts that come in place of one that left while its link was built
CLOSING_S = 3.0  # longest wait for the threads that close links, at the end


@dataclass(frozen=True)
class Terms:
    """What a draft must fit, and what it gets.

    Attributes:
        config_digest, vocabulary: the target's.
        shape: of the frames.
        timing: deadlines of the link.
        ranks: numbers of drafts, one for each that may be there at a time.
        residents: how many of these, the first, belong to drafts of the leader's own torchrun.
        num_blocks: of the target's KV pool; a draft's is to be as large.
        gpu: of this rank, where frames travel between GPUs.
    """

    config_digest: str
    vocabulary: VocabularyDigest
    shape: FrameShape
    timing: LinkTiming
    ranks: range = range(1, 2)
    residents: int = 0
    num_blocks: int = 0
    gpu: torch.device | None = None

    def mismatch(self, hello: Hello) -> str | None:
        """Why a draft that says this does not fit, written for the user; None if all is well."""
        if hello.version != PROTOCOL_VERSION:
            return f"protocol version {hello.version} of the {hello.role}, the target speaks {PROTOCOL_VERSION}"
        if hello.role != "draft" or hello.rank < 0:
            return f"rank {hello.rank} says it is a {hello.role}; only a draft (rank 0 or above) may join"
        if hello.config_digest != self.config_digest:
            return (
                f"configuration {hello.config_digest} of the draft, {self.config_digest} of the target: "
                "start both with the same [engine], [speculation] and [link] sections"
            )
        if hello.num_blocks < self.num_blocks:
            return (
                f"the draft's KV pool has {hello.num_blocks} blocks and the target's {self.num_blocks}: "
                f"start both with engine.num_blocks = {hello.num_blocks}"
            )
        difference = self.vocabulary.differs_from(hello.vocabulary)
        return f"target's and draft's {difference}: choose a draft of the target's family" if difference else None

    def ranks_for(self, hello: Hello) -> range:
        """The numbers that this draft may have."""
        first, guests = self.ranks[: self.residents], self.ranks[self.residents :]
        return range(hello.rank, hello.rank + 1) if hello.rank in first else guests


@dataclass(eq=False)
class _Visit:
    """One Hello that was welcomed: its link is being built, or was. `rank` is the draft's number."""

    identity: bytes
    hello: Hello
    rank: int
    peer: DraftPeer | None = None
    looked_at: float = field(default_factory=time.monotonic)


class DraftAcceptor:
    """Lets drafts in.

    Args:
        server: the leader's control socket.
        host: where links are made.
        terms: what a draft must fit.

    Attributes:
        has_news: links were built, or could not be, since `arrived` was asked.
    """

    def __init__(self, server: ControlServer, host: LinkHost, terms: Terms) -> None:
        self._server = server
        self._host = host
        self._terms = terms
        self._visits: dict[str, _Visit] = {}  # by instance; at most one a place
        self._building: list[_Visit] = []  # whose thread has not ended, whether or not it is still expected
        self.has_news = False
        self._built: queue.SimpleQueue[tuple[_Visit, TargetLink | PeerLost]] = queue.SimpleQueue()
        self._ready: list[DraftPeer] = []
        self._threads: list[threading.Thread] = []

    @property
    def is_building(self) -> bool:
        """Whether a link is on its way."""
        return any(visit.peer is None for visit in self._visits.values())

    def knock(self, identity: bytes, hello: Hello) -> str | None:
        """Answer a Hello; if it is welcome its link is built from now on. Returns why it does not fit, or None."""
        if reason := self._terms.mismatch(hello):
            self._server.send(identity, Refused(reason))
            return reason
        self._settle()
        self._make_room(hello.instance)
        taken = {visit.rank for visit in self._visits.values()}
        free = [rank for rank in self._terms.ranks_for(hello) if rank not in taken]
        idle = [rank for rank in free if all(visit.rank != rank for visit in self._building)]
        if hello.instance in self._visits or (free and not idle and not self._may_build_one_more):
            self._server.send(identity, Refused("a link for this place is being built", again=True))
        elif not free:
            seats = len(self._terms.ranks)
            drafts = "draft" if seats == 1 else f"{seats} drafts"
            self._server.send(identity, Refused(f"this engine has its {drafts} already", again=True))
        else:
            self._welcome(identity, hello, (idle or free)[0])
        return None

    def _make_room(self, instance: str) -> None:
        """Give up the places of those whose connection is gone, and of whoever has a link and knocks again."""
        for key, visit in list(self._visits.items()):
            if (key == instance and visit.peer is not None) or not self._is_there(visit):
                del self._visits[key]
                if visit.peer is not None:
                    visit.peer.replace()

    def _is_there(self, visit: _Visit) -> bool:
        """Now and then it is looked: that sends something, which is not to pile up at a draft because others knock."""
        now = time.monotonic()
        if now - visit.looked_at < PULSE_S:
            return True
        visit.looked_at = now
        return self._server.alive(visit.identity)

    @property
    def _may_build_one_more(self) -> bool:
        """Where one link for a place is being built already: each takes a thread, and seconds if nobody meets it."""
        return len(self._building) < len(self._terms.ranks) + SPARE_BUILDS

    def _welcome(self, identity: bytes, hello: Hello, rank: int) -> None:
        try:
            address = self._host.next_address(self._terms.shape)
        except OSError as error:
            self._server.send(identity, Refused(f"no port for a link: {error.strerror}", again=True))
            return
        if not self._server.send(identity, Welcome(address, rank)):
            self._host.forget(address)
        else:
            visit = self._visits[hello.instance] = _Visit(identity, hello, rank)
            self._building.append(visit)
            self._in_background(lambda: self._build(visit, address), f"link-build-{address.epoch}")

    def _build(self, visit: _Visit, address: LinkAddress) -> None:
        link: TargetLink | PeerLost
        try:
            link = self._host.open(address, self._terms.timing, self._terms.gpu)
        except PeerLost as lost:
            link = lost
        except Exception as error:  # the place is to be free again
            log.exception("this is a bug")
            link = PeerLost("draft", visit.rank, -1, f"{type(error).__name__}: {error}")
        self._built.put((visit, link))
        self.has_news = True

    def arrived(self) -> list[DraftPeer]:
        """Drafts whose link was built since the last call."""
        self.has_news = False
        self._settle()
        ready, self._ready = self._ready, []
        return ready

    def _settle(self) -> None:
        while not self._built.empty():
            visit, link = self._built.get_nowait()
            self._building.remove(visit)
            expected = self._visits.get(visit.hello.instance) is visit
            if isinstance(link, PeerLost):
                log.warning("%s", link)
                if expected:
                    del self._visits[visit.hello.instance]
            elif expected:
                visit.peer = DraftPeer(self._server, visit.identity, visit.rank, link)
                self._ready.append(visit.peer)
            else:  # it knocked again, or left, while this link was being built
                self._in_background(link.close, "link-close")

    def let_go(self, draft: DraftPeer) -> None:
        """Close a draft that is lost, without waiting."""
        self._visits = {key: visit for key, visit in self._visits.items() if visit.peer is not draft}
        self._in_background(draft.close_link, "link-close")

    def await_first(self, count: int, deadline_s: float, stopping: Callable[[], bool]) -> None:
        """Wait until `count` links are built, before anyone is served; ends early if `stopping()`.

        Raises:
            ConfigError: fewer drafts came within `deadline_s`, or one does not fit (the draft is told so, too).
        """
        deadline = time.monotonic() + deadline_s
        while len(self._ready) < count and not stopping():
            self._settle()
            if time.monotonic() > deadline:
                came = "no draft" if not self._ready else f"only {len(self._ready)} of {count} drafts"
                raise ConfigError(
                    f"{came} came within {deadline_s:g} s: start a draft rank beside the target, or with --role "
                    "draft where it has a torchrun of its own, or choose speculation.mode ar or sd-colocated"
                )
            for identity, message in self._server.poll(POLL_S):
                if not isinstance(message, Hello):
                    self._server.send(identity, Refused("the engine is still loading", again=True))
                elif reason := self.knock(identity, message):
                    raise ConfigError(f"the draft (rank {message.rank}) does not fit: {reason}")

    def close(self, reason: str) -> None:
        """Tell every draft to leave, and close the links."""
        for visit in self._visits.values():
            self._server.send(visit.identity, Shutdown(reason))
            if visit.peer is not None:
                self._in_background(visit.peer.close_link, "link-close")
        self._visits.clear()
        self._settle()  # closes what was built meanwhile
        deadline = time.monotonic() + CLOSING_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _in_background(self, act: Callable[[], None], name: str) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=act, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()
