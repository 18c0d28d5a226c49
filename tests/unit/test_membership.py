"""A draft that fails: it resets, comes back after growing pauses, and says once where it failed."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from ssd_runtime.comm.control.draft_messages import Admit, Hello, LinkAddress, Welcome
from ssd_runtime.comm.control.server import ControlServer
from ssd_runtime.comm.protocol import PROTOCOL_VERSION, FrameShape, VocabularyDigest
from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.draft.membership import JoinTimeouts, Membership
from ssd_runtime.errors import PeerLost
from ssd_runtime.speculation.types import OutcomeFrame, SamplingParams
from ssd_runtime.trace import Tracer
from tests.inproc_links import InprocDraftLink, InprocTargetLink, inproc_pair
from tests.tiny_models import tiny_decoder

SHAPE = FrameShape.of(2, 3, 4, 0)
HELLO = Hello(PROTOCOL_VERSION, "draft", 1, "config", VocabularyDigest(96, ()), "instance")
ENGINE, SPECULATION = EngineConfig(max_model_len=64, max_num_seqs=2), SpeculationConfig(lookahead=3, budget=4)
SOON = 20.0


@dataclass
class Leader:
    """Plays a target: welcomes whoever knocks, and has one sequence drafted for on every link."""

    server: ControlServer
    drafter: Drafter
    links: list[InprocTargetLink] = field(default_factory=list)
    knocks: list[float] = field(default_factory=list)
    _drafts_end: InprocDraftLink | None = None

    def __post_init__(self) -> None:
        self.membership = Membership(
            self.server.address,
            HELLO,
            self.drafter,
            self._open,
            JoinTimeouts(first=SOON, again=SOON, control=SOON),
            lambda rank: None,
            Tracer("test", enabled=False),
        )
        self.thread = threading.Thread(target=self.membership.run, daemon=True)

    def _open(self, at: LinkAddress) -> InprocDraftLink:
        assert self._drafts_end is not None
        return self._drafts_end

    def welcome(self) -> None:
        """Wait for a knock and answer it."""
        deadline = time.monotonic() + SOON
        while time.monotonic() < deadline:
            for identity, message in self.server.poll(0.1):
                assert isinstance(message, Hello)
                self.knocks.append(time.monotonic())
                link, self._drafts_end = inproc_pair()
                self.links.append(link)
                self.server.send(identity, Welcome(LinkAddress("127.0.0.1", 1, "s", len(self.links), SHAPE), 1))
                self.server.send(identity, Admit(0, (1, 2, 3, 4), SamplingParams(), "ssd", 3, 20))
                with contextlib.suppress(PeerLost):  # it may have failed over the first message already
                    link.send(OutcomeFrame(0, 1, ()))
                return
        raise AssertionError("nobody knocked")


@pytest.fixture
def leader() -> Iterator[Leader]:
    server = ControlServer.bind("127.0.0.1", 0)
    leader = Leader(server, Drafter(tiny_decoder(0), ENGINE, SPECULATION))
    leader.thread.start()
    yield leader
    leader.membership.stop("the test is over")
    leader.thread.join(SOON)
    assert not leader.thread.is_alive()
    server.close()


@pytest.mark.parametrize("method", ["grow", "advance", "admit", "tree"])
def test_a_failing_draft_comes_back_in_growing_pauses_and_then_drafts(
    leader: Leader, method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures, works = itertools.count(), getattr(leader.drafter, method)

    def fails_thrice(*arguments: object) -> object:
        if next(failures) < 3:
            raise IndexError("list index out of range")
        return works(*arguments)

    monkeypatch.setattr(leader.drafter, method, fails_thrice)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            leader.welcome()
        (tree,) = leader.links[-1].receive(SOON)
        while not tree.branches:
            tree = leader.links[-1].receive(SOON)[-1]
    assert {branch.sequence_id for branch in tree.branches} == {0}
    pauses = [later - earlier for earlier, later in itertools.pairwise(leader.knocks)]
    assert all(pause > least for pause, least in zip(pauses, (0.1, 0.2, 0.4), strict=True)), pauses
    with_traceback = [record for record in caplog.records if record.exc_info]
    assert [record.message for record in with_traceback] == ["this draft failed"]
    told = [record.message for record in caplog.records if "trying again" in record.message]
    assert len(told) == 3
    assert all("this draft failed (IndexError: list index out of range)" in message for message in told)
