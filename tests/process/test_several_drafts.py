"""Several draft processes beside one target: one dies and comes back, one is slow; the streams go on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.process.runs import Run, eventually
from tests.process.streams import Streams
from tests.process.targets import (
    LENGTH,
    WAIT_S,
    Target,
    assert_all_right,
    lone_draft,
    lone_drafts,
    lone_target,
    until_hits_are_back,
)

pytestmark = pytest.mark.process

STOPPED_S, RUNNING_S = 2.0, 0.4  # of a slow draft; it is not silent for so long that it would count as lost


@pytest.fixture(scope="module")
def target(starting: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Target:
    return lone_target(starting, tmp_path_factory.mktemp("models"), "[deployment]\ndrafts = 2\n")


@pytest.fixture(scope="module")
def pair(target: Target, starting: Callable[..., Run]) -> list[Run]:
    """Two drafts, which the target has numbered."""
    drafts = lone_drafts(starting, target, 2)
    assert {draft.until("linked: draft ").split()[0] for draft in drafts} == {"1", "2"}
    return drafts


@contextlib.contextmanager
def slowed_down(rank: psutil.Process) -> Iterator[None]:
    """It runs for a while now and then."""
    over = threading.Event()

    def slow() -> None:
        while not over.is_set():
            rank.suspend()
            over.wait(STOPPED_S)
            rank.resume()
            over.wait(RUNNING_S)

    thread = threading.Thread(target=slow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10)
        rank.resume()


def test_drafts_that_are_slow_are_not_waited_for(target: Target, pair: list[Run]) -> None:
    with Streams(target.address, LENGTH) as streams:
        until_hits_are_back(streams, len(streams.answers))
        before = len(streams.answers) + 1
        with slowed_down(pair[0].rank(0)), slowed_down(pair[1].rank(0)):
            eventually(lambda: len(streams.answers) > before + 2 or streams.failure is not None, WAIT_S, "answers")
        slow = streams.answers[before:]
        until_hits_are_back(streams, len(streams.answers))
    assert_all_right(streams, target)
    # Waiting for them would hold up a round for as long as they are stopped.
    assert max(answer.longest_wait for answer in slow) < 0.75 * STOPPED_S


def until_it_drafts(rank: psutil.Process) -> None:
    """Until it has computed for a while: an idle draft uses next to nothing."""
    so_far = rank.cpu_times().user
    eventually(lambda: rank.cpu_times().user > so_far + 0.2, WAIT_S, "the draft is at work")


def test_one_of_two_drafts_is_killed_and_another_gets_its_part(
    target: Target, pair: list[Run], starting: Callable[..., Run]
) -> None:
    one, other = pair
    target.until("both are there", lambda status: status.num_drafts == 2)
    lost = target.status().drafts_lost
    with Streams(target.address, LENGTH) as first, Streams(target.address, LENGTH) as second:
        both = first, second
        for draft in pair:
            until_it_drafts(draft.rank(0))
        one.rank(0).kill()
        target.until("the killed draft is lost", lambda status: status.drafts_lost > lost)
        for streams in both:  # the other takes over
            until_hits_are_back(streams, len(streams.answers))

        back = lone_draft(starting, target)
        for draft in (back, other):
            until_it_drafts(draft.rank(0))
        for streams in both:
            until_hits_are_back(streams, len(streams.answers))
    for streams in both:
        assert_all_right(streams, target)
    for draft in (other, back):
        draft.process.terminate()
        assert draft.exit_code(WAIT_S) == 0
        draft.assert_nothing_is_left()
