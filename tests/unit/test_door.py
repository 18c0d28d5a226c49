"""The door gives each draft a number: those of the leader's torchrun their rank, the others what is free."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from ssd_runtime.comm.link import LinkTiming
from ssd_runtime.comm.messages import Message, Refused
from ssd_runtime.comm.messages_draft import Hello, LinkAddress, Welcome
from ssd_runtime.comm.protocol import PROTOCOL_VERSION, FrameShape, VocabularyDigest
from ssd_runtime.errors import ConfigError
from ssd_runtime.target.door import Door, Terms

VOCABULARY = VocabularyDigest.of(["a", "b"])
SHAPE = FrameShape.of(1, 1, 1, 0)


class Server:
    """A control socket that keeps what is sent; whoever is in `gone` has left."""

    def __init__(self) -> None:
        self.sent: dict[bytes, list[Message]] = {}
        self.gone: set[bytes] = set()
        self.waiting: list[tuple[bytes, Message]] = []

    def send(self, identity: bytes, message: Message) -> bool:
        self.sent.setdefault(identity, []).append(message)
        return identity not in self.gone

    def alive(self, identity: bytes) -> bool:
        return identity not in self.gone

    def poll(self, timeout_s: float) -> list[tuple[bytes, Message]]:
        waiting, self.waiting = self.waiting, []
        return waiting


class Host:
    """Gives addresses that nobody meets at."""

    epoch = 0

    def next_address(self, shape: FrameShape) -> LinkAddress:
        self.epoch += 1
        return LinkAddress("127.0.0.1", 1, "session", self.epoch, shape)


def hello(name: str, rank: int = 0) -> Hello:
    return Hello(PROTOCOL_VERSION, "draft", rank, "digest", VOCABULARY, name)


def door(ranks: range, residents: int = 0) -> tuple[Door, Server]:
    server = Server()
    link: Any = SimpleNamespace(close=lambda: None)
    terms = Terms("digest", VOCABULARY, SHAPE, LinkTiming(), ranks, residents)
    return Door(server, Host(), terms, lambda address, timing: link), server  # type: ignore[arg-type]


def knock(opened: tuple[Door, Server], name: str, rank: int = 0) -> Message:
    """The answer to a draft of that name."""
    assert opened[0].knock(name.encode(), hello(name, rank)) is None
    return opened[1].sent[name.encode()][-1]


def number(opened: tuple[Door, Server], name: str, rank: int = 0) -> int:
    answer = knock(opened, name, rank)
    assert isinstance(answer, Welcome), answer
    return answer.rank


def test_drafts_of_their_own_torchruns_get_the_first_free_numbers() -> None:
    opened = door(range(4, 7))
    assert [number(opened, name) for name in "abc"] == [4, 5, 6]
    assert knock(opened, "d") == Refused("this engine has its 3 drafts already", again=True)
    opened[1].gone.add(b"b")
    assert number(opened, "d") == 5


def test_a_draft_that_knocks_again_keeps_its_number() -> None:
    opened = door(range(1, 3))
    assert (number(opened, "a"), number(opened, "b"), number(opened, "b")) == (1, 2, 2)


def test_ranks_of_the_leaders_torchrun_keep_theirs_whoever_comes_first() -> None:
    opened = door(range(1, 4), residents=2)
    assert number(opened, "guest") == 3
    assert knock(opened, "another guest") == Refused("this engine has its 3 drafts already", again=True)
    assert (number(opened, "second", 2), number(opened, "first", 1)) == (2, 1)


def test_drafts_go_by_their_numbers() -> None:
    opened = door(range(1, 3))
    for name in "ab":
        opened[1].waiting.append((name.encode(), hello(name)))
    opened[0].await_first(2, 20.0, lambda: False)
    assert sorted(draft.rank for draft in opened[0].arrived()) == [1, 2]


def test_all_drafts_of_the_world_are_waited_for_and_the_missing_are_counted() -> None:
    opened = door(range(1, 3), residents=2)
    opened[1].waiting.append((b"a", hello("a", 1)))
    opened[0].await_first(1, 20.0, lambda: False)
    with pytest.raises(ConfigError, match="only 1 of 2 drafts came within 0 s"):
        opened[0].await_first(2, 0.0, lambda: False)
    stopping = threading.Event()
    stopping.set()
    opened[0].await_first(2, 20.0, stopping.is_set)
