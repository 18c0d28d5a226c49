"""What links between processes promise beyond the common suite: deadlines, dead peers, strangers, nothing left over."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

from ssd_runtime.comm.link.endpoint import LinkTiming
from ssd_runtime.comm.link.setup import LinkHost, open_draft_link
from ssd_runtime.errors import ConfigError, PeerLost
from tests.conformance.links import (
    BRISK,
    SHAPE,
    SOON,
    Pair,
    RemoteProcess,
    make_threads,
    outcomes,
    tree,
)
from tests.conformance.nccl_stand_in import OVER_NCCL, stand_in

IMPATIENT = LinkTiming(build=0.5, heartbeat=0.2, silence=1.0)


@pytest.fixture(params=["gloo", "nccl"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What links are built with: each test below holds over each carrier."""
    stand_in(monkeypatch.setattr)
    return OVER_NCCL if request.param == "nccl" else {}


@pytest.fixture
def pair(how: dict[str, Any]) -> Iterator[Pair]:
    yield from make_threads(**how)


@pytest.fixture
def victim() -> Iterator[RemoteProcess]:
    process = RemoteProcess()
    yield process
    process.end()


def test_an_idle_link_outlives_its_deadline_by_keepalives(pair: Pair) -> None:
    assert pair.target.receive(2.5 * BRISK.silence) == []
    pair.draft.send(tree(1))
    assert pair.target.receive(SOON) == [tree(1)]
    pair.target.send(outcomes(1))
    assert pair.draft.receive(SOON) == [outcomes(1)]


def test_both_directions_are_built_within_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that comes for the first and is gone for the second must not have a deadline for each."""
    given: list[float] = []

    def group(store: object, rank: int, host: str, timeout: timedelta) -> object:
        given.append(timeout.total_seconds())
        if len(given) > 2:
            raise RuntimeError("nobody came")
        time.sleep(0.2)
        return object()

    monkeypatch.setattr("ssd_runtime.comm.link.setup.gloo_group", group)
    timing, lost = LinkTiming(build=SOON), []
    with contextlib.closing(LinkHost("127.0.0.1")) as host:
        address = host.next_address(SHAPE)

        def come() -> None:
            try:
                open_draft_link(address, timing)
            except PeerLost as error:
                lost.append(error)

        thread = threading.Thread(target=come)
        thread.start()
        with pytest.raises(PeerLost):
            host.open(address, timing)
        thread.join(SOON)
    assert len(lost) == 1
    assert given[2] <= given[0] - 0.2 < SOON


def test_garbage_on_the_wire_loses_the_peer(pair: Pair) -> None:
    endpoint = pair.draft
    in_flight = endpoint._sending.post(torch.full((endpoint._encoder.num_words,), 7))
    with pytest.raises(PeerLost, match="not a frame"):
        pair.target.receive(SOON)
    del in_flight  # Gloo drops a send whose work and words are gone before it left


def test_a_frame_damaged_behind_its_header_loses_the_peer(pair: Pair) -> None:
    endpoint = pair.draft
    words = endpoint._encoder.encode(tree(1)).clone()
    words[20] += 1
    in_flight = endpoint._sending.post(words)
    with pytest.raises(PeerLost, match="checksum"):
        pair.target.receive(SOON)
    with pytest.raises(PeerLost, match="checksum"):
        pair.target.send(outcomes(1))
    del in_flight


def test_closing_leaves_no_thread_and_no_socket(how: dict[str, Any]) -> None:
    def count() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    for _ in make_threads(**how):
        pass  # whatever torch keeps for ever is there after the first
    before = count()
    for _ in make_threads(**how):
        assert count() > before
    deadline = time.monotonic() + SOON
    while count() > before and time.monotonic() < deadline:
        threading.Event().wait(0.01)  # the kernel takes its time to forget a thread
    assert count() <= before


def test_a_peer_that_never_comes_is_missed_at_the_deadline(how: dict[str, Any]) -> None:
    host = LinkHost("127.0.0.1")
    address = host.next_address(SHAPE)
    for open_link, role in ((host.open, "draft"), (open_draft_link, "target")):
        start = time.monotonic()
        with pytest.raises(PeerLost, match=f"{role} rank . .*did not meet at 127.0.0.1") as caught:
            open_link(address, IMPATIENT, **how)
        assert caught.value.role == role
        assert time.monotonic() - start < SOON
    host.close()


def test_a_meeting_place_that_is_not_there_is_a_lost_target(how: dict[str, Any]) -> None:
    host = LinkHost("127.0.0.1")
    address = host.next_address(SHAPE)
    host.close()
    del host
    gc.collect()
    with pytest.raises(PeerLost, match="target rank 0"):
        open_draft_link(address, IMPATIENT, **how)


def test_links_at_a_host_that_is_not_ours_are_a_config_error() -> None:
    LinkHost("127.0.0.1").check()
    with pytest.raises(ConfigError, match=r"cannot build links at 192\.0\.2\.1"):
        LinkHost("192.0.2.1").check()


@pytest.mark.parametrize("change", [{"session": "of another engine"}, {"epoch": 99}])
def test_strangers_are_not_met(change: dict[str, object]) -> None:
    host = LinkHost("127.0.0.1")
    address = host.next_address(SHAPE)
    lost: list[PeerLost] = []

    def come_as_a_stranger() -> None:
        try:
            open_draft_link(dataclasses.replace(address, **change), IMPATIENT)  # type: ignore[arg-type]
        except PeerLost as error:
            lost.append(error)

    thread = threading.Thread(target=come_as_a_stranger)
    thread.start()
    with pytest.raises(PeerLost):
        host.open(address, IMPATIENT)
    thread.join(SOON)
    assert len(lost) == 1
    host.close()


def test_two_engines_on_one_host_do_not_meet(how: dict[str, Any]) -> None:
    first, second = make_threads(**how), make_threads(**how)
    one, two = next(first), next(second)
    one.target.send(outcomes(1))
    two.target.send(outcomes(2))
    assert one.draft.receive(SOON) == [outcomes(1)]
    assert two.draft.receive(SOON) == [outcomes(2)]
    one.target.close()
    two.draft.send(tree(5))
    assert two.target.receive(SOON) == [tree(5)]
    for rest in (first, second):
        assert next(rest, None) is None


@pytest.mark.process
@pytest.mark.parametrize(("signal_number", "within"), [(signal.SIGKILL, 0.9), (signal.SIGSTOP, 3.0)])
@pytest.mark.parametrize(("how", "role"), [("gloo", "draft"), ("gloo", "target"), ("nccl", "draft")], indirect=["how"])
def test_a_killed_or_stopped_peer_is_noticed_and_closing_stays_quick(
    victim: RemoteProcess, role: str, signal_number: int, within: float, how: dict[str, Any]
) -> None:
    host = LinkHost("127.0.0.1")
    address = host.next_address(SHAPE) if role == "draft" else victim.next_address()
    victim.start_opening(role, address, BRISK, **how)
    link = (host.open if role == "draft" else open_draft_link)(address, BRISK, **how)
    victim.finish()
    assert link.receive() == []

    os.kill(victim.pid, signal_number)
    start = time.monotonic()
    with pytest.raises(PeerLost, match=f"{role} rank"):
        link.receive(SOON)
    assert time.monotonic() - start < within
    start = time.monotonic()
    link.close()
    assert time.monotonic() - start < BRISK.close + 1
    host.close()


@pytest.mark.process
def test_closing_is_bounded_beside_a_stopped_peer_that_was_not_missed_yet(
    victim: RemoteProcess, how: dict[str, Any]
) -> None:
    patient = LinkTiming(build=SOON, heartbeat=20, silence=60, close=0.5)
    host = LinkHost("127.0.0.1")
    address = host.next_address(SHAPE)
    victim.start_opening("draft", address, patient, **how)
    link = host.open(address, patient, **how)
    victim.finish()
    os.kill(victim.pid, signal.SIGSTOP)
    for round in range(100):  # more than the wire takes from a peer that does not read
        link.send(outcomes(round))
    start = time.monotonic()
    link.close()
    assert time.monotonic() - start < 3
    host.close()


@pytest.mark.process
def test_after_a_loss_the_next_epoch_is_a_new_link(victim: RemoteProcess) -> None:
    host = LinkHost("127.0.0.1")
    address = host.next_address(SHAPE)
    victim.start_opening("draft", address, BRISK)
    link = host.open(address, BRISK)
    victim.finish()
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(PeerLost):
        link.receive(SOON)
    link.close()

    successor = RemoteProcess()
    try:
        address = host.next_address(SHAPE)
        successor.start_opening("draft", address, BRISK)
        link = host.open(address, BRISK)
        successor.finish()
        link.send(outcomes(1))
        assert successor.call("receive", SOON) == [outcomes(1)]
        link.close()
    finally:
        successor.end()
        host.close()
