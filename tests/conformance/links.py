"""Every kind of link behind one way to make it, and a process that holds the other end. No tests here."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from ssd_runtime.comm.control.codec import decode, encode
from ssd_runtime.comm.control.draft_messages import LinkAddress, Welcome
from ssd_runtime.comm.link.endpoint import DraftLink, LinkTiming, TargetLink
from ssd_runtime.comm.link.setup import LinkHost, open_draft_link
from ssd_runtime.comm.protocol import FrameShape
from ssd_runtime.errors import PeerLost
from ssd_runtime.speculation.types import Branch, Outcome, OutcomeFrame, OutcomeRow, Source, TreeFrame
from tests.conformance.nccl_stand_in import stand_in
from tests.inproc_links import inproc_pair

SOON = 20.0  # seconds: a deadline that a healthy machine never reaches
SHAPE = FrameShape.of(max_sequences=4, lookahead=5, budget=8)
BRISK = LinkTiming(build=SOON, heartbeat=0.2, silence=1.0, close=1.0)


def outcomes(round: int) -> OutcomeFrame:
    rows = (
        OutcomeRow(7, round, Outcome(3, 99), Source.DRAFT, 2, (7, 2)),
        OutcomeRow(8, round, Outcome(0, 5), Source.NGRAM, 3, (4, 5, 6)),
        OutcomeRow(9, round, Outcome(5, 0), Source.PENDING, 0),
    )
    return OutcomeFrame(round, 12, rows)


def tree(round: int) -> TreeFrame:
    return TreeFrame(round, tuple(Branch(7, round, Outcome(i % 6, i), tuple(range(i % 6))) for i in range(16)), 900, 4)


@dataclass
class Pair:
    """Both ends of one link, each usable from the test."""

    target: TargetLink
    draft: DraftLink


def make_inproc() -> Iterator[Pair]:
    target, draft = inproc_pair()
    yield Pair(target, draft)
    target.close()
    draft.close()


def make_threads(timing: LinkTiming = BRISK, **how: Any) -> Iterator[Pair]:
    """Both ends in this process; `how` as in `LinkHost.open`."""
    host = LinkHost("127.0.0.1")
    address = host.next_address(SHAPE)
    opened: list[Any] = [None]

    def open_draft() -> None:
        opened[0] = open_draft_link(address, timing, **how)

    thread = threading.Thread(target=open_draft)
    thread.start()
    target = host.open(address, timing, **how)
    thread.join(SOON)
    yield Pair(target, opened[0])
    target.close()
    opened[0].close()
    host.close()


def make_processes(process: RemoteProcess, **how: Any) -> Iterator[Pair]:
    host = LinkHost("127.0.0.1")
    address = host.next_address(SHAPE)
    process.start_opening("draft", address, BRISK, **how)
    target = host.open(address, BRISK, **how)
    process.finish()
    yield Pair(target, RemoteDraftLink(process))
    target.close()
    process.call("close")
    host.close()


class RemoteProcess:
    """Another process that holds one link at a time and does with it what it is told."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def next_address(self) -> LinkAddress:
        """A link that this process will open as the target."""
        message = decode(self.call("next_address"))
        assert isinstance(message, Welcome)
        return message.link

    def start_opening(self, role: str, address: LinkAddress, timing: LinkTiming, **how: Any) -> None:
        self._pipe.send(("open", (role, encode(Welcome(address, 1)), timing, how)))

    def finish(self) -> Any:
        assert self._pipe.poll(SOON), "the other process does not answer"
        kind, value = self._pipe.recv()
        if kind == "lost":
            raise PeerLost(*value)
        assert kind == "result", value
        return value

    def call(self, name: str, *arguments: Any) -> Any:
        self._pipe.send((name, arguments))
        return self.finish()

    def end(self) -> None:
        self._process.kill()
        self._process.join(SOON)
        self._pipe.close()


@dataclass
class RemoteDraftLink:
    """`DraftLink` whose other end of the wire is in a `RemoteProcess`."""

    process: RemoteProcess

    def send(self, frame: TreeFrame) -> None:
        self.process.call("send", frame)

    def receive(self, timeout_s: float = 0.0) -> list[OutcomeFrame]:
        found: list[OutcomeFrame] = self.process.call("receive", timeout_s)
        return found

    def close(self) -> None:
        self.process.call("close")


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    stand_in()
    link: Any = None
    host = LinkHost("127.0.0.1")
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if name == "open":
                role, welcome, timing, how = arguments
                message = decode(welcome)
                assert isinstance(message, Welcome)
                link = (open_draft_link if role == "draft" else host.open)(message.link, timing, **how)
                value = None
            elif name == "next_address":
                value = encode(Welcome(host.next_address(SHAPE), 1))
            else:
                value = getattr(link, name)(*arguments)
        except PeerLost as lost:
            pipe.send(("lost", (lost.role, lost.rank, lost.round, lost.reason)))
        except Exception as error:  # noqa: BLE001 - the test must see it
            pipe.send(("failed", repr(error)))
        else:
            pipe.send(("result", value))
