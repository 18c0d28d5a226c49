"""How long the target waits for its drafts: once a question, whoever dies, and however often another speaks."""

from __future__ import annotations

import math
from collections import deque

import pytest

from ssd_runtime.comm.control.messages import Message
from ssd_runtime.engine.request import Request
from ssd_runtime.engine.sequence import NoText, Sequence
from ssd_runtime.kv.pool import BlockAllocator
from ssd_runtime.kv.table import BlockTable
from ssd_runtime.leader import draft_peer
from ssd_runtime.leader import drafts as module
from ssd_runtime.leader.draft_peer import FIRST_S, MOST_S, SLACK_S, DraftPeer, ReplyTimeout
from ssd_runtime.leader.drafts import Drafts
from ssd_runtime.speculation.types import Outcome, OutcomeFrame, OutcomeRow, SamplingParams, Source, TreeFrame

MOMENT_S = 1e-9  # passes in any call
SIGN = TreeFrame(1, (), 0, 0)
MISSED = OutcomeRow(0, 0, Outcome(0, 1), Source.PENDING, 0, ())


class Clock:
    """`time.monotonic`, moved by whoever waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Played(DraftPeer):
    """A draft that says something at set times; after the last of them it is dead, and nobody knows."""

    def __init__(self, clock: Clock, rank: int = 1) -> None:
        super().__init__(None, b"", rank, None)  # type: ignore[arg-type]
        self._clock = clock
        self.signs: deque[float] = deque()  # when it speaks

    def speaks(self, *after_s: float) -> Played:
        self.signs.extend(self._clock.now + seconds for seconds in after_s)
        return self

    def send_control(self, message: Message) -> None:
        self.control_seq += 1

    def send_outcomes(self, frame: OutcomeFrame) -> None:
        pass

    def poll_trees(self) -> list[TreeFrame]:
        heard = []
        while self.signs and self.signs[0] <= self._clock.now:
            self.signs.popleft()
            heard.append(SIGN)
        return heard

    def wait_trees(self, timeout_s: float) -> list[TreeFrame]:
        until = self._clock.now + max(timeout_s, MOMENT_S)
        self._clock.now = max(self._clock.now, min(until, self.signs[0] if self.signs else math.inf))
        return self.poll_trees()

    def check_pulse(self, now: float) -> None:
        pass


class DraftAcceptor:
    """Through which the test sends drafts."""

    has_news = True

    def __init__(self) -> None:
        self.coming: list[Played] = []

    def arrived(self) -> list[Played]:
        arrived, self.coming = self.coming, []
        return arrived

    def let_go(self, draft: Played) -> None:
        raise AssertionError("nobody is lost here")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    played = Clock()
    for user in (module, draft_peer):
        monkeypatch.setattr(user, "time", played)
    return played


@pytest.fixture
def acceptor() -> DraftAcceptor:
    return DraftAcceptor()


@pytest.fixture
def drafts(acceptor: DraftAcceptor, clock: Clock) -> Drafts:
    return Drafts(acceptor, deadline=10.0)  # type: ignore[arg-type]


def come(acceptor: DraftAcceptor, drafts: Drafts, *coming: Played) -> None:
    """They are there before the sequence begins, which all of them draft for."""
    acceptor.coming = list(coming)
    drafts.check()
    drafts.admit([sequence()])


def ask(drafts: Drafts) -> None:
    drafts.tell(1, [MISSED], None)


def wait_to_the_end(drafts: Drafts, clock: Clock) -> tuple[int, float]:
    """Signs heard and seconds spent until waiting is of no use any more."""
    start = clock.now
    while drafts.wait([MISSED.sequence_id]):
        pass
    return len(drafts.take_trees()), clock.now - start


def sequence() -> Sequence:
    table = BlockTable(BlockAllocator(4), 4, 16, "cpu")  # type: ignore[arg-type]
    begun = Sequence(0, Request("r", (1, 2), SamplingParams(), "ssd", 3, 8), table, NoText(), 16)
    begun.begin(vocab_size=8)
    return begun


def test_a_dead_draft_is_waited_for_once_and_not_again_until_it_speaks(
    drafts: Drafts, acceptor: DraftAcceptor, clock: Clock
) -> None:
    come(acceptor, drafts, Played(clock))
    ask(drafts)
    heard, spent = wait_to_the_end(drafts, clock)
    assert heard == 0
    assert spent == pytest.approx(FIRST_S + SLACK_S)
    ask(drafts)
    assert wait_to_the_end(drafts, clock) == (0, 0.0)


def test_several_drafts_that_die_together_are_not_waited_for_one_after_the_other(
    drafts: Drafts, acceptor: DraftAcceptor, clock: Clock
) -> None:
    come(acceptor, drafts, *(Played(clock, rank) for rank in (1, 2, 3)))
    ask(drafts)
    assert wait_to_the_end(drafts, clock)[1] <= FIRST_S + SLACK_S + 3 * module.TURN_S


def test_a_draft_that_falters_on_every_sign_has_one_slack_for_all_of_them(
    drafts: Drafts, acceptor: DraftAcceptor, clock: Clock
) -> None:
    draft = Played(clock)
    come(acceptor, drafts, draft)
    for _ in range(200):  # what is usual becomes a millisecond
        ask(drafts)
        draft.speaks(0.001)
        assert drafts.wait([MISSED.sequence_id])
    drafts.take_trees()
    ask(drafts)
    draft.speaks(*(0.05 * n for n in range(1, 20)))  # each within a slack of its own
    heard, spent = wait_to_the_end(drafts, clock)
    assert heard < 3  # the first has used up most of the slack
    assert spent < 0.1


def test_a_dead_draft_is_not_waited_for_anew_whenever_another_speaks(
    drafts: Drafts, acceptor: DraftAcceptor, clock: Clock
) -> None:
    talks, dead = Played(clock, 1), Played(clock, 2)
    come(acceptor, drafts, talks, dead)
    ask(drafts)
    talks.speaks(*(0.02 * n for n in range(1, 5)))
    heard, spent = wait_to_the_end(drafts, clock)
    assert heard == 4
    # What the talking one has still to be waited for after its last word; the dead one was given up before.
    assert spent <= 0.08 + FIRST_S + SLACK_S + 0.01


def test_a_draft_that_comes_in_mid_work_is_waited_for_once_it_has_spoken(
    drafts: Drafts, acceptor: DraftAcceptor, clock: Clock
) -> None:
    drafts.check()
    drafts.admit([sequence()])
    draft = Played(clock)
    acceptor.coming = [draft]
    drafts.settle()
    ask(drafts)
    assert wait_to_the_end(drafts, clock) == (0, 0.0)
    draft.speaks(0.0)
    drafts.check()
    draft.speaks(0.01)
    assert drafts.wait([MISSED.sequence_id])


@pytest.mark.parametrize("pause", [0.001, 0.02, 0.3, 0.9])
def test_a_draft_that_talks_is_not_waited_for_without_end(
    drafts: Drafts, acceptor: DraftAcceptor, clock: Clock, pause: float
) -> None:
    """Not even where such pauses are usual for it."""
    draft = Played(clock)
    come(acceptor, drafts, draft)
    for _ in range(30):
        ask(drafts)
        draft.speaks(*(pause * n for n in range(1, 2000)))
        _, spent = wait_to_the_end(drafts, clock)
        assert spent <= MOST_S + 1e-6
        clock.now += pause
        drafts.check()
        draft.signs.clear()
    assert spent == pytest.approx(MOST_S)


def answers(reply_timeout: ReplyTimeout, *silences: float) -> None:
    """One answer, in as many signs."""
    reply_timeout.ask()
    for silence in silences:
        reply_timeout.observe(silence)


def test_a_burst_of_late_answers_does_not_change_what_is_usual() -> None:
    reply_timeout = ReplyTimeout()
    for _ in range(9):
        answers(reply_timeout, 0.01)
    reply_timeout.ask()
    before = reply_timeout.bound
    for _ in range(4):
        reply_timeout.observe_late(5.0)
        assert reply_timeout.bound == before
    for _ in range(9):
        answers(reply_timeout, 0.01)
        assert reply_timeout.bound <= before


def test_what_a_slow_draft_takes_is_soon_usual() -> None:
    reply_timeout = ReplyTimeout()
    asked = 0
    while reply_timeout.bound < 0.3:  # its steps take 300 ms
        reply_timeout.observe_late(0.3)
        asked += 1
    assert asked < 8
    for _ in range(20):
        reply_timeout.observe_late(50.0)
    assert reply_timeout.bound < 1.1  # but nobody waits for ever
    while reply_timeout.bound > 0.1:  # and it may become fast again
        answers(reply_timeout, 0.01)
        asked += 1
    assert asked < 16


def test_the_longest_silence_of_an_answer_is_what_counts() -> None:
    """A draft that first computes for long and then speaks often is not late each time."""
    reply_timeout = ReplyTimeout()
    for _ in range(9):
        answers(reply_timeout, 0.2, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01)
    reply_timeout.ask()
    assert reply_timeout.bound > 0.2
