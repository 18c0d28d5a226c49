"""What listens for a link survives whoever else comes: while it is built, and when it is there."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ssd_runtime.comm.collective import TargetGroup, meet_target_ranks
from ssd_runtime.comm.link import exchange, gloo_ports
from ssd_runtime.comm.link.endpoint import LinkTiming
from ssd_runtime.comm.link.groups import gloo_group
from ssd_runtime.comm.link.setup import LinkHost, open_draft_link
from ssd_runtime.errors import PeerLost
from tests.conformance.links import BRISK, SHAPE, SOON, Pair, make_threads, outcomes, tree
from tests.soak.strangers import listening, visit
from tests.target_ranks import on_every_rank

MANY = gloo_ports.STRANGERS + 500  # those who come between two looks included
GARBAGE = [b"", b"\0" * 64, b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def until(condition: object, what: str) -> None:
    deadline = time.monotonic() + SOON
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.fixture
def pair() -> Iterator[Pair]:
    yield from make_threads()


def ports() -> set[tuple[str, int]]:
    return set(listening(os.getpid()))


def test_nobody_is_heard_at_the_ports_of_a_link_that_stands(pair: Pair) -> None:
    before = descriptors()
    for host, port in ports():
        assert visit(host, port, 100) == 0
    assert descriptors() == before
    pair.target.send(outcomes(1))
    pair.draft.send(tree(1))
    assert pair.draft.receive(SOON) == [outcomes(1)]
    assert pair.target.receive(SOON) == [tree(1)]


def test_the_place_where_a_link_was_built_is_gone_once_it_stands() -> None:
    with contextlib.closing(LinkHost("127.0.0.1")) as host:
        address = host.next_address(SHAPE)
        assert (address.host, address.port) in ports()
        thread = threading.Thread(target=lambda: open_draft_link(address, BRISK).close())
        thread.start()
        host.open(address, BRISK).close()
        thread.join(SOON)
        assert (address.host, address.port) not in ports()
        forgotten = host.next_address(SHAPE)
        host.forget(forgotten)
        assert (forgotten.host, forgotten.port) not in ports()


@pytest.mark.parametrize("said", GARBAGE, ids=["silent", "zeros", "http", "ones"])
def test_strangers_at_the_meeting_place_cost_nothing_and_keep_nobody_away(said: bytes) -> None:
    with contextlib.closing(LinkHost("127.0.0.1")) as host, contextlib.ExitStack() as staying:
        address, built = host.next_address(SHAPE), []
        thread = threading.Thread(target=lambda: built.append(host.open(address, LinkTiming(build=SOON))))
        thread.start()
        before = descriptors()
        for _ in range(2 * exchange.GUESTS):  # those who stay have to make room
            stranger = staying.enter_context(socket.create_connection((address.host, address.port)))
            stranger.sendall(said)
        assert visit(address.host, address.port, 200, said) == 200
        until(lambda: descriptors() <= before + 3 * exchange.GUESTS, "strangers are hung up on")
        draft = open_draft_link(address, LinkTiming(build=SOON))
        thread.join(SOON)
        built[0].send(outcomes(1))
        assert draft.receive(SOON) == [outcomes(1)]
        draft.close()
        built[0].close()


def test_whoever_knows_another_secret_or_most_of_this_one_is_not_met() -> None:
    brief = LinkTiming(build=1.0)
    with contextlib.closing(LinkHost("127.0.0.1")) as host:
        address = host.next_address(SHAPE)
        failures: list[PeerLost] = []

        def come() -> None:
            for session in ("", address.session[:-1] + "?", address.session + "?", "x" * len(address.session)):
                try:
                    open_draft_link(dataclasses.replace(address, session=session), LinkTiming(build=0.2)).close()
                except PeerLost as lost:
                    failures.append(lost)

        thread = threading.Thread(target=come)
        thread.start()
        with pytest.raises(PeerLost, match="nobody came"):
            host.open(address, brief)
        thread.join(SOON)
        assert len(failures) == 4


def test_strangers_may_spoil_a_build_and_leave_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    """Without the guard each of them would have a descriptor until the group ends, and at the limit Gloo aborts."""
    before, found = descriptors(), ports()
    failed: list[str] = []

    def build() -> None:
        try:
            gloo_group(dist.HashStore(), 0, "127.0.0.1", timedelta(seconds=1.5))
        except RuntimeError as error:
            failed.append(str(error))

    thread = threading.Thread(target=build)
    thread.start()
    until(lambda: ports() - found, "Gloo listens")
    ((host, port),) = ports() - found
    came = most = 0
    while thread.is_alive():
        came += visit(host, port, 50, b"\0\0\0\0")
        most = max(most, descriptors() - before)
    thread.join(SOON)
    assert failed
    assert gloo_ports.STRANGERS / 2 < most < MANY
    assert came < MANY  # who came after that was not heard
    assert "it hears nobody any more" in caplog.text
    until(lambda: descriptors() <= before + 1, "all descriptors are given back")


def test_a_process_with_hardly_a_descriptor_left_builds_no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (2 * descriptors() - 2, -1))
    with pytest.raises(OSError, match="descriptors are taken"):
        gloo_group(dist.HashStore(), 0, "127.0.0.1", timedelta(seconds=1))


def test_the_ranks_of_one_target_hear_nobody_once_they_have_met() -> None:
    found = ports()

    def meet(group: TargetGroup) -> int:
        group.gather(torch.zeros(1))  # all have met
        heard = sum(visit(host, port, 20) for host, port in ports() - found) if group.rank == 0 else 0
        return heard + int(group.gather(torch.ones(1)).sum())

    assert on_every_rank(3, meet) == [3, 3, 3]


def test_a_rank_listens_nowhere_before_all_are_there() -> None:
    found, store, lost = ports(), dist.HashStore(), []

    def come() -> None:
        try:
            meet_target_ranks(store, 0, 2, "127.0.0.1", 0.5)
        except PeerLost as error:
            lost.append(error)

    thread = threading.Thread(target=come)
    thread.start()
    until(lambda: store.check(["here/0"]), "it has come")
    while thread.is_alive():
        assert ports() == found
    thread.join(SOON)
    assert len(lost) == 1
