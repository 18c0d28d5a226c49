"""What every link promises, whatever carries it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from ssd_runtime.errors import PeerLost
from ssd_runtime.speculation.types import OutcomeFrame, TreeFrame
from tests.conformance.links import (
    SOON,
    Pair,
    RemoteProcess,
    make_inproc,
    make_processes,
    make_threads,
    outcomes,
    tree,
)
from tests.conformance.nccl_stand_in import OVER_NCCL, stand_in


@pytest.fixture(scope="module")
def other_process() -> Iterator[RemoteProcess]:
    process = RemoteProcess()
    yield process
    process.end()


IN_PROCESSES = [pytest.param(f"{carrier}-processes", marks=pytest.mark.process) for carrier in ("gloo", "nccl")]


@pytest.fixture(params=["inproc", "gloo-threads", "nccl-threads", *IN_PROCESSES])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    stand_in(monkeypatch.setattr)
    carrier, _, ends = request.param.partition("-")
    how = OVER_NCCL if carrier == "nccl" else {}
    if carrier == "inproc":
        yield from make_inproc()
    elif ends == "threads":
        yield from make_threads(**how)
    else:
        yield from make_processes(request.getfixturevalue("other_process"), **how)


def read_outcomes(pair: Pair, count: int) -> list[OutcomeFrame]:
    found: list[OutcomeFrame] = []
    while len(found) < count:
        arrived = pair.draft.receive(SOON)
        assert arrived, "nothing arrived"
        found += arrived
    return found


def newest_tree(pair: Pair, round: int) -> list[TreeFrame]:
    found: list[TreeFrame] = []
    while not found or found[-1].round < round:
        arrived = pair.target.receive(SOON)
        assert arrived, "nothing arrived"
        found += arrived
    return found


def test_outcomes_arrive_whole(pair: Pair) -> None:
    pair.target.send(outcomes(1))
    assert pair.draft.receive(SOON) == [outcomes(1)]


def test_trees_arrive_whole(pair: Pair) -> None:
    pair.draft.send(tree(1))
    assert pair.target.receive(SOON) == [tree(1)]


def test_no_outcome_is_ever_dropped_or_overtaken(pair: Pair) -> None:
    for round in range(200):
        pair.target.send(outcomes(round))
    assert read_outcomes(pair, 200) == [outcomes(round) for round in range(200)]


def test_the_newest_of_many_trees_arrives_last(pair: Pair) -> None:
    for round in range(50):
        pair.draft.send(tree(round))
    found = newest_tree(pair, 49)
    assert found == [tree(frame.round) for frame in found]
    assert [frame.round for frame in found] == sorted({frame.round for frame in found})


def test_polling_an_empty_link_gives_nothing_at_once(pair: Pair) -> None:
    took = []
    for _ in range(3):
        start = time.monotonic()
        assert pair.target.receive() == []
        assert pair.draft.receive() == []
        took.append(time.monotonic() - start)
    assert min(took) < 0.5  # a busy machine may have paused one of them


def test_what_was_read_is_not_read_again(pair: Pair) -> None:
    pair.target.send(outcomes(1))
    read_outcomes(pair, 1)
    assert pair.draft.receive() == []


def test_waiting_ends_at_its_deadline_with_nothing(pair: Pair) -> None:
    start = time.monotonic()
    assert pair.target.receive(0.1) == []
    assert pair.draft.receive(0.1) == []
    assert 0.2 <= time.monotonic() - start < SOON


def test_a_frame_ends_the_waiting(pair: Pair) -> None:
    sender = threading.Timer(0.1, lambda: pair.draft.send(tree(3)))
    sender.start()
    start = time.monotonic()
    assert pair.target.receive(SOON) == [tree(3)]
    assert time.monotonic() - start < SOON / 2
    sender.join()


def test_rounds_go_back_and_forth(pair: Pair) -> None:
    for round in range(100):
        pair.target.send(outcomes(round))
        assert pair.draft.receive(SOON) == [outcomes(round)]
        pair.draft.send(tree(round))
        assert pair.target.receive(SOON) == [tree(round)]


def test_trees_sent_before_a_close_are_read_and_then_the_draft_is_lost(pair: Pair) -> None:
    pair.draft.send(tree(1))
    pair.draft.close()
    assert pair.target.receive(SOON) == [tree(1)]
    with pytest.raises(PeerLost, match=r"draft rank 1 .*closed the link"):
        pair.target.receive(SOON)
    with pytest.raises(PeerLost):
        pair.target.receive()
    with pytest.raises(PeerLost):
        pair.target.send(outcomes(2))


def test_outcomes_sent_before_a_close_are_read_and_then_the_target_is_lost(pair: Pair) -> None:
    for round in range(20):
        pair.target.send(outcomes(round))
    pair.target.close()
    assert read_outcomes(pair, 20) == [outcomes(round) for round in range(20)]
    with pytest.raises(PeerLost, match=r"target rank 0 .*closed the link"):
        pair.draft.receive(SOON)
    with pytest.raises(PeerLost):
        pair.draft.send(tree(2))


def test_a_close_ends_the_other_sides_waiting(pair: Pair) -> None:
    closer = threading.Timer(0.1, pair.draft.close)
    closer.start()
    start = time.monotonic()
    with pytest.raises(PeerLost, match="draft rank 1"):
        pair.target.receive(SOON)
    assert time.monotonic() - start < SOON / 2
    closer.join()


def test_a_link_one_has_closed_oneself_cannot_be_used(pair: Pair) -> None:
    pair.target.close()
    for use in (lambda: pair.target.send(outcomes(1)), pair.target.receive):
        with pytest.raises(PeerLost, match="this side closed"):
            use()


def test_closing_is_quick_on_both_sides_and_may_be_repeated(pair: Pair) -> None:
    start = time.monotonic()
    for _ in range(2):
        pair.target.close()
        pair.draft.close()
    assert time.monotonic() - start < 2


def test_a_lost_peer_is_reported_with_the_round(pair: Pair) -> None:
    pair.target.send(outcomes(41))
    pair.draft.close()
    with pytest.raises(PeerLost, match="in round 41") as caught:
        pair.target.receive(SOON)
    assert (caught.value.role, caught.value.rank, caught.value.round) == ("draft", 1, 41)
