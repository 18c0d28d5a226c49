"""The acceptor gives each draft a number: those of the leader's torchrun their rank, the others what is free. However
many knock, it builds a bounded number of links at a time.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ssd_runtime.comm.control.draft_messages import Hello, LinkAddress, Welcome
from ssd_runtime.comm.control.messages import Message, Refused
from ssd_runtime.comm.link.endpoint import LinkTiming
from ssd_runtime.comm.protocol import PROTOCOL_VERSION, FrameShape, VocabularyDigest
from ssd_runtime.errors import ConfigError, PeerLost
from ssd_runtime.leader.acceptor import SPARE_BUILDS, DraftAcceptor, Terms
from tests.process.runs import eventually

VOCABULARY = VocabularyDigest.of(["a", "b"])
SHAPE = FrameShape.of(1, 1, 1, 0)


class Server:
    """A control socket that keeps what is sent; whoever is in `gone` has left."""

    def __init__(self) -> None:
        self.sent: dict[bytes, list[Message]] = {}
        self.gone: set[bytes] = set()
        self.waiting: list[tuple[bytes, Message]] = []
        self.looks = 0

    def send(self, identity: bytes, message: Message) -> bool:
        self.sent.setdefault(identity, []).append(message)
        return identity not in self.gone

    def alive(self, identity: bytes) -> bool:
        self.looks += 1
        return identity not in self.gone

    def poll(self, timeout_s: float) -> list[tuple[bytes, Message]]:
        waiting, self.waiting = self.waiting, []
        return waiting


class Host:
    """Gives addresses that nobody meets at; `open` builds links."""

    def __init__(self, open: Callable[..., Any]) -> None:
        self.open = open
        self.epoch = 0

    def next_address(self, shape: FrameShape) -> LinkAddress:
        self.epoch += 1
        return LinkAddress("127.0.0.1", 1, "session", self.epoch, shape)

    def forget(self, address: LinkAddress) -> None:
        self.forgotten = address.epoch


def hello(name: str, rank: int = 0) -> Hello:
    return Hello(PROTOCOL_VERSION, "draft", rank, "digest", VOCABULARY, name)


class Builds:
    """Builds of links that last until the test says what becomes of them."""

    def __init__(self) -> None:
        self.begun: list[int] = []  # epochs
        self.outcome: Exception | None = None
        self.may_end = threading.Event()

    def __call__(self, address: LinkAddress, timing: LinkTiming, gpu: None) -> Any:
        self.begun.append(address.epoch)
        assert self.may_end.wait(20.0)
        if self.outcome is not None:
            raise self.outcome
        return SimpleNamespace(close=lambda: None)

    def end(self, opened: tuple[DraftAcceptor, Server], outcome: Exception | None = None) -> None:
        """All that have begun, and until the test says otherwise those that begin from now on."""
        self.outcome = outcome
        self.may_end.set()
        eventually(lambda: not building(), 20.0, "the threads have ended")
        opened[0]._settle()


def building() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("link-build")]


def acceptor(ranks: range, residents: int = 0, builds: Builds | None = None) -> tuple[DraftAcceptor, Server]:
    """One whose links are built at once, unless `builds` says otherwise."""
    server = Server()
    link: Any = SimpleNamespace(close=lambda: None)
    terms = Terms("digest", VOCABULARY, SHAPE, LinkTiming(), ranks, residents)
    host = Host(builds or (lambda address, timing, gpu: link))
    return DraftAcceptor(server, host, terms), server  # type: ignore[arg-type]


def knock(opened: tuple[DraftAcceptor, Server], name: str, rank: int = 0) -> Message:
    """The answer to a draft of that name."""
    assert opened[0].knock(name.encode(), hello(name, rank)) is None
    eventually(lambda: not building(), 20.0, "what is built at once is built")
    return opened[1].sent[name.encode()][-1]


def number(opened: tuple[DraftAcceptor, Server], name: str, rank: int = 0) -> int:
    answer = knock(opened, name, rank)
    assert isinstance(answer, Welcome), answer
    return answer.rank


@pytest.fixture(autouse=True)
def look_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssd_runtime.leader.acceptor.PULSE_S", 0.0)


def test_drafts_of_their_own_torchruns_get_the_first_free_numbers() -> None:
    opened = acceptor(range(4, 7))
    assert [number(opened, name) for name in "abc"] == [4, 5, 6]
    assert knock(opened, "d") == Refused("this engine has its 3 drafts already", again=True)
    opened[1].gone.add(b"b")
    assert number(opened, "d") == 5


def test_a_draft_with_a_smaller_pool_than_the_target_s_is_refused_with_the_number_to_set() -> None:
    opened = acceptor(range(1, 2))
    opened[0]._terms = dataclasses.replace(opened[0]._terms, num_blocks=9)
    for blocks, welcome in ((8, False), (9, True)):
        reason = opened[0].knock(b"a", dataclasses.replace(hello("a"), num_blocks=blocks))
        assert (reason is None) == welcome
        (answer,) = opened[1].sent.pop(b"a")
        assert isinstance(answer, Welcome if welcome else Refused)
        if isinstance(answer, Refused):
            assert not answer.again
            assert answer.reason.endswith("and the target's 9: start both with engine.num_blocks = 8")


def test_a_draft_that_knocks_again_keeps_its_number() -> None:
    opened = acceptor(range(1, 3))
    assert (number(opened, "a"), number(opened, "b"), number(opened, "b")) == (1, 2, 2)


def test_ranks_of_the_leaders_torchrun_keep_theirs_whoever_comes_first() -> None:
    opened = acceptor(range(1, 4), residents=2)
    assert number(opened, "guest") == 3
    assert knock(opened, "another guest") == Refused("this engine has its 3 drafts already", again=True)
    assert (number(opened, "second", 2), number(opened, "first", 1)) == (2, 1)


def test_drafts_go_by_their_numbers() -> None:
    opened = acceptor(range(1, 3))
    for name in "ab":
        opened[1].waiting.append((name.encode(), hello(name)))
    opened[0].await_first(2, 20.0, lambda: False)
    assert sorted(draft.rank for draft in opened[0].arrived()) == [1, 2]


def test_all_drafts_of_the_world_are_waited_for_and_the_missing_are_counted() -> None:
    opened = acceptor(range(1, 3), residents=2)
    opened[1].waiting.append((b"a", hello("a", 1)))
    opened[0].await_first(1, 20.0, lambda: False)
    with pytest.raises(ConfigError, match="only 1 of 2 drafts came within 0 s"):
        opened[0].await_first(2, 0.0, lambda: False)
    stopping = threading.Event()
    stopping.set()
    opened[0].await_first(2, 20.0, stopping.is_set)


# ---- floods ----------------------------------------------------------------------------------------------------------

MANY = 1500
BEING_BUILT = Refused("a link for this place is being built", again=True)


def answers(server: Server) -> list[Message]:
    return [message for sent in server.sent.values() for message in sent]


@pytest.mark.parametrize("connections", [1, MANY])
def test_however_often_one_draft_knocks_one_link_is_built_for_it(connections: int) -> None:
    builds = Builds()
    opened = acceptor(range(1, 3), builds=builds)
    for i in range(MANY):
        assert opened[0].knock(f"{i % connections}".encode(), hello("one")) is None
    assert len(building()) == len(builds.begun) == 1
    welcome, *others = answers(opened[1])
    assert isinstance(welcome, Welcome)
    assert others == [BEING_BUILT] * (MANY - 1)
    builds.end(opened)
    assert [draft.rank for draft in opened[0].arrived()] == [1]


def test_however_many_drafts_knock_one_link_is_built_for_each_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssd_runtime.leader.acceptor.PULSE_S", 60.0)
    builds = Builds()
    opened = acceptor(range(1, 4), builds=builds)
    for i in range(MANY):
        assert opened[0].knock(f"{i}".encode(), hello(f"{i}")) is None
    assert len(building()) == len(builds.begun) == 3
    assert sum(isinstance(message, Welcome) for message in answers(opened[1])) == 3
    assert opened[1].looks == 0, "a draft at work is sent something because others knock"
    builds.end(opened)
    assert sorted(draft.rank for draft in opened[0].arrived()) == [1, 2, 3]


def test_drafts_that_knock_and_leave_at_once_get_a_bounded_number_of_links_built() -> None:
    builds = Builds()
    opened = acceptor(range(1, 3), builds=builds)
    for i in range(MANY):
        assert opened[0].knock(f"{i}".encode(), hello(f"{i}")) is None
        opened[1].gone.add(f"{i}".encode())
    assert len(building()) == len(builds.begun) == 2 + SPARE_BUILDS
    builds.end(opened, PeerLost("draft", 1, -1, "nobody came"))
    assert not opened[0].arrived()
    builds.outcome = None
    assert (number(opened, "honest"), number(opened, "another")) == (1, 2)


def test_a_draft_takes_the_place_of_one_that_left_while_its_link_was_built() -> None:
    builds = Builds()
    opened = acceptor(range(1, 2), builds=builds)
    opened[0].knock(b"first", hello("draft"))
    assert opened[0].knock(b"second", hello("draft")) is None
    assert opened[1].sent[b"second"] == [BEING_BUILT]
    opened[1].gone.add(b"first")
    opened[0].knock(b"second", hello("draft"))
    assert isinstance(opened[1].sent[b"second"][-1], Welcome)
    builds.end(opened)
    assert len(opened[0].arrived()) == 1  # the other link is closed: nobody is there any more


def test_a_place_is_free_again_however_the_building_of_its_link_ended(caplog: pytest.LogCaptureFixture) -> None:
    for outcome, said in ((PeerLost("draft", 1, -1, "nobody came"), "nobody came"), (ValueError("odd"), "odd")):
        builds = Builds()
        opened = acceptor(range(1, 2), builds=builds)
        opened[0].knock(b"a", hello("a"))
        builds.end(opened, outcome)
        assert said in caplog.text
        builds.outcome = None
        assert number(opened, "b") == 1


def test_a_welcome_that_does_not_arrive_leaves_no_port_open() -> None:
    opened, server = acceptor(range(1, 2))
    server.gone.add(b"a")
    knock((opened, server), "a")
    assert opened._host.forgotten == 1  # type: ignore[attr-defined]
    assert not opened.is_building


def test_a_draft_for_which_no_port_is_left_is_put_off_and_the_leader_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = acceptor(range(1, 2))

    def full(host: Host, shape: FrameShape) -> LinkAddress:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Host, "next_address", full)
    assert knock(opened, "a") == Refused("no port for a link: Too many open files", again=True)
